"""What is seen while cells run, in a terminal and elsewhere."""

import io
import json
from pathlib import Path

from rich.console import Console

from axpo.comparison.display import TerminalDisplay
from axpo.comparison.grid import Cell
from axpo.config import load_config


def cell(folder: Path, name: str, lines: list[dict[str, object]]) -> Cell:
    config = load_config(None, [f"output={folder / name}", "train.steps=60"])
    config.output.mkdir()
    (config.output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"half')
    return Cell(name, 1, config)


STEP = {"stage": "axpo", "step": 1, "accuracy": 0.25, "tool_use": 1.0}
EVALUATION = {"stage": "eval", "of": "axpo", "pass1": 0.7472, "tool_use": None}


def test_lines_of_what_has_ended(tmp_path: Path) -> None:
    written = io.StringIO()
    one, two = cell(tmp_path, "axpo", [STEP, EVALUATION]), cell(tmp_path, "a_method_with_a_long_name_that_is_cut", [])
    with TerminalDisplay([one, two], 0, 2, Console(file=written, width=200)) as display:
        for each in (one, two):
            display.begun(each)
        display.ended(one, 83.0, None)
        display.ended(two, 5.0, "exit code 2: no such file")
    assert written.getvalue().splitlines() == [
        "2 runs, 0 of them done; 2 at a time",
        "      1/2  axpo seed 1                        1:23  Pass@1  74.7%  tools      –",
        "   failed  a_method_with_a_long_name_that_is_cut seed 1: exit code 2: no such file",
    ]
    assert max(map(len, written.getvalue().splitlines()[:2])) <= 80


def test_a_terminal_shows_the_running_ones_in_80_columns(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    cells = [cell(tmp_path, name, [STEP] * count) for name, count in (("axpo", 15), ("grpo", 0), ("done", 60))]
    display = TerminalDisplay(cells, 0, 2, console, clock=lambda: 0.0)
    for each in cells:
        display.begun(each)
    display.ended(cells[2], 600.0, None)
    plain = Console(file=io.StringIO(), width=120)
    plain.print(display._shown())
    assert isinstance(plain.file, io.StringIO)
    lines = [line.rstrip() for line in plain.file.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("axpo seed 1")
    assert "15/60 right  25.0%  tools 100.0%" in lines[0]
    assert "0/60" in lines[1]
    assert lines[2] == "1/3 runs done, about 10:00 left"
