"""What every benchmark shares: alternating runs, medians with their spread, the machine, a JSON file and a table."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def alternate(contenders: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of each contender: one warm-up each, then `runs` rounds in which each runs once, in turn."""
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(runs):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """The spread of the ratios, round by round: a drift of the machine hits both of a round."""
    return spread([one / other for one, other in zip(ours, theirs, strict=True)])


def machine(*packages: str) -> dict[str, Any]:
    """Where a figure comes from."""
    import torch

    versions = {name: version(name) for name in ("torch", "transformers", *packages)}
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    } | versions


def write(name: str, result: Mapping[str, Any]) -> None:
    """Keep the result as benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def table(rows: list[Mapping[str, object]]) -> str:
    """Rows as a Markdown table; numbers with three figures."""
    shown = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *shown]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
