"""The command line: quickstart, train, resume, sft, eval, compare, diagnose, methods, plan, simulate, tools check.

A user's mistake is told in lines that begin with "error:" on stderr, and ends the command with code 2; an alarm that
stops a run ends it with code 3, Ctrl-C with code 130. Torch and transformers are imported by the commands, so that help
and config errors come at once.
"""

import asyncio
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from axpo.cli_compare import compare
from axpo.cli_diagnose import diagnose
from axpo.cli_methods import methods
from axpo.cli_plan import check_fit, plan
from axpo.cli_shared import (
    QUICKSTART,
    ConfigFile,
    Overrides,
    check_prompt,
    command,
    config_of_run,
    finish,
    free,
    load_model,
    new_run,
    prepare,
    require,
    running,
    show,
    shown,
)
from axpo.cli_simulate import simulate_command
from axpo.cli_tools import tools
from axpo.config import MINIATURE, Config, ConfigError, load_config
from axpo.launch import end_rank, end_with_parent, start, starts_others
from axpo.progress import TerminalProgress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from axpo.build import Data
    from axpo.chat import Chat
    from axpo.parallel import Ranks
    from axpo.questions import Trajectory
    from axpo.run import Run
    from axpo.tools.base import Toolbox
    from axpo.tree import RolloutTree

QUICKSTART_OUTPUT = Path("runs/quickstart")

app = typer.Typer(
    help="Reinforcement learning for tool-using vision-language agents by AXPO (arXiv 2605.28774).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    end_with_parent()
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a run must not end because a terminal lacks a character
    try:
        app(prog_name="axpo")
    except SystemExit as ended:
        end_rank(ended.code)
        raise


@app.command()
def quickstart(overrides: Overrides = None) -> None:
    """Train a tiny model with real tools: base, short SFT, AXPO.

    Needs two cores, 4 GiB and about 6 minutes, but no GPU and no download. The run folder is the first of
    runs/quickstart, runs/quickstart-2, … that is free, unless output=FOLDER is given.
    """
    given = overrides or []
    with command():
        config = load_config(QUICKSTART, [f"output={free(QUICKSTART_OUTPUT)}", *given])
        for key in ("train", "eval"):
            require(getattr(config.data, key), f"data.{key}")
        if config.parallel.processes > 1:
            raise ConfigError(
                f"parallel.processes: got {config.parallel.processes}, but axpo quickstart trains in one; must be 1"
            )
        if config.lora.rank:
            raise ConfigError(
                f"lora.rank: got {config.lora.rank}, but the quickstart's AXPO starts from its SFT, "
                "which adapters would not keep apart from what comes after; must be 0"
            )
        typer.echo(f"run folder: {config.output}\npreparing questions, tools and the model …")
        from axpo import build
        from axpo.miniature.quickstart import quickstart as run_quickstart

        chat, toolbox = prepare(config)
        data = build.load_data(config)
        run = new_run(config, "quickstart")
        model = load_model(config, run)
        with running(run), TerminalProgress() as progress:
            summary = run_quickstart(config, run, progress, model, chat, toolbox, data)
            run.end()
        show(summary)
        folder = shown(run.folder)
        typer.echo(
            f"\nIn {folder}: summary.json (this table), metrics.jsonl (every step), trees/ (all rollouts),\n"
            f"config.yaml, and the checkpoints sft/ and checkpoint/, which from_pretrained opens.\n"
            f"Next: axpo eval {folder} evaluates it again (with --checkpoint sft: its SFT start);\n"
            f"axpo train CONFIG.yaml trains a model of your own."
        )


@app.command()
def train(config_file: ConfigFile, overrides: Overrides = None) -> None:
    """Train on data.train by AXPO or GRPO.

    Evaluates on data.eval at the end, where it is given.
    """
    with command():
        config = load_config(config_file, overrides or [])
        require(config.data.train, "data.train")
        if starts_others(config):
            raise typer.Exit(start(config.parallel.processes))
        from axpo.parallel import joined

        with joined(config) as ranks:
            chat, toolbox, data = _prepare_training(config)
            run = new_run(config, "train", follows=not ranks.main)
            ranks.meet()
            _train(config, run, load_model(config, run), chat, toolbox, data, ranks)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run of axpo train.")],
) -> None:
    """Go on with a run of axpo train that was interrupted or killed.

    It goes on from its last checkpoint (train.save_every) with its own config, and ends in the same numbers as if it
    had never stopped.
    """
    with command():
        from axpo import build
        from axpo.run import FollowedRun, Run

        run = Run.reopen(folder)
        config = load_config(run.folder / "config.yaml").model_copy(update={"output": run.folder})
        if starts_others(config):
            raise typer.Exit(start(config.parallel.processes))
        from axpo.parallel import joined

        with joined(config) as ranks:
            chat, toolbox, data = _prepare_training(config)
            run = run if ranks.main else FollowedRun(run.folder)
            _train(config, run, build.load_model(config), chat, toolbox, data, ranks)


@app.command()
def sft(config_file: ConfigFile, overrides: Overrides = None) -> None:
    """Fine-tune on the trajectories of data.sft."""
    with command():
        config = load_config(config_file, overrides or [])
        require(config.data.sft, "data.sft")
        if starts_others(config):
            raise typer.Exit(start(config.parallel.processes))
        from axpo.parallel import joined

        with joined(config) as ranks:
            _sft(config, ranks)


@app.command("eval")
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    overrides: Overrides = None,
    checkpoint: Annotated[str, typer.Option(help="The checkpoint's folder in RUN.")] = "checkpoint",
) -> None:
    """Evaluate a checkpoint of a run on data.eval.

    Writes a folder RUN/eval (or RUN/eval-2, …) with the table as summary.json, the rollouts and the config.
    """
    with command():
        config = config_of_run(folder, checkpoint, overrides or [])
        require(config.data.eval, "data.eval")
        from axpo import build
        from axpo.preflight import preflight
        from axpo.workflow import run_evaluation

        chat, toolbox = prepare(config)
        questions = build.load_data(config).eval
        assert questions is not None
        check_prompt(config, chat, toolbox, questions)
        run = new_run(config, "eval")
        model = load_model(config, run)
        with running(run), TerminalProgress() as progress:
            engine = build.make_engine(config, model, chat)
            agent = build.evaluation_agent(config, engine, chat, toolbox)

            async def measure() -> dict[str, Any]:
                if config.preflight:
                    await preflight(config, model, agent)
                return await run_evaluation(config, run, progress, engine, chat, toolbox, questions, checkpoint)

            figures = asyncio.run(measure())
            finish(run, {checkpoint: figures})
            run.end()
        typer.echo(f"written to {shown(run.folder)}")


app.command()(compare)
app.command()(diagnose)
app.command()(methods)
app.command()(plan)
app.command("simulate")(simulate_command)
app.add_typer(tools, name="tools")


def _prepare_training(config: Config) -> "tuple[Chat, Toolbox, Data]":
    from axpo import build

    chat, toolbox = prepare(config)
    check_fit(config)
    data = build.load_data(config)
    for questions in (data.train, data.eval):
        check_prompt(config, chat, toolbox, questions or [])
    return chat, toolbox, data


def _train(
    config: Config,
    run: "Run",
    model: "PreTrainedModel",
    chat: "Chat",
    toolbox: "Toolbox",
    data: "Data",
    ranks: "Ranks",
) -> None:
    """Train from where the run stands to its end."""
    from axpo.workflow import run_training

    ranks.meet()  # each has its model
    with running(run), _progress(ranks) as progress:
        figures = asyncio.run(run_training(config, run, progress, model, chat, toolbox, data, ranks=ranks))
        if figures:
            run.save_summary({config.method.name: figures})
        run.end()
    if figures and ranks.main:
        show({config.method.name: figures})
    if ranks.main:
        typer.echo(f"run folder: {shown(run.folder)}")


def _sft(config: Config, ranks: "Ranks") -> None:
    from axpo import build
    from axpo.miniature.quickstart import teach
    from axpo.sft import check_calls, check_lengths
    from axpo.workflow import run_sft

    chat, toolbox = prepare(config, described=config.data.sft != MINIATURE)
    check_fit(config, tuning=True)
    trees = None
    if config.data.sft != MINIATURE:
        trees = [_trajectory_tree(each, chat, toolbox) for each in build.load_sft_data(config)]
        check_calls(trees, toolbox.names)
        check_lengths(trees, config.rollout.max_context)
    elif missing := {"zoom", "python", "search"}.difference(map(str, config.tools.names)):
        raise ConfigError(f"tools.names: the teacher of data.sft={MINIATURE} needs {', '.join(sorted(missing))}")
    run = new_run(config, "sft", follows=not ranks.main)
    ranks.meet()
    model = load_model(config, run)
    ranks.meet()

    async def learn(trees: "list[RolloutTree] | None") -> None:
        if trees is None:
            with ranks.together():
                trees = ranks.of_main(await teach(chat, toolbox, progress, config.seed) if ranks.main else [])
        await run_sft(config, run, progress, model, chat, trees, ranks=ranks)

    with running(run), _progress(ranks) as progress:
        asyncio.run(learn(trees))
        run.end()
    if ranks.main:
        typer.echo(f"run folder: {shown(run.folder)}")


def _progress(ranks: "Ranks") -> TerminalProgress:
    return TerminalProgress(None if ranks.main else Console(quiet=True))


def _trajectory_tree(trajectory: "Trajectory", chat: "Chat", toolbox: "Toolbox") -> "RolloutTree":
    from axpo.chat import ChatError
    from axpo.sft import imitate, trajectory_tree

    try:
        tree = trajectory_tree(trajectory, chat, toolbox.schemas)
    except ChatError as error:
        raise ChatError(f"trajectory {trajectory.question.id}: {error}") from error
    return imitate(tree, tree.leaves())
