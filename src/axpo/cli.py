"""The command line: quickstart, train, sft, eval.

A user's mistake is told in lines that begin with "error:" on stderr, and ends the command with code 2; Ctrl-C ends it
with code 130. Torch and transformers are imported by the commands, so that help and config errors come at once.
"""

import asyncio
import io
import itertools
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from axpo.config import BUILT_IN_TOOLS, MINIATURE, Config, ConfigError, load_config
from axpo.progress import TerminalProgress, summary_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from axpo.chat import Chat
    from axpo.questions import Question, Trajectory
    from axpo.run import Run
    from axpo.tools.base import Toolbox
    from axpo.tree import RolloutTree

QUICKSTART = Path(__file__).parent / "miniature" / "quickstart.yaml"
QUICKSTART_OUTPUT = Path("runs/quickstart")

app = typer.Typer(
    help="Reinforcement learning for tool-using vision-language agents by AXPO (arXiv 2605.28774).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; axpo/config.py explains every key.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Config values, such as train.learning_rate=1e-6."),
]


def main() -> None:
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a run must not end because a terminal lacks a character
    app(prog_name="axpo")


@app.command()
def quickstart(overrides: Overrides = None) -> None:
    """Train a tiny model with real tools: base, short SFT, AXPO.

    Needs two cores, 4 GiB and about 6 minutes, but no GPU and no download. The run folder is the first of
    runs/quickstart, runs/quickstart-2, … that is free, unless output=FOLDER is given.
    """
    given = overrides or []
    with _command():
        config = load_config(QUICKSTART, [f"output={_free(QUICKSTART_OUTPUT)}", *given])
        for key in ("train", "eval"):
            _require(getattr(config.data, key), f"data.{key}")
        typer.echo(f"run folder: {config.output}\npreparing questions, tools and the model …")
        from axpo import build
        from axpo.miniature.quickstart import quickstart as run_quickstart

        chat, toolbox = _prepare(config)
        data = build.load_data(config)
        run = _new_run(config)
        model = _load_model(config, run)
        with _running(run), TerminalProgress() as progress:
            summary = run_quickstart(config, run, progress, model, chat, toolbox, data)
        _show(summary)
        folder = _shown(run.folder)
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
    with _command():
        config = load_config(config_file, overrides or [])
        _require(config.data.train, "data.train")
        from axpo import build
        from axpo.workflow import run_training

        chat, toolbox = _prepare(config)
        data = build.load_data(config)
        for questions in (data.train, data.eval):
            _check_prompt(config, chat, toolbox, questions or [])
        run = _new_run(config)
        model = _load_model(config, run)
        with _running(run), TerminalProgress() as progress:
            figures = asyncio.run(run_training(config, run, progress, model, chat, toolbox, data))
        if figures:
            _finish(run, {config.method.name: figures})
        typer.echo(f"run folder: {_shown(run.folder)}")


@app.command()
def sft(config_file: ConfigFile, overrides: Overrides = None) -> None:
    """Fine-tune on the trajectories of data.sft."""
    with _command():
        config = load_config(config_file, overrides or [])
        _require(config.data.sft, "data.sft")
        from axpo import build
        from axpo.miniature.quickstart import teach
        from axpo.workflow import run_sft

        chat, toolbox = _prepare(config)
        trees = None
        if config.data.sft != MINIATURE:
            trees = [_trajectory_tree(each, chat, toolbox) for each in build.load_sft_data(config)]
        elif missing := set(BUILT_IN_TOOLS) - set(config.tools.names):
            raise ConfigError(f"tools.names: the teacher of data.sft={MINIATURE} needs {', '.join(sorted(missing))}")
        run = _new_run(config)
        model = _load_model(config, run)
        with _running(run), TerminalProgress() as progress:
            trees = trees or asyncio.run(teach(chat, toolbox, progress, config.seed))
            run_sft(config, run, progress, model, chat, trees)
        typer.echo(f"run folder: {_shown(run.folder)}")


@app.command("eval")
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    overrides: Overrides = None,
    checkpoint: Annotated[str, typer.Option(help="The checkpoint's folder in RUN.")] = "checkpoint",
) -> None:
    """Evaluate a checkpoint of a run on data.eval.

    Writes a folder RUN/eval (or RUN/eval-2, …) with the table as summary.json, the rollouts and the config.
    """
    with _command():
        config = _config_of_run(folder, checkpoint, overrides or [])
        _require(config.data.eval, "data.eval")
        from axpo import build
        from axpo.workflow import run_evaluation

        chat, toolbox = _prepare(config)
        questions = build.load_data(config).eval
        assert questions is not None
        _check_prompt(config, chat, toolbox, questions)
        run = _new_run(config)
        model = _load_model(config, run)
        with _running(run), TerminalProgress() as progress:
            engine = build.make_engine(config, model, chat)
            evaluation = run_evaluation(config, run, progress, engine, chat, toolbox, questions, checkpoint)
            figures = asyncio.run(evaluation)
        _finish(run, {checkpoint: figures})
        typer.echo(f"written to {_shown(run.folder)}")


# What the commands share ----------------------------------------------------------------------------------------------


@contextmanager
def _command() -> Iterator[None]:
    """Tell a user's mistakes and interruptions without a traceback, and show the package's warnings."""
    handler = _Warnings()
    logger = logging.getLogger("axpo")
    logger.addHandler(handler)
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None
    except ValueError as error:
        if not isinstance(error, ConfigError) and not _is_mistake(error):
            raise
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        raise typer.Exit(2) from None
    finally:
        logger.removeHandler(handler)


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(f"warning: {record.getMessage()}", err=True)


def _is_mistake(error: ValueError) -> bool:
    from axpo.chat import ChatError
    from axpo.policy import PolicyError
    from axpo.questions import DataError
    from axpo.tools.base import ToolError
    from axpo.tree import TreeError

    return isinstance(error, ChatError | DataError | PolicyError | ToolError | TreeError)


@contextmanager
def _running(run: "Run") -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"interrupted: the run so far is in {_shown(run.folder)}", err=True)
        raise typer.Exit(130) from None


def _require(value: object, key: str) -> None:
    if value is None:
        raise ConfigError(
            f"{key}: got nothing, but this command needs it; must be 'miniature' or a file, such as {key}=FILE.jsonl"
        )


def _prepare(config: Config) -> "tuple[Chat, Toolbox]":
    """Check what can be checked without data and weights; returns the chat and the tools."""
    import torch
    from transformers.utils import logging as transformers_logging

    from axpo import build
    from axpo.chat import ChatError

    # The loading bars and advice of these libraries are for people who call them themselves.
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", module=r"(torch|transformers)\b")
    kind, _, index = config.device.partition(":")
    gpus = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(index or 0) >= gpus:
        raise ConfigError(f"device: got {config.device!r}, but torch {torch.__version__} finds {gpus} such devices")
    try:
        chat = build.load_chat(config)
    except ChatError as error:
        raise ChatError(f"model {config.model}: {error}") from error
    return chat, build.load_toolbox(config)


def _check_prompt(config: Config, chat: "Chat", toolbox: "Toolbox", questions: "Sequence[Question]") -> None:
    """Render one prompt, that of the question with the most images: what is wrong with all prompts shows there."""
    from axpo.chat import ChatError

    for question in sorted(questions, key=lambda q: -len(q.images))[:1]:
        try:
            ids, images = chat.prompt(question.messages, question.images, toolbox.schemas)
        except ChatError as error:
            raise ChatError(f"question {question.id}: {error}") from error
        for key, limit, taken, unit in (
            ("max_context", config.rollout.max_context - 1, len(ids), "tokens"),
            ("max_images", config.rollout.max_images, len(images), "images"),
        ):
            if taken > limit:
                raise ConfigError(
                    f"rollout.{key}: got {getattr(config.rollout, key)}, "
                    f"but the prompt of question {question.id} alone has {taken} {unit}"
                )


def _trajectory_tree(trajectory: "Trajectory", chat: "Chat", toolbox: "Toolbox") -> "RolloutTree":
    from axpo.chat import ChatError
    from axpo.sft import imitate, trajectory_tree

    try:
        tree = trajectory_tree(trajectory, chat, toolbox.schemas)
    except ChatError as error:
        raise ChatError(f"trajectory {trajectory.question.id}: {error}") from error
    return imitate(tree, tree.leaves())


def _config_of_run(folder: Path, checkpoint: str, overrides: Sequence[str]) -> Config:
    """The config with which a run's checkpoint is evaluated into a new folder of that run."""
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is not a run folder: it holds no config.yaml")
    place = folder / checkpoint
    if not place.is_dir():
        others = sorted(path.parent.name for path in folder.glob("*/config.json"))
        raise ConfigError(f"{folder} holds no checkpoint {checkpoint!r}; it holds {', '.join(others) or 'none'}")
    for key in ("model", "output"):
        if any(override.partition("=")[0].strip() == key for override in overrides):
            raise ConfigError(f"{key}: cannot be given here; the model is RUN's checkpoint, the output a folder in RUN")
    config = load_config(folder / "config.yaml", overrides)
    new = {
        "model": str(place.absolute()),
        "output": _free(folder.absolute() / "eval"),
        "data": config.data.model_copy(update={"train": None}),
    }
    return config.model_copy(update=new)


def _new_run(config: Config) -> "Run":
    from axpo.run import Run

    try:
        return Run(config)
    except OSError as error:
        raise ConfigError(f"output: {config.output} cannot be written: {error.strerror}") from error


def _load_model(config: Config, run: "Run") -> "PreTrainedModel":
    from axpo import build

    try:
        return build.load_model(config)
    except BaseException:
        shutil.rmtree(run.folder)  # nothing has run: the folder would only be in the way of the next attempt
        raise


def _free(folder: Path) -> Path:
    """The folder, or the first of FOLDER-2, FOLDER-3, … where nothing lies yet."""
    names = itertools.chain([folder], (folder.with_name(f"{folder.name}-{n}") for n in itertools.count(2)))
    return next(f for f in names if not f.exists() or (f.is_dir() and not any(f.iterdir())))


def _finish(run: "Run", summary: dict[str, Any]) -> None:
    run.save_summary(summary)
    _show(summary)


def _show(summary: dict[str, Any]) -> None:
    console = Console()
    console.print(summary_table(summary), width=min(80, console.width))


def _shown(folder: Path) -> Path:
    """The folder as seen from here, if it lies below."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
