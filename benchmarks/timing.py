"""What every benchmark shares: options, alternating runs, medians with their spread, memory, the machine, a JSON
file and a table."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def options(description: str | None, runs: int = 5) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=runs, help="rounds in which each contender runs once")
    parser.add_argument("--threads", type=int, default=2, help="threads of one torch operation")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the JSON file")
    return parser


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


def shown(values: Mapping[str, float]) -> str:
    """A spread for a table."""
    return f"{_figure(values['median'])} ({_figure(values['min'])}-{_figure(values['max'])})"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """The spread of the ratios, round by round: a drift of the machine hits both of a round."""
    return spread([one / other for one, other in zip(ours, theirs, strict=True)])


def peak_memory(run: Callable[[], object]) -> float:
    """MB that `run` adds at its peak to what this process holds. True only of the first large run of a process: later
    ones find memory that was never given back."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key + ":")))


def alone(file: str, *arguments: object) -> Any:
    """What a Python file prints as its last line, in JSON, when it runs in a process of its own."""
    done = subprocess.run([sys.executable, file, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def machine(*packages: str) -> dict[str, Any]:
    """Where a figure comes from."""
    import torch

    versions = {name: version(name) for name in ("torch", "transformers", *packages)}
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    } | versions


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write(name: str, result: Mapping[str, Any], folder: Path = RESULTS) -> None:
    """Keep the result as benchmarks/results/NAME.json, or in another folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as a Markdown table; numbers with three figures or more."""
    shown = [[_figure(v) if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *shown]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
