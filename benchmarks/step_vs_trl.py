"""One training step of ours (GRPO, then AXPO) and of TRL's GRPOTrainer with tools, on the same scripted work.

    make bench-trl        (an environment of its own with TRL, then: python benchmarks/step_vs_trl.py)

The same weights (the miniature's base), prompts with an image and two tool schemas, group size, texts, sampling, KL
to a reference, dtype and threads. Nothing is checkpointed, and TRL trains its whole batch at once, with which it is
fastest (`--trl-rows 8` takes less memory). The three take turns in one process, TRL inside its own training loop.
TRL's reference log-probs, which it computes while it rolls out, count as update, as ours do. AXPO has more to do than
the others: it resamples two failed calls four times each. Memory is what two steps add to what lies loaded, in a
process for each side.
"""

import argparse
import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision_shim  # noqa: F401  (first: transformers looks for torchvision)
from timing import alone, machine, options, peak_memory, ratio, shown, spread, table, write
from workload import Shape, trainer

SIDES = ("grpo", "axpo", "trl")


class Ours:
    """Our trainer. `parts` are the seconds of each step so far."""

    def __init__(self, method: str, shape: Shape) -> None:
        self.trainer = trainer({"method": {"name": method}}, shape)
        self.parts: list[dict[str, float]] = []
        self.tokens: dict[str, float] = {}

    def step(self) -> None:
        self.trainer.agent.chat.forget_images()  # a step of training sees new ones
        started = time.perf_counter()
        trees, figures = asyncio.run(self.trainer.step(len(self.parts)))
        whole = time.perf_counter() - started
        self.parts.append({"step": whole, "rollout": figures["rollout_seconds"], "update": figures["update_seconds"]})
        prompts = [len(tree.root) for tree in trees]
        rows = sum(len(segment) for tree in trees for leaf in tree.leaves() for segment in leaf.path())
        self.tokens = {
            "prompt": sum(prompts) / len(prompts),
            "rows": rows,
            "packed": figures["packed_tokens"],
            "sampled": figures["generated_tokens"],
            "forked": figures["forked"],
        }


def seconds(
    runs: int, shape: Shape, trl_rows: int
) -> tuple[dict[str, list[dict[str, float]]], dict[str, dict[str, float]]]:
    """The seconds of each side's steps, in turn, without its first; and the tokens of ours."""
    from trl_side import Theirs

    ours = {name: Ours(name, shape) for name in SIDES if name != "trl"}
    theirs = Theirs(shape, trl_rows)
    theirs.run(runs + 1, between=lambda: [side.step() for side in ours.values()])
    parts = {name: side.parts[1:] for name, side in ours.items()} | {"trl": theirs.parts[1:]}
    tokens = {name: side.tokens for name, side in ours.items()} | {"trl": {"sampled": theirs.trainer.sampled}}
    if tokens["grpo"]["sampled"] != tokens["trl"]["sampled"]:
        raise RuntimeError(f"unequal work: {tokens}")
    return parts, tokens


def memory(name: str, shape: Shape, trl_rows: int) -> float:
    """MB that the first two steps of a side add to what lies loaded."""
    if name == "trl":
        from trl_side import Theirs

        theirs = Theirs(shape, trl_rows)
        return peak_memory(lambda: theirs.run(2, between=lambda: None))
    side = Ours(name, shape)
    return peak_memory(lambda: [side.step() for _ in range(2)])


def result(parts: dict[str, list[dict[str, float]]], peaks: dict[str, list[float]]) -> dict[str, Any]:
    """The ratios round by round, and what they are made of."""

    def over(one: str, other: str, part: str) -> dict[str, float]:
        return ratio([p[part] for p in parts[one]], [p[part] for p in parts[other]])

    ratios = {
        "axpo_over_trl": over("axpo", "trl", "step"),
        "grpo_over_trl": over("grpo", "trl", "step"),
        "update_over_trl": over("grpo", "trl", "update"),
        "axpo_over_grpo": over("axpo", "grpo", "step"),
        "peak_memory_over_trl": ratio(peaks["axpo"], peaks["trl"]),
    }
    return {
        **{name: spread_of["median"] for name, spread_of in ratios.items()},
        "spread": ratios,
        "seconds": {
            name: {part: spread([p[part] for p in steps]) for part in steps[0]} for name, steps in parts.items()
        },
        "peak_memory_mb": {name: spread(values) for name, values in peaks.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, runs=7)
    for name, default in vars(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--trl-rows", type=int, help="rows that TRL trains at once, by default all")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    shape = Shape(**{name: getattr(chosen, name) for name in vars(Shape())})
    trl_rows = chosen.trl_rows or shape.questions * shape.rollouts
    if chosen.memory_of:
        print(memory(chosen.memory_of, shape, trl_rows))
        return
    sizes = [f"--{k}={v}" for k, v in {**vars(shape), "threads": chosen.threads, "trl-rows": trl_rows}.items()]
    peaks: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(min(chosen.runs, 5)):
        for name in SIDES:
            peaks[name].append(alone(str(Path(__file__)), *sizes, "--memory-of", name))
    parts, tokens = seconds(chosen.runs, shape, trl_rows)
    found = result(parts, peaks)
    packages = ("trl", "peft", "accelerate", "datasets")
    work = {"shape": vars(shape), "trl_rows": trl_rows, "runs": chosen.runs, "tokens": tokens}
    write("step_vs_trl", {**found, **work, "machine": machine(*packages)}, chosen.out)
    print(
        table(
            [
                {
                    "side": name,
                    **{f"{part} s": shown(found["seconds"][name][part]) for part in ("step", "rollout", "update")},
                    "peak MB": shown(found["peak_memory_mb"][name]),
                }
                for name in SIDES
            ]
        )
    )
    print(table([{"ratio": name, "median (min-max)": shown(values)} for name, values in found["spread"].items()]))


if __name__ == "__main__":
    main()
