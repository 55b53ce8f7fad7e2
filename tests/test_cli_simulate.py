"""`axpo simulate` through its real entry."""

import json
import math
from functools import partial
from pathlib import Path

import commands
import numpy as np
import PIL.Image
import pytest

from axpo import cli_simulate
from axpo.cli_simulate import ABLATIONS, VARIANTS, load
from axpo.simulation import Curves
from axpo.simulation_report import BARS, Cell, Learned, bars

TINY = ["steps=4", "seeds=2", "questions=4", "processes=1"]


axpo = partial(commands.axpo, "simulate")
mistake = partial(commands.mistake, "simulate")


@pytest.fixture
def small_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_simulate, "PHASE_P_THINK", (0.2, 0.5))
    monkeypatch.setattr(cli_simulate, "PHASE_SPEED", (1.0, 4.0))
    monkeypatch.setattr(cli_simulate, "PHASE_SEEDS", 1)


@pytest.mark.usefixtures("small_phase")
def test_it_prints_and_writes_curves_and_the_phase_diagram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "simulate").mkdir(parents=True)
    (tmp_path / "runs" / "simulate" / "simulate.json").touch()
    result = axpo(*TINY, "method=grpo, axpo,ablations, tool_bonus")
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert max(map(len, result.stdout.splitlines())) <= 80
    for told in ("Thinking is right in 30%", "Thinking is right in 40%", "p_think", "runs/simulate-2", *ABLATIONS):
        assert told in result.stdout
    folder = tmp_path / "runs" / "simulate-2"
    assert {path.name for path in folder.iterdir()} == {"simulate.json", "simulate.png", "phase.png"}
    for picture in folder.glob("*.png"):
        assert len(np.unique(np.asarray(PIL.Image.open(picture).convert("L")))) > 10
    figures = json.loads((folder / "simulate.json").read_text())
    assert figures["config"]["method"] == ["grpo", "axpo", *ABLATIONS, "tool_bonus"]
    assert len(figures["curves"]) == 2 * 8
    first = figures["curves"][0]
    assert (first["method"], first["p_think"], first["steps"]) == ("grpo", 0.3, [0, 1, 2, 3, 4])
    assert first["tool_use"][0] == pytest.approx(0.3)
    assert np.mean(first["tool_use_of_seeds"]) == pytest.approx(first["tool_use"][-1], abs=1e-4)
    assert [(cell["p_think"], cell["speed"]) for cell in figures["phase"]] == [(0.2, 1), (0.2, 4), (0.5, 1), (0.5, 4)]


@pytest.mark.usefixtures("small_phase")
def test_the_figures_do_not_depend_on_the_number_of_processes(tmp_path: Path):
    written = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        assert axpo(*TINY, f"processes={processes}", f"output={folder}").exit_code == 0
        written.append((folder / "simulate.json").read_text())
    assert written[0] == written[1]
    assert axpo(*TINY, "phase=false", "seed=1", f"output={tmp_path / 'other'}").exit_code == 0
    assert json.loads((tmp_path / "other" / "simulate.json").read_text())["phase"] == []


def test_every_option_reaches_the_settings():
    given = "speed=2 steps=9 questions=5 rollouts=6 budget=0.5 continuations=3 deviation=none tool_reward=0.1 seed=3"
    config = load(given.split())
    setting = config.setting("tool_bonus", 0.6, config.speed, 2)
    assert (setting.p_think, setting.speed, setting.steps, setting.questions, setting.rollouts) == (0.6, 2, 9, 5, 6)
    assert setting.seeds == ((3, 0), (3, 1))
    options = setting.options
    assert (options.budget, options.continuations, options.deviation, options.tool_reward) == (0.5, 3, "none", 0.1)
    assert load(["p_think=0, 0.5,0"]).p_think == [0, 0.5]
    assert config.setting("grpo_2x", 0.6, 1, 1).size == 12
    for name, options in VARIANTS.items():
        found = load([f"method={name}"]).setting(name, 0.3, 1, 1).options
        assert {key: getattr(found, key) for key in options} == options


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("method=grop", "error: method: got 'grop', must be some of grpo, grpo_2x, axpo, prefix_fix=false, "),
        ("method=", "must be some of grpo, "),
        ("method=grpo,arpo", "but arpo cannot be shown here: it branches after observations, and the bandit has none"),
        ("method=rltf", "but rltf cannot be shown here: it learns from critiques, and the bandit has none"),
        ("method=cispo", "but cispo cannot be shown here: it clips ratios"),
        ("p_think=0.3,1", "error: p_think[1]: got '1', must be less than 1"),
        ("p_think=", "error: p_think[0]: got '', must be a valid number"),
        ("rollouts=65", "error: rollouts: got '65', must be less than or equal to 64"),
        ("steps=0", "error: steps: got '0', must be greater than or equal to 1"),
        ("sped=2", "error: sped: unknown key -> did you mean speed?"),
        ("n=4", "error: n: unknown key"),
        ("axpo", "error: override 'axpo': must be KEY=VALUE, such as p_think=0.3,0.5"),
        (
            "budget=0.05",
            "error: budget: got 0.05, so nothing can ever be resampled: r·B·N = 0.05·8·8 = 3.2 extra rollouts a step "
            "< continuations = 4; the smallest budget that works is 0.0625",
        ),
        ("output=.", "is not empty; must be a new folder"),
        ("output=/proc/simulate", "error: output: /proc/simulate cannot be written"),
        ("output=file/simulate", "cannot be written: Not a directory"),
    ],
)
def test_a_wrong_value_is_told_at_once(override: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(cli_simulate, "run", lambda config: pytest.fail("it was simulated"))
    assert told in mistake(override)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_budget_for_nothing_is_no_mistake_where_nothing_resamples(tmp_path: Path):
    assert load(["budget=0.05", "method=grpo", "phase=false"]).budget == 0.05


# The report -----------------------------------------------------------------------------------------------------------


def learned(name: str, *accuracy: float, p_think: float = 0.4) -> Learned:
    """Two seeds, of which the mean is `accuracy`, at steps 0, 10, 20, …"""
    values = np.array([accuracy, accuracy]) + np.array([[0.01], [-0.01]])
    return Learned(name, p_think, 1.0, Curves(np.arange(len(accuracy)) * 10, values, values, values))


@pytest.mark.parametrize(
    ("grpo", "axpo", "verdict", "text"),
    [
        ((0.3, 0.4, 0.4), (0.3, 0.54, 0.56), "needed", "needed"),
        ((0.3, 0.4, 0.5, 0.55), (0.3, 0.8, 0.9, 0.9), "helps", "3.0x"),
        ((0.3, 0.8), (0.3, 0.8), "alike", "alike"),
        ((0.3, 0.8), (0.3, 0.4), "alike", "alike"),
        ((0.3, 0.54), (0.3, 0.54), "nothing", "nothing"),
    ],
)
def test_the_verdict_on_a_place_of_the_phase_diagram(
    grpo: tuple[float, ...], axpo: tuple[float, ...], verdict: str, text: str
):
    """A quarter of the way from never acting, 0.4, to always right is 0.55."""
    cell = Cell(0.4, 1.0, learned("grpo", *grpo), learned("axpo", *axpo))
    assert (cell.verdict, cell.text) == (verdict, text)
    assert math.isnan(cell.sooner) == (verdict in ("needed", "nothing") or axpo[-1] < 0.55)


def test_bars_go_from_0_to_1():
    values = np.array([np.linspace(0, 1, 23)] * 2)
    line = bars(values)
    assert (line[0], line[-1], len(line)) == (BARS[0], BARS[-1], 12)
    assert list(line) == sorted(line)
