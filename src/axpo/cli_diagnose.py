"""`axpo diagnose`: whether a policy has the Thinking-Acting Gap, and whether resampling could repair it."""

import asyncio
import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from axpo.cli_shared import (
    QUICKSTART,
    Overrides,
    check_prompt,
    checkpoint_of_run,
    command,
    free,
    load_model,
    new_run,
    prepare,
    refuse,
    running,
    shown,
)
from axpo.config import MINIATURE, MINIATURE_SFT, Config, ConfigError, load_config
from axpo.progress import NOTHING, WIDTH, TerminalProgress, percent

OUTPUT = Path("runs/diagnose")  # of a policy that is no run


def diagnose(
    policy: Annotated[
        str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="Run folder, folder of a checkpoint, or 'miniature_sft'.")
    ],
    data: Annotated[str, typer.Argument(metavar="DATA", help="File of questions, or 'miniature'.")],
    overrides: Overrides = None,
    checkpoint: Annotated[str, typer.Option(help="The checkpoint's folder in RUN.")] = "checkpoint",
    questions: Annotated[int, typer.Option(help="Questions at the most; 0: all.")] = 100,
    continuations: Annotated[int, typer.Option(help="Continuations of each failed prefix.")] = 16,
    prefixes: Annotated[int, typer.Option(help="Failed prefixes that are continued at the most; 0: all.")] = 64,
) -> None:
    """Measure the Thinking-Acting Gap of a policy.

    The three measurements of the paper: how often it calls a tool, how often all rollouts of a question that do are
    wrong, and how its calls diverge where a failed prefix is continued many times; and whether the confidence by which
    AXPO chooses prefixes tells what the exact entropy would. It rolls out as training does (rollout.rollouts of each
    question); tools and limits are those of RUN, for a checkpoint they are given: tools.names=[zoom,python].

    Of a run that has trained, it also tells what resampling found there that fresh rollouts would not have.

    Writes a folder RUN/diagnose (or RUN/diagnose-2, …; runs/diagnose for a checkpoint; output=FOLDER) with the table
    and all it follows from as diagnose.json, the plots gap.png and divergence.png, the rollouts and the config.
    """
    with command():
        for option, value, least in (
            ("--questions", questions, 0),
            ("--continuations", continuations, 2),
            ("--prefixes", prefixes, 0),
        ):
            if value < least:
                raise ConfigError(f"{option}: got {value}, must be at least {least}")
        config = _config(policy, checkpoint, data, overrides or [])
        from axpo import build
        from axpo.diagnostics.divergence import Draws, Effort, draw, family_figures, figures
        from axpo.diagnostics.plots import plot_divergence, plot_gap
        from axpo.preflight import preflight

        chat, toolbox = prepare(config)
        asked = build.load_probes(config, questions)
        check_prompt(config, chat, toolbox, asked)
        run = new_run(config, "diagnose")
        model = load_model(config, run)
        effort = Effort(config.rollout.rollouts, continuations, prefixes)
        threshold = config.method.threshold
        with running(run), TerminalProgress() as progress:
            agent = build.probing_agent(config, build.make_engine(config, model, chat, entropies=True), chat, toolbox)

            async def measure() -> Draws:
                if config.preflight:
                    await preflight(config, model, agent)
                return await draw(agent, asked, effort, threshold, config.seed, progress)

            draws = asyncio.run(measure())
            run.save_trees("diagnose", draws.trees, config.train.save_images)
            families = {question.id: question.family for question in asked}
            found = figures(draws, threshold)
            found["families"] = family_figures(draws.trees, families, threshold)
            found["coverage"] = _coverage(Path(os.path.expanduser(policy)), threshold)
            run.save_summary({"model": config.model, "data": data, **found}, "diagnose")
            plot_gap(found, run.folder / "gap.png")
            plot_divergence(found, run.folder / "divergence.png")
            run.end()
        console = Console()
        console.print(_table(found, continuations), width=min(WIDTH, console.width))
        if len(found["families"]) > 1:
            console.print(_families(found["families"]), width=min(WIDTH, console.width))
        for line in _remarks(found):
            typer.echo(textwrap.fill(line, WIDTH))
        typer.echo(f"written to {shown(run.folder)}")


def _coverage(folder: Path, threshold: float) -> dict[str, Any] | None:
    """What resampling found in the training steps of a run; None where it has none that can be read."""
    from axpo.diagnostics.coverage import run_coverage
    from axpo.tree import TreeError

    try:
        return dict(run_coverage(folder, threshold))
    except TreeError:
        return None


def _config(policy: str, checkpoint: str, data: str, overrides: Sequence[str]) -> Config:
    """The config with which the policy is rolled out on the data into a new folder."""
    reason = "RUN_OR_CHECKPOINT is the model, DATA the questions"
    refuse(overrides, {"model": reason, "data": reason})
    folder = Path(os.path.expanduser(policy))
    file, model, output = None, policy, OUTPUT
    if (folder / "config.yaml").is_file():
        file, model = folder / "config.yaml", str(checkpoint_of_run(folder, checkpoint).absolute())
        output = folder.absolute() / "diagnose"
    elif policy == MINIATURE_SFT:
        file = QUICKSTART
    elif policy != MINIATURE and not (folder / "config.json").is_file():
        raise ConfigError(
            f"RUN_OR_CHECKPOINT: got {policy!r}, must be a run folder (it holds config.yaml), "
            f"the folder of a checkpoint (config.json), {MINIATURE!r} or {MINIATURE_SFT!r}"
        )
    sources = [f"data.train={json.dumps(data)}", "data.eval=", "data.sft="]
    given = [f"output={json.dumps(str(free(output)))}", *overrides, f"model={json.dumps(model)}", *sources]
    config = load_config(file, given)
    if not config.tools.names:
        raise ConfigError(
            "tools.names: got nothing, but how a policy acts shows only where it has tools; "
            "must be those that it was trained with, such as tools.names=[zoom,python]"
        )
    return config


def _table(found: Mapping[str, Any], continuations: int) -> Table:
    """The measurements beside those of the paper, at most 80 columns wide."""
    table = Table()
    for title, justify in (("", "left"), ("here", "right"), ("of", "right"), ("paper", "right")):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    rollouts, calls = f"{found['decided']} rollouts", f"{found['calls']} calls"
    prefixes, questions = f"{found['measured']} prefixes", f"{found['questions_measured']} questions"
    table.add_row("Under-attempt")
    table.add_row("  rollouts that call a tool", percent(found["tool_use"]), rollouts, "20-35%")
    table.add_row("Accuracy")
    table.add_row("  rollouts with a tool call", percent(found["accuracy_tool"]))
    table.add_row("  without", percent(found["accuracy_no_tool"]))
    table.add_row("All wrong")
    for key, name, paper in (("tool", "with a tool call", "40%"), ("no_tool", "without", "25%")):
        counted = f"{found[f'questions_{key}']} questions"
        table.add_row(f"  questions, {name}", percent(found[f"all_wrong_{key}"]), counted, paper)
    table.add_row("Divergence")
    table.add_row(f"  clusters of {continuations} continuations", _number(found["clusters"], 1), prefixes, "2.9-3.4")
    table.add_row("  collapsed into one cluster", percent(found["collapsed"]), prefixes, "30%")
    table.add_row("  recovered", percent(found["recovered"]), prefixes, NOTHING)
    table.add_row("  recovered", percent(found["recovered_questions"]), questions, "15%")
    table.add_row("Uncertainty (1 − confidence) and entropy")
    table.add_row("  Pearson correlation", _number(found["pearson"], 3), calls, "0.843")
    table.add_row("  Spearman correlation", _number(found["spearman"], 3), calls, "0.835")
    return table


def _families(families: Mapping[str, Mapping[str, Any]]) -> Table:
    """The same of each family of questions."""
    table = Table(title="Rollouts that call a tool, those that are right, and questions all wrong")
    table.add_column("family")
    for title in ("calls", "right with", "without", "all wrong with", "without"):
        table.add_column(title, justify="right")
    for family, shares in families.items():
        keys = ("tool_use", "accuracy_tool", "accuracy_no_tool", "all_wrong_tool", "all_wrong_no_tool")
        table.add_row(family, *(percent(shares[key]) for key in keys))
    return table


def _remarks(found: Mapping[str, Any]) -> list[str]:
    """What the table does not tell."""
    remarks = []
    if found["continued"] < found["failed"]:
        remarks.append(f"{found['continued']} of {found['failed']} failed prefixes were continued (--prefixes)")
    if not found["calls"]:
        remarks.append("no rollout called a tool, so nothing could be continued")
    elif not found["failed"]:
        remarks.append("no question failed in all its rollouts with a call, so nothing could be continued")
    coverage = found["coverage"]
    if coverage and coverage["resamplings"] and coverage["fresh_held_out"] is not None:
        remarks.append(
            f"in training, {_share(coverage, 'resampled')} of {coverage['resamplings']} resamplings "
            f"found a right call; as many fresh rollouts: about {_share(coverage, 'fresh_held_out')} "
            "(axpo/diagnostics/coverage.py)"
        )
    if found["void"]:
        remarks.append(f"{found['void']} rollouts are void: they count nowhere")
    return remarks


def _share(coverage: Mapping[str, Any], name: str) -> str:
    error = coverage[f"{name}_error"]
    return percent(coverage[name]) + ("" if error is None else f" ± {100 * error:.1f}")


def _number(value: float | None, decimals: int) -> str:
    return NOTHING if value is None else f"{value:.{decimals}f}"
