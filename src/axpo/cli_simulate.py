"""`axpo simulate`: the Thinking-Acting Gap in a bandit, by every method that it can show."""

import json
import math
import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from rich.console import Console

from axpo.cli_shared import command, free, shown
from axpo.config import ConfigError
from axpo.config_errors import describe
from axpo.options import AbsolutePath, Integer, MethodConfig, Real, Section
from axpo.progress import TerminalProgress
from axpo.simulation import Curves, Setting, simulate
from axpo.simulation_report import Cell, Learned, curves_tables, phase_table, plot_curves, plot_phase

OUTPUT = Path("runs/simulate")
WIDTH = 80

ABLATIONS: dict[str, dict[str, Any]] = {
    "prefix_fix=false": {"prefix_fix": False},
    "resample_no_tool=true": {"resample_no_tool": True},
    "rank=random": {"rank": "random"},
    "prefix_credit=false": {"prefix_credit": False},
    "separate_groups=false": {"separate_groups": False},
}
# What `method=` takes, and the options that each stands for.
VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo"},
    "grpo_2x": {"name": "grpo", "num_rollouts": "2x"},
    "axpo": {"name": "axpo"},
    **{name: {"name": "axpo", **options} for name, options in ABLATIONS.items()},
    "rank=entropy": {"name": "axpo", "rank": "entropy"},
    "tool_bonus": {"name": "tool_bonus"},
    "tool_penalty": {"name": "tool_penalty"},
}
CANNOT = {
    "arpo": "it branches after observations, and the bandit has none",
    "rltf": "it learns from critiques, and the bandit has none",
    "cispo": "it clips ratios of probability, which are all 1 in the bandit",
}

# The phase diagram: GRPO against AXPO.
PHASE_P_THINK = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
PHASE_SPEED = (0.5, 1.0, 2.0, 4.0, 8.0)
PHASE_SEEDS = 2


def _split(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _once(values: list[float]) -> list[float]:
    return list(dict.fromkeys(values))


def _variants(names: list[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        if name in CANNOT:
            raise ValueError(f"but {name} cannot be shown here: {CANNOT[name]}; {_allowed_methods()}")
        if name not in VARIANTS and name != "ablations":
            raise ValueError(_allowed_methods())
        found += ABLATIONS if name == "ablations" else [name]
    return list(dict.fromkeys(found))


def _allowed_methods() -> str:
    return f"must be some of {', '.join(VARIANTS)}, or ablations for the five of axpo, with commas between them"


Probability = Annotated[Real, Field(ge=0, lt=1)]


class SimulationConfig(Section):
    """What `axpo simulate` takes as KEY=VALUE."""

    method: Annotated[list[str], BeforeValidator(_split), AfterValidator(_variants)] = Field(
        default=["grpo", "grpo_2x", "axpo"]
    )
    """Methods and ablations of axpo, with commas between them. Default: grpo,grpo_2x,axpo."""
    p_think: Annotated[list[Probability], BeforeValidator(_split), AfterValidator(_once)] = Field(default=[0.3, 0.4])
    """How often thinking is right, with commas between several. Default: 0.3,0.4."""
    speed: Real = Field(default=1.0, gt=0, le=100)
    """How fast acting is learned: multiplies the learning rate of the cells; at most 100. Default: 1."""
    steps: Integer = Field(default=400, ge=1)
    """Training steps. Default: 400."""
    seeds: Integer = Field(default=12, ge=1)
    """Policies that are trained for each curve. Default: 12."""
    questions: Integer = Field(default=8, ge=1)
    """Questions a step (B). Default: 8."""
    rollouts: Integer = Field(default=8, ge=2, le=64)
    """Rollouts of each question (N), at most 64. Default: 8 (paper)."""
    budget: Real = Field(default=0.25, gt=0)
    """Extra rollouts a step, as a share (r) of the B·N rollouts. Default: 0.25 (paper)."""
    continuations: Integer = Field(default=4, ge=2)
    """Continuations of one prefix (K). Default: 4 (paper)."""
    deviation: Literal["sample", "population", "none"] = "sample"
    """What a group's advantages are divided by, as `method.deviation` of a run. Default: sample."""
    tool_reward: Real = Field(default=0.2, ge=0)
    """What tool_bonus adds for acting and tool_penalty takes away. Default: 0.2."""
    phase: bool = True
    """Whether the phase diagram is drawn too. Default: true."""
    seed: Integer = Field(default=0, ge=0)
    """Decides every random number. Default: 0."""
    processes: Integer = Field(default=2, ge=1)
    """Processes that share the work; the figures do not depend on it. Default: 2."""
    output: AbsolutePath | None = None
    """The folder to write to. Default: the first of runs/simulate, runs/simulate-2, … that is free."""

    def setting(self, variant: str, p_think: float, speed: float, seeds: int) -> Setting:
        """One of the settings that are simulated."""
        given = {key: getattr(self, key) for key in ("budget", "continuations", "deviation", "tool_reward")}
        return Setting(
            MethodConfig(**given, **VARIANTS[variant]),
            p_think,
            speed,
            self.steps,
            self.questions,
            self.rollouts,
            tuple((self.seed, number) for number in range(seeds)),
        )


def load(overrides: Sequence[str]) -> SimulationConfig:
    """The options of KEY=VALUE texts. Raises ConfigError with one line for each problem."""
    given = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {override!r}: must be KEY=VALUE, such as p_think=0.3,0.5")
        given[key.strip()] = text
    try:
        config = SimulationConfig.model_validate(given)
    except ValidationError as error:
        raise ConfigError("\n".join(describe(error, SimulationConfig))) from error
    resampling = [name for name in ("axpo", *config.method) if VARIANTS[name]["name"] == "axpo"]
    if (config.phase or len(resampling) > 1) and not config.setting("axpo", 0, 1, 1).budget:
        drawn = config.questions * config.rollouts
        smallest = math.ceil(config.continuations / drawn * 1e6) / 1e6
        raise ConfigError(
            f"budget: got {config.budget:g}, so nothing can ever be resampled: r·B·N = {config.budget:g}·"
            f"{config.questions}·{config.rollouts} = {config.budget * drawn:g} extra rollouts a step < continuations "
            f"= {config.continuations}; the smallest budget that works is {smallest:g}"
        )
    return config


def simulate_command(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Such as method=grpo,axpo,ablations p_think=0.3,0.5 speed=4."),
    ] = None,
) -> None:
    """Show the gap and its repair in a bandit, without a model.

    Trains GRPO, GRPO with twice the rollouts and AXPO (or method=NAMES) in some 20 seconds; prints and plots their
    learning curves, and where AXPO is needed, where it only helps and where nothing does. docs/simulate.md explains it.
    """
    with command():
        config = load(overrides or [])
        folder = config.output or free(OUTPUT.absolute())
        _make(folder)
        started = time.perf_counter()
        learned, cells = run(config)
        console = Console()
        width = min(WIDTH, console.width)
        for renderable in curves_tables(learned, config.steps):
            console.print(renderable, width=width)
        plot_curves(learned, folder / "simulate.png")
        if cells:
            console.print(phase_table(cells, config.steps), width=width)
            plot_phase(cells, folder / "phase.png")
        figures = {
            "config": config.model_dump(mode="json", exclude={"output", "processes"}),
            "curves": [each.figures() for each in learned],
            "phase": [cell.figures() for cell in cells],
        }
        (folder / "simulate.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        seconds = time.perf_counter() - started
        typer.echo(
            f"In {shown(folder)}: simulate.json, {'phase.png, ' if cells else ''}simulate.png ({seconds:.0f} s)."
        )


def run(config: SimulationConfig) -> tuple[list[Learned], list[Cell]]:
    """Simulate all that is asked for: the curves, and the cells of the phase diagram."""
    drawn = [(name, p_think, config.speed) for p_think in config.p_think for name in config.method]
    places = list(product(PHASE_P_THINK, PHASE_SPEED)) if config.phase else []
    settings = [config.setting(*each, config.seeds) for each in drawn]
    pairs = [(name, *place) for place in places for name in ("grpo", "axpo")]
    settings += [config.setting(*each, PHASE_SEEDS) for each in pairs]
    learned = []
    with TerminalProgress() as progress:
        progress.stage("simulation", len(settings))
        for each, curves in zip([*drawn, *pairs], _simulated(settings, config.processes), strict=True):
            learned.append(Learned(*each, curves))
            progress.step({})
    of_phase = learned[len(drawn) :]
    cells = [Cell(*place, *two) for place, *two in zip(places, of_phase[::2], of_phase[1::2], strict=True)]
    return learned[: len(drawn)], cells


def _simulated(settings: Sequence[Setting], processes: int) -> Iterator[Curves]:
    """The curves of each setting, in order."""
    if processes == 1:
        yield from map(simulate, settings)
        return
    with multiprocessing.get_context("spawn").Pool(min(processes, len(settings)), _ignore_interrupt) as pool:
        yield from pool.imap(simulate, settings)


def _ignore_interrupt() -> None:
    """Ctrl-C ends the command, which ends its processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"output: {folder} is not empty; must be a new folder, so that nothing is overwritten")
    except OSError as error:
        raise ConfigError(f"output: {folder} cannot be written: {error.strerror}") from error
