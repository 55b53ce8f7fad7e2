"""One training step of ours (GRPO, then AXPO) and of TRL's GRPOTrainer with tools, on the same scripted work.

    make bench-trl        (an environment of its own with TRL, then: python benchmarks/step_vs_trl.py)

The three take turns inside one process. Peak memory is taken in a process for each. TRL's reference log-probs,
which it computes while it rolls out, are counted as update on both sides.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence

import torch
from timing import spread
from workload import Shape, trainer

OURS = ("grpo", "axpo")


class Ours:
    """Our trainer. `step` takes the seconds of one step and of its parts."""

    def __init__(self, method: str, shape: Shape) -> None:
        self.trainer = trainer({"method": {"name": method}}, shape)
        self.parts: list[dict[str, float]] = []

    def step(self) -> None:
        started = time.perf_counter()
        _, figures = asyncio.run(self.trainer.step(len(self.parts)))
        whole = time.perf_counter() - started
        self.figures = figures
        self.parts.append({"step": whole, "rollout": figures["rollout_seconds"], "update": figures["update_seconds"]})


def measure(runs: int, shape: Shape, names: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    """The seconds of each side's steps, in turn, without each side's first."""
    ours = {name: Ours(name, shape) for name in OURS if name in names}

    def others() -> None:
        for side in ours.values():
            side.step()

    if "trl" in names:
        from trl_side import Theirs

        theirs = Theirs(shape)
        theirs.run(runs + 1, others)
        return {name: side.parts[1:] for name, side in (ours | {"trl": theirs}).items()}
    for _ in range(runs + 1):
        others()
    return {name: side.parts[1:] for name, side in ours.items()}


def memory(name: str, arguments: Sequence[str]) -> dict[str, float]:
    """Peak resident memory of two steps in a process of its own, in MB, and what it was before the first."""
    command = [sys.executable, __file__, "--memory-of", name, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--callers", type=int, default=Shape.callers, help="rollouts of a group that call a tool")
    parser.add_argument("--only", choices=(*OURS, "trl"), nargs="*", default=(*OURS, "trl"))
    parser.add_argument("--memory-of", choices=(*OURS, "trl"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = Shape(callers=options.callers)
    seconds = measure(options.runs, shape, options.only)
    for name, parts in seconds.items():
        print(name, {part: spread([p[part] for p in parts]) for part in parts[0]})


if __name__ == "__main__":
    main()
