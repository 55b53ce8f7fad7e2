"""The plan as tables of at most 80 columns."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table

from axpo.plan.memory import PARTS, USABLE, VLLM_WORK, engine_itemsize, kv_bytes, trained
from axpo.plan.planning import Plan, gib, vllm_share
from axpo.plan.tokens import OBSERVATION_TEXT, PROMPT_TEXT


def tables(plan: Plan) -> Iterator[RenderableType]:
    """What is printed, in order."""
    yield _parameters(plan)
    yield _memory(plan)
    yield _step(plan)
    yield from _notes(plan)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.show_header = any(columns)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


def _parameters(plan: Plan) -> RenderableType:
    shape, config = plan.shape, plan.config
    numbers, rank = trained(config, shape), config.lora.rank
    table = _table("parameters", "", "")
    rows: list[tuple[str, int]] = [("language", shape.language_parameters)]
    rows += [("vision", shape.vision_parameters)] if shape.vision else []
    rows += [("embeddings" + (", tied" if shape.tied else " and output head"), shape.embedding_parameters)]
    rows += [("all", shape.parameters)]
    rows += [(f"trained: adapters of rank {rank}", numbers)] if rank else [("trained", numbers)]
    rows += [("frozen", shape.parameters - (0 if rank else numbers))]
    for name, count in rows:
        table.add_row(name, f"{count:,}")
    return table


def _memory(plan: Plan) -> RenderableType:
    config = plan.config.parallel
    how = "each holds all" if config.sharding == "none" or config.processes == 1 else "sharded"
    place = "process" if plan.config.device == "cpu" else "GPU"
    title = f"\nGiB of each {place} ({config.processes} process{'es' * (config.processes > 1)}, {how})"
    table = _table(title, "", *(moment.name for moment in plan.moments))
    for part in PARTS:
        sizes = [moment.parts.get(part, 0) for moment in plan.moments]
        if any(sizes):
            table.add_row(part, *(_cell(size) for size in sizes))
    table.add_row("together", *(_cell(moment.total) for moment in plan.moments), style="bold")
    return table


def _cell(size: int) -> str:
    if not size:
        return "-"
    return f"{size / 2**30:.2f}" if size >= 0.01 * 2**30 else f"{size / 2**30:.4f}"


def _step(plan: Plan) -> RenderableType:
    step, config = plan.step, plan.config
    table = _table("\na step of all processes", "", "")
    name = "trajectories" if plan.tuning else "rollouts"
    table.add_row(name, f"{step.rollouts:,} = {step.questions:,} × {step.rollouts // step.questions}")
    table.add_row("tokens of a prompt, and then of a rollout, at most", f"{step.prompt:,} and {step.rollout:,}")
    table.add_row(f"tokens of all {name}, at most", f"{step.rollouts * step.rollout:,}")
    if step.extra:
        least, most = (round(100 * share) for share in step.extra_tokens)
        table.add_row("rollouts that the method adds, at most", f"{step.extra:,} (+{step.extra / step.rollouts:.0%})")
        table.add_row(
            "sampled tokens that these add, expected", f"+{least}% to +{most}%" if least < most else f"+{most}%"
        )
    if plan.shape.vision:
        table.add_row("tokens, and patches, of the largest image", f"{step.image_tokens:,} and {step.image_patches:,}")
    table.add_row("tokens of a tree, at most", f"{step.tree:,}")
    table.add_row("tokens, and patches, of the largest forward", f"{plan.batch.tokens:,} and {plan.batch.patches:,}")
    table.add_row("keys and values of one token", gib(kv_bytes(config, plan.shape)))
    table.add_row("memory of the host, all processes", gib(plan.host))
    return table


def _notes(plan: Plan) -> Iterator[str]:
    """What the figures rest on, each in one line."""
    colocated = not plan.tuning and plan.config.engine.name == "vllm" and not plan.config.vllm.servers
    yield f"\nAssumed: a prompt's text of {PROMPT_TEXT:,} tokens, a tool's of {OBSERVATION_TEXT:,}; see docs/plan.md."
    if plan.gpu_memory is None:
        more = f"; vLLM takes {plan.config.vllm.memory:.0%} of it in the rollout" if colocated else ""
        yield f"How much memory a GPU has is not known{more}: --gpu-memory says it."
        return
    if colocated:
        room = vllm_share(plan) - plan.shape.parameters * engine_itemsize(plan.config) - VLLM_WORK
        rollouts = int(room / kv_bytes(plan.config, plan.shape) / plan.config.rollout.max_context)
        yield f"vLLM's share has room for {max(0, rollouts)} rollouts of the longest at once."
    if not plan.excess:
        usable = USABLE * plan.gpu_memory
        yield f"It fits: the {plan.peak.name} takes {gib(plan.peak.total)}, and {gib(usable)} can be used."
