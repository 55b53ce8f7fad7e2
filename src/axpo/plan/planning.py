"""The plan of a config: what it takes, whether it fits, and what to change where it does not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from axpo.config import Config
from axpo.plan.activations import Batch
from axpo.plan.memory import GIB, USABLE, Moment, host_bytes, moments, vllm_least
from axpo.plan.shapes import Shape
from axpo.plan.tokens import Step, largest_pack, training_step, tuning_step

_STEP = 512  # tokens by which pack and context are lowered
_LEAST = 0.25  # of what was asked for: a smaller share changes the run too much to be called a knob
_SHARE = 0.05  # of a GPU's memory by which vLLM's part is changed


@dataclass(frozen=True)
class Plan:
    """What a config takes, in bytes; `gpu_memory` is None where nobody said how much there is."""

    config: Config
    shape: Shape
    step: Step
    batch: Batch
    moments: list[Moment]
    host: int
    tuning: bool
    gpu_memory: int | None

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def excess(self) -> int:
        """By how much it does not fit; 0 where it does, or where the memory is not known."""
        if self.gpu_memory is None:
            return 0
        return max(0, self.peak.total - int(USABLE * self.gpu_memory), self.vllm_lacks)

    @property
    def vllm_lacks(self) -> int:
        """What vLLM's share is short of."""
        config = self.config
        if self.tuning or config.engine.name != "vllm" or config.vllm.servers or self.gpu_memory is None:
            return 0
        return max(0, vllm_least(config, self.shape) - int(config.vllm.memory * self.gpu_memory))


def make_plan(config: Config, shape: Shape, pixels: int, gpu_memory: int | None, tuning: bool | None = None) -> Plan:
    """The plan of `axpo train`, or of `axpo sft` where `tuning` says so, by default for a config that has data for that
    alone. `pixels` are those of the largest image, `gpu_memory` is in bytes."""
    if tuning is None:
        tuning = config.data.train is None and config.data.sft is not None
    step = (tuning_step if tuning else training_step)(config, shape, pixels)
    batch = largest_pack(config, step)
    return Plan(
        config=config,
        shape=shape,
        step=step,
        batch=batch,
        moments=moments(config, shape, batch, gpu_memory, tuning),
        host=host_bytes(config, shape, tuning),
        tuning=tuning,
        gpu_memory=gpu_memory,
    )


@dataclass(frozen=True)
class Change:
    """What to set, as an override; what it takes off the peak; the plan with it."""

    override: str
    saves: int
    plan: Plan


def remedies(plan: Plan, pixels: int) -> list[Change]:
    """The changes that make a plan fit: the smallest one that does alone, or as few as it takes together, from the
    smallest on. Empty where all of them are too little. Raises nothing for a plan that fits: then it is empty too."""
    if not plan.excess:
        return []
    alone = [change for change in _changes(plan, pixels) if not change.plan.excess]
    if alone:
        return alone[:1]
    found: list[Change] = []
    while plan.excess:
        useful = [change for change in _changes(plan, pixels) if change.plan.excess < plan.excess]
        if not useful:
            return []
        ending = [change for change in useful if not change.plan.excess]
        found.append((ending or useful)[0])
        plan = found[-1].plan
    return found


def _changes(plan: Plan, pixels: int) -> Iterator[Change]:
    """Every knob, set to what helps; those that change neither what is trained nor on what come first."""
    for override, config in _knobs(plan, pixels):
        changed = make_plan(config, plan.shape, pixels, plan.gpu_memory, plan.tuning)
        yield Change(override, plan.peak.total - changed.peak.total, changed)


def _knobs(plan: Plan, pixels: int) -> Iterator[tuple[str, Config]]:
    config = plan.config

    def less(section: str, key: str, step: float, least: float) -> Iterator[tuple[str, Config]]:
        """The largest smaller value that fits, or the least one."""
        yield from _first_fitting(plan, pixels, section, key, -step, least)

    if plan.vllm_lacks:
        yield from _first_fitting(plan, pixels, "vllm", "memory", _SHARE, 0.95)
    if not config.train.gradient_checkpointing:
        yield _set(config, "train", "gradient_checkpointing", True)
    offload, sharded = config.parallel.offload, config.parallel.sharding == "full"
    if config.parallel.processes > 1 and not sharded and not offload:
        yield _set(config, "parallel", "sharding", "full")
    if plan.peak.name == "rollout" and config.engine.name == "local":
        yield from less("engine", "kv_memory", 0.5, _LEAST * config.engine.kv_memory)
    if plan.peak.name in ("start", "rollout") and config.engine.name == "vllm" and not plan.vllm_lacks:
        yield from less("vllm", "memory", _SHARE, _SHARE)
    if plan.batch.tokens > plan.step.path:
        yield from less("train", "pack_tokens", _STEP, max(plan.step.path, _LEAST * config.train.pack_tokens))
    if not (offload or sharded) and config.device != "cpu":
        yield _set(config, "parallel", "offload", True)
    if plan.batch.tokens == plan.step.path:
        yield from less("rollout", "max_context", _STEP, plan.step.prompt + max(2, _LEAST * plan.step.rollout))
    if config.train.vision and plan.shape.vision and not config.lora.rank:
        yield _set(config, "train", "vision", False)
    if not config.lora.rank:
        yield _set(config, "lora", "rank", 16)


def _first_fitting(
    plan: Plan, pixels: int, section: str, key: str, step: float, end: float
) -> Iterator[tuple[str, Config]]:
    value = getattr(getattr(plan.config, section), key)
    kind: Callable[[float], Any] = type(value)
    if isinstance(value, int):
        value -= value % -int(step) if step < 0 else 0
    last = None
    for number in range(1, 1 + int(abs(end - value) / abs(step) + 1e-9)):
        last = _set(plan.config, section, key, kind(round(value + number * step, 2)))
        if not make_plan(last[1], plan.shape, pixels, plan.gpu_memory, plan.tuning).excess:
            break
    if last is not None:
        yield last


def _set(config: Config, section: str, key: str, value: Any) -> tuple[str, Config]:
    changed = getattr(config, section).model_copy(update={key: value})
    shown = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value
    update = {section: changed}
    if (section, key) == ("rollout", "max_context") and changed.max_tokens > value:
        update = {section: changed.model_copy(update={"max_tokens": value})}
    return f"{section}.{key}={shown}", config.model_copy(update=update)


def refusal(plan: Plan, pixels: int) -> str:
    """One line: what does not fit, and what to change."""
    assert plan.gpu_memory is not None
    gpu = plan.gpu_memory
    if plan.vllm_lacks:
        has, needs = vllm_share(plan), vllm_least(plan.config, plan.shape)
        line = (
            f"vllm.memory: got {plan.config.vllm.memory:g}, which is {gib(has)} of this GPU's {gib(gpu)}, but the "
            f"weights and one rollout of rollout.max_context = {plan.config.rollout.max_context} take {gib(needs)}"
        )
    else:
        usable = int(USABLE * gpu)
        line = (
            f"it does not fit: the {plan.peak.name} takes {gib(plan.peak.total)} of a GPU, "
            f"and {gib(usable)} of its {gib(gpu)} can be used"
        )
    changes = remedies(plan, pixels)
    if not changes:
        return f"{line}; no option that the plan knows makes it fit: it takes more GPUs or a smaller model"
    told = [
        change.override if change.saves <= 0 else f"{change.override} (takes {gib(change.saves)} off the peak)"
        for change in changes
    ]
    return f"{line}; it fits with {' and '.join(told)}"


def vllm_share(plan: Plan) -> int:
    """vLLM's share of the GPU, in bytes."""
    assert plan.gpu_memory is not None
    return int(plan.config.vllm.memory * plan.gpu_memory)


def gib(size: float) -> str:
    """Bytes in the unit that suits them."""
    for least, unit, name in ((0.1 * GIB, GIB, "GiB"), (2**20, 2**20, "MiB")):
        if size >= least:
            return f"{size / unit:,.1f} {name}"
    return f"{size / 2**10:,.1f} KiB"
