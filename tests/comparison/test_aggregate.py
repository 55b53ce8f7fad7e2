"""Summaries and the page beside the paper, from results whose figures are computed by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from axpo.comparison import paper
from axpo.comparison.aggregate import as_text, summarise
from axpo.comparison.grid import Grid, cells_of, load_grid
from axpo.comparison.page import Heading, Paragraph, Picture, Table, to_html, to_markdown
from axpo.comparison.paper import row_of
from axpo.comparison.plots import curve, dynamic, evaluated, plot_differences, plot_dynamics, plot_learning, smooth
from axpo.comparison.report import beside_paper, verdict
from axpo.config import load_config

GRID: dict[str, Any] = {
    "config": {"data": {"train": "miniature", "eval": "miniature"}, "tools": ["python"]},
    "output": "out",
    "seeds": [1, 2, 3],
    "methods": {"axpo": [], "grpo": ["method=grpo"], "random": {"method": {"rank": "random"}}},
    "pairs": [["axpo", "grpo"], ["axpo", "sft"]],
}


def result(method: str, seed: int, pass1: float, tool_use: float | None = 0.5, rollouts: int = 64) -> dict[str, Any]:
    shares = {"tool_use": tool_use, "all_wrong_tool": None, "all_wrong_no_tool": 0.25}
    return {
        "method": method,
        "seed": seed,
        "evaluation": {
            "samples": 4,
            "pass1": pass1,
            "pass4": pass1 + 0.25,
            **shares,
            "accuracy_tool": 0.5,
            "accuracy_no_tool": 0.25,
            "families": {"lookup": pass1 / 2},
        },
        "evaluations": {"2": {"pass1": pass1 / 2, "tool_use": tool_use}},
        "steps": 4,
        "spent": {"rollouts": rollouts, "generated_tokens": 10, "trained_tokens": 8, "seconds": 2.5},
        "dynamics": {
            "accuracy": [0.0, 0.25, 0.5, 0.75],
            "tool_use": [0.2, 0.4, 0.4, pass1],
            "all_wrong_tool": [None, 1.0, 0.5, 0.5 - pass1 / 2],
            "forked": [0, 2, 4, 4],
            "recovered": [0, 1, 1, 4],
        },
    }


# AXPO differs from GRPO by 0.1 on each seed, while seeds differ by much more.
RESULTS = [
    *(result("sft", seed, 0.2) for seed in (1, 2, 3)),
    *(result("axpo", seed, 0.25 * seed, 0.5 + seed / 10, 80) for seed in (1, 2, 3)),
    *(result("grpo", seed, 0.25 * seed - 0.1, None if seed == 2 else 0.25) for seed in (1, 2, 3)),
    result("random", 1, 0.5),
]


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID))
    return load_grid(tmp_path / "grid.yaml")


def test_summary_by_hand(grid: Grid) -> None:
    cells = cells_of(grid)
    summary = summarise(grid, cells, RESULTS)
    assert json.loads(json.dumps(summary)) == summary
    assert summary["cells"] == {"finished": 10, "all": 12}
    methods, pairs = summary["methods"], summary["pairs"]
    assert list(methods) == ["sft", "axpo", "grpo", "random"]
    assert methods["axpo"]["seeds"] == 3
    assert methods["axpo"]["pass1"]["mean"] == pytest.approx(0.5)
    assert methods["axpo"]["pass4"]["mean"] == pytest.approx(0.75)
    assert methods["axpo"]["pass1"]["low"] == pytest.approx(0.25)  # of three values, the outermost
    assert methods["axpo"]["rollouts"] == {"mean": 80, "low": 80, "high": 80}
    assert methods["axpo"]["seconds"]["mean"] == 2.5
    assert methods["axpo"]["all_wrong_tool"] == {"mean": None, "low": None, "high": None}
    assert methods["grpo"]["tool_use"] == {"mean": 0.25, "low": None, "high": None}  # two seeds have one
    assert methods["random"] == methods["random"] | {"seeds": 1, "pass1": {"mean": 0.5, "low": None, "high": None}}
    assert list(pairs) == ["axpo_minus_grpo", "axpo_minus_sft"]
    # Paired, the differences of seeds cancel out; the methods' own intervals overlap by far.
    assert pairs["axpo_minus_grpo"]["pass1"] == {key: pytest.approx(0.1) for key in ("mean", "low", "high")}
    assert methods["axpo"]["pass1"]["low"] < methods["grpo"]["pass1"]["high"]
    assert pairs["axpo_minus_grpo"]["tool_use"]["mean"] == pytest.approx((0.35 + 0.55) / 2)  # seeds 1 and 3
    assert pairs["axpo_minus_grpo"]["rollouts"]["mean"] == 16
    family = summary["families"]["lookup"]
    assert family["methods"]["axpo"]["pass1"]["mean"] == pytest.approx(0.25)
    assert family["pairs"]["axpo_minus_grpo"]["pass1"]["mean"] == pytest.approx(0.05)


def test_nothing_yet(grid: Grid) -> None:
    summary = summarise(grid, cells_of(grid), [])
    assert summary["cells"] == {"finished": 0, "all": 12}
    assert summary["methods"]["axpo"]["pass4"] == {"mean": None, "low": None, "high": None}


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ((0.1, 0.05, 0.2), 2.0, "same order"),
        ((0.1, 0.05, 0.2), -2.0, "OTHER ORDER"),
        ((-0.1, -0.2, -0.05), 2.0, "OTHER ORDER"),
        ((0.1, -0.05, 0.2), 2.0, "open (same sign)"),
        ((-0.1, -0.25, 0.0), 2.0, "open (other sign)"),
        ((0.1, None, None), 2.0, "open, too few seeds (same sign)"),
        ((None, None, None), 2.0, "no figures yet"),
        ((0.1, 0.05, 0.2), -0.1, "paper: level; here above"),
        ((0.1, -0.05, 0.2), 0.1, "paper: level; here open"),
    ],
)
def test_the_order_is_told_only_where_the_interval_is_clear_of_0(
    ours: tuple[float | None, ...], theirs: float, said: str
) -> None:
    assert verdict(dict(zip(("mean", "low", "high"), ours, strict=True)), theirs) == said


def test_rows_beside_the_paper(grid: Grid) -> None:
    text = to_markdown(beside_paper(cells_of(grid), RESULTS))
    assert "| SFT+AXPO − SFT (2B) | +5.6 | +30.0 [+5.0, +55.0] | same order |" in text
    assert "| SFT+AXPO − SFT+GRPO, Pass@1 | +2.0 | +10.0 [+10.0, +10.0] | same order |" in text
    said = "| SFT+AXPO − no uncertainty rank (random), Pass@4 | +4.4 | -25.0 | open, too few seeds (other sign) |"
    assert said in text
    assert (
        "| resampled prefixes that are recovered | 12% | 58.3% [58.3, 58.3] | a size, no order |" in text
    )  # of 1/2, 1/4 and 4/4
    assert "| all wrong with a tool, AXPO − GRPO, last tenth | -17 | -5.0 [-5.0, -5.0] | same order |" in text
    # GRPO's three curves begin at 0.2 and end at 0.15, 0.4 and 0.65.
    assert "| tool use, last less first tenth of GRPO's steps | stagnates | +20.0 [-5.0, +45.0] | stagnates |" in text
    assert "Rows of the paper that this grid does not have: no prefix fix" in text


@pytest.mark.parametrize(
    ("overrides", "row"),
    [
        ([], paper.AXPO),
        (["method.continuations=2", "method.budget=0.5"], paper.AXPO),
        (["method.prefix_credit=false"], paper.ABLATIONS[3]),
        (["method.prefix_credit=false", "method.rank=random"], None),
        (["method.adaptive_budget=1"], None),
        (["method=grpo"], paper.GRPO),
        (["method=grpo", "method.num_rollouts=2x"], paper.RECIPES[2]),
        (["method=grpo", "method.num_rollouts=3x"], None),
        (["method=cispo"], paper.RECIPES[4]),
        (["method=tool_bonus", "tools=[python]"], paper.RECIPES[1]),
    ],
)
def test_which_row_of_the_paper_a_method_is(overrides: list[str], row: paper.Row | None) -> None:
    assert row_of(load_config(None, overrides)) is row


def test_smoothing_and_gaps() -> None:
    values = curve([[1.0, None, 3.0, 5.0], [2.0, 4.0]])
    assert values.shape == (2, 4)
    assert smooth(values, 2)[0].tolist() == [1.0, 1.0, 3.0, 4.0]
    assert smooth(values, 2)[1].tolist()[:3] == [2.0, 3.0, 4.0]
    assert dynamic(RESULTS[0], "recovered") == [None, 0.5, 0.25, 1.0]


def test_evaluations_that_not_all_seeds_have_are_left_out() -> None:
    steps, values = evaluated(RESULTS, "axpo", "pass1")
    assert steps.tolist() == [0, 2, 4]
    assert values.tolist() == [[0.2, 0.125, 0.25], [0.2, 0.25, 0.5], [0.2, 0.375, 0.75]]
    short = {**result("axpo", 4, 0.5), "evaluations": {}}
    steps, values = evaluated([*RESULTS, result("sft", 4, 0.3), short], "axpo", "pass1")
    assert steps.tolist() == [0, 4]
    assert values[3].tolist() == [0.3, 0.5]


def test_plots_of_whatever_there_is(tmp_path: Path) -> None:
    for name, results in (("some", RESULTS), ("none", [])):
        plot_dynamics(results, ["axpo", "grpo", "random"], tmp_path / f"{name}.png")
        plot_learning(results, ["axpo", "grpo", "random"], tmp_path / f"{name}_learning.png")
    assert len({path.read_bytes()[:8] for path in tmp_path.iterdir()}) == 1
    assert (tmp_path / "some.png").stat().st_size > 1.5 * (tmp_path / "none.png").stat().st_size


def test_plot_of_differences(grid: Grid, tmp_path: Path) -> None:
    plot_differences(summarise(grid, cells_of(grid), RESULTS)["pairs"], tmp_path / "some.png")
    plot_differences({}, tmp_path / "none.png")
    assert [path.name for path in tmp_path.glob("*.png")] == ["some.png"]


def test_json_has_a_line_for_each_entry_of_the_outer_levels() -> None:
    data = {"a": {"b": [1, {"c": None}], "d": {}}, "e": [{"f": 1}, 2]}
    text = as_text(data, 2)
    assert text == '{\n "a": {\n  "b": [1, {"c": null}],\n  "d": {}\n },\n "e": [\n  {"f": 1},\n  2\n ]\n}\n'
    assert json.loads(text) == data


def test_a_page_in_both_forms() -> None:
    blocks = [Heading("A & B"), Paragraph("x < y"), Table(["", "n"], [["a|b", "1"]]), Picture("p.png", "curves")]
    expected = "# A & B\n\nx < y\n\n|  | n |\n| --- | ---: |\n| a\\|b | 1 |\n\n![curves](p.png)\n"
    assert to_markdown(blocks) == expected
    page = to_html(blocks)
    assert "<title>A &amp; B</title>" in page
    assert "<p>x &lt; y</p>" in page
    assert "<td>a|b</td><td>1</td>" in page
