"""What AXPO's resampling costs: its step at r = 0, 0.25, 0.5 and 1 against GRPO steps of N·(1 + r) rollouts.

    python benchmarks/resampling_cost.py          (about 12 minutes on two cores)

All are our trainer, with the same model, engine, packing and scripted texts (workload.py): of the N rollouts of a
group, 3/8 call a tool in vain and the others answer at once. So every group may be forked, and AXPO spends its whole
budget: r·B·N extra continuations. GRPO gets as many extra rollouts, whole ones, of which 3/8 (rounded down) call too.

AXPO forks only when its groups have ended, so its continuations decode apart from the rollouts, where GRPO's extra
rollouts decode beside the others; what it saves is that no prompt, prefix or image is computed again. r = 0 is what
looking for candidates costs, and how well the machine repeats itself: it forks nothing.

The contenders take turns in one process. Two things weigh most in what AXPO adds: a decode step costs about as much for
few rollouts as for many, and a continuation samples a call whatever was thought before it. Hence a step of few
questions and short turns, and one of more and longer.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from timing import machine, options, ratio, shown, spread, table, write
from workload import Shape, trainer

RATIOS = (0.0, 0.25, 0.5, 1.0)
SIZES = ((Shape(), RATIOS), (Shape(questions=16, tokens=256), RATIOS[:2]))


class Side:
    """One trainer, and what each of its steps took. GRPO where `axpo` is false, of N·(1 + r) rollouts."""

    def __init__(self, axpo: bool, extra: float, shape: Shape) -> None:
        if not axpo:
            callers = int(shape.callers * (1 + extra))
            shape = replace(shape, rollouts=int(shape.rollouts * (1 + extra)), callers=callers)
        self.trainer = trainer({"method": {"name": "axpo" if axpo else "grpo", "budget": 1.0}}, shape)
        if axpo:  # set afterwards, because a config refuses a budget that can resample nothing
            config = self.trainer.config
            method = config.method.model_copy(update={"budget": extra})
            self.trainer.config = config.model_copy(update={"method": method})
        self.seconds: dict[str, list[float]] = {"step": [], "rollout": [], "update": []}

    def step(self) -> None:
        started = time.perf_counter()
        _, self.figures = asyncio.run(self.trainer.step(len(self.seconds["step"])))
        self.seconds["step"].append(time.perf_counter() - started)
        for part in ("rollout", "update"):
            self.seconds[part].append(self.figures[f"{part}_seconds"])


def compare(shape: Shape, ratios: Sequence[float], runs: int) -> dict[str, dict[str, object]]:
    """Every contender's figures, without its first step."""
    sides = {f"{name} r={r:g}": Side(name == "axpo", r, shape) for r in ratios for name in ("axpo", "grpo")}
    for _ in range(runs + 1):
        for side in sides.values():
            side.step()
    plain = sides["grpo r=0"].seconds
    counts = ("trained_tokens", "packed_tokens", "forked", "rollouts")
    return {
        name: {
            "sampled_tokens": side.figures["generated_tokens"],
            **{key: side.figures[key] for key in counts},
            **{f"{part}_seconds": spread(seconds[1:]) for part, seconds in side.seconds.items()},
            **{f"{part}_over_grpo": ratio(s[1:], plain[part][1:]) for part, s in side.seconds.items()},
        }
        for name, side in sides.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    for name in ("questions", "rollouts", "callers", "tokens", "prompt"):
        parser.add_argument(f"--{name}", type=int, help=f"of one size, instead of both; default {getattr(Shape, name)}")
    parser.add_argument(
        "--ratios", type=float, nargs="*", default=RATIOS, help="of that size; 0 comes first in any case"
    )
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    given = {name: value for name, value in vars(chosen).items() if name in vars(Shape()) and value is not None}
    sizes = [(Shape(**given), sorted({0.0, *chosen.ratios}))] if given else SIZES
    cases: list[dict[str, Any]] = []
    for shape, ratios in sizes:
        for name, figures in compare(shape, ratios, chosen.runs).items():
            cases.append({"shape": vars(shape), "contender": name, **figures})
            print(json.dumps(cases[-1]), flush=True)
    write("resampling_cost", {"machine": machine(), "sizes": {"runs": chosen.runs}, "cases": cases}, chosen.out)
    columns = ("contender", "rollouts", "forked", "sampled_tokens", "trained_tokens", "packed_tokens")
    parts = ("step", "rollout", "update")
    print(
        table(
            [
                {key: case["shape"][key] for key in ("questions", "tokens")}
                | {key: case[key] for key in columns}
                | {f"{part} s": shown(case[f"{part}_seconds"]) for part in parts}
                | {"step / GRPO of N": shown(case["step_over_grpo"])}
                for case in cases
            ]
        )
    )


if __name__ == "__main__":
    main()
