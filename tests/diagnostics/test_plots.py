from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from axpo.diagnostics.plots import MARKED, NO_TOOL, TOOL, plot_divergence, plot_gap

FOUND: dict[str, Any] = {
    "decided": 800,
    "tool_use": 0.3,
    "questions_tool": 60,
    "all_wrong_tool": 0.5,
    "questions_no_tool": 90,
    "all_wrong_no_tool": 0.1,
    "clusters": 2.0,
    "collapsed": 1 / 3,
    "recovered": 0.5,
    "prefixes": [{"clusters": count} for count in (1, 2, 3)],
    "certainties": [{"confidence": 0.9, "entropy": 0.2}, {"confidence": 0.5, "entropy": 1.0}],
    "calls": 2,
    "pearson": 1.0,
    "spearman": 1.0,
}
NOTHING: dict[str, Any] = dict.fromkeys(FOUND) | {
    "decided": 0,
    "questions_tool": 0,
    "questions_no_tool": 0,
    "prefixes": [],
    "certainties": [],
}


def area(path: Path, colour: str) -> int:
    """How many pixels of the picture have the colour."""
    with PIL.Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return int((pixels == wanted).all(axis=-1).sum())


def test_bars_are_as_high_as_the_shares(tmp_path: Path):
    plot_gap(FOUND, tmp_path / "gap.png")
    # Of one width: 30% and 50% in one colour, 10% in the other.
    assert area(tmp_path / "gap.png", TOOL) / area(tmp_path / "gap.png", NO_TOOL) == pytest.approx(8, rel=0.15)


def test_the_collapsed_prefixes_are_marked(tmp_path: Path):
    plot_divergence(FOUND, tmp_path / "divergence.png")
    # One bar of three, all of one height; the points of the scatter plot are transparent.
    ratio = area(tmp_path / "divergence.png", TOOL) / area(tmp_path / "divergence.png", MARKED)
    assert ratio == pytest.approx(2, rel=0.1)


def test_of_nothing_there_are_no_bars_and_no_points(tmp_path: Path):
    plot_gap(NOTHING, tmp_path / "gap.png")
    plot_divergence(NOTHING, tmp_path / "divergence.png")
    for name in ("gap.png", "divergence.png"):
        assert area(tmp_path / name, TOOL) == area(tmp_path / name, MARKED) == 0
