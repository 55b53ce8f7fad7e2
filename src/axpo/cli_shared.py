"""What the commands share: how mistakes are told, what is checked before weights are loaded, run folders.

Torch and transformers are imported by the functions that need them, so that help and config errors come at once.
"""

import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from axpo.config import Config, ConfigError, load_config
from axpo.diagnostics.alarms import AlarmStop
from axpo.launch import LOST
from axpo.progress import summary_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from axpo.chat import Chat
    from axpo.questions import Question
    from axpo.run import Run
    from axpo.tools.base import Toolbox

QUICKSTART = Path(__file__).parent / "miniature" / "quickstart.yaml"

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; axpo/options.py explains every key.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Config values, such as train.learning_rate=1e-6."),
]


@contextmanager
def command() -> Iterator[None]:
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
    except RuntimeError as error:
        from axpo.engines.base import EngineError
        from axpo.parallel import RankError, RankLostError

        if not isinstance(error, EngineError | RankError):
            raise
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(LOST if isinstance(error, RankLostError) else 1) from None
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
def running(run: "Run") -> Iterator[None]:
    """Keep the run's folder to this process; tell where it lies if it is interrupted, or stopped by an alarm.

    After a mistake that is found before anything has run, a new folder goes again.
    """
    try:
        with run.locked():
            yield
    except ConfigError:
        run.discard()
        raise
    except AlarmStop as stop:
        typer.echo(f"{stop}: the run so far is in {shown(run.folder)}", err=True)
        raise typer.Exit(3) from None
    except KeyboardInterrupt:
        typer.echo(f"interrupted: the run so far is in {shown(run.folder)}", err=True)
        raise typer.Exit(130) from None


def require(value: object, key: str) -> None:
    """Raise ConfigError where a source of data that the command needs is not given."""
    if value is None:
        raise ConfigError(
            f"{key}: got nothing, but this command needs it; must be 'miniature' or a file, such as {key}=FILE.jsonl"
        )


def prepare(config: Config, described: bool = False) -> "tuple[Chat, Toolbox]":
    """Check what can be checked without data and weights; returns the chat and the tools, which may be only `described`
    where nobody will call them."""
    import torch
    from transformers.utils import logging as transformers_logging

    from axpo import build
    from axpo.adapters import check_adapters
    from axpo.chat import ChatError

    check_adapters(config.lora)
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
    build.check_engine(config)
    return chat, build.load_toolbox(config, chat, described)


def check_prompt(config: Config, chat: "Chat", toolbox: "Toolbox", questions: "Sequence[Question]") -> None:
    """Render one prompt, that of the question with the most images: what is wrong with all prompts shows there."""
    from axpo.chat import ChatError

    for question in sorted(questions, key=lambda q: -len(q.images))[:1]:
        try:
            ids, images = chat.prompt(question.messages, question.images, toolbox.in_evaluation.schemas)
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


def config_of_run(folder: Path, checkpoint: str, overrides: Sequence[str]) -> Config:
    """The config with which a run's checkpoint is evaluated into a new folder of that run."""
    place = checkpoint_of_run(folder, checkpoint)
    reason = "the model is RUN's checkpoint, the output a folder in RUN"
    refuse(overrides, {"model": reason, "output": reason})
    config = load_config(folder / "config.yaml", overrides)
    new = {
        "model": str(place.absolute()),
        "output": free(folder.absolute() / "eval"),
        "data": config.data.model_copy(update={"train": None}),
    }
    return config.model_copy(update=new)


def checkpoint_of_run(folder: Path, checkpoint: str) -> Path:
    """The folder of a run's checkpoint. Raises ConfigError where there is none, or no run."""
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is not a run folder: it holds no config.yaml")
    place = folder / checkpoint
    if not place.is_dir():
        others = sorted(path.parent.name for path in folder.glob("*/config.json"))
        raise ConfigError(f"{folder} holds no checkpoint {checkpoint!r}; it holds {', '.join(others) or 'none'}")
    return place


def refuse(overrides: Sequence[str], reasons: Mapping[str, str]) -> None:
    """Raise ConfigError for an override of a key, or of one in a section, that has a reason not to be given."""
    for key in (override.partition("=")[0].strip() for override in overrides):
        if reason := reasons.get(key, reasons.get(key.partition(".")[0])):
            raise ConfigError(f"{key}: cannot be given here; {reason}")


def new_run(config: Config, command: str, follows: bool = False) -> "Run":
    """Make the run folder of a command, which another process makes where this one only follows.

    Raises ConfigError where it cannot be.
    """
    from axpo.run import FollowedRun, Run

    if follows:
        return FollowedRun(config.output)
    try:
        return Run(config, command)
    except OSError as error:
        raise ConfigError(f"output: {config.output} cannot be written: {error.strerror}") from error


def load_model(config: Config, run: "Run") -> "PreTrainedModel":
    """The weights. Where they cannot be loaded the run folder goes again."""
    from axpo import build

    try:
        return build.load_model(config)
    except BaseException:
        run.discard()
        raise


def free(folder: Path) -> Path:
    """The folder, or the first of FOLDER-2, FOLDER-3, … where nothing lies yet."""
    names = itertools.chain([folder], (folder.with_name(f"{folder.name}-{n}") for n in itertools.count(2)))
    return next(f for f in names if not f.exists() or (f.is_dir() and not any(f.iterdir())))


def finish(run: "Run", summary: dict[str, Any]) -> None:
    """Write summary.json and show it."""
    run.save_summary(summary)
    show(summary)


def show(summary: dict[str, Any]) -> None:
    """Show the table of a summary."""
    console = Console()
    console.print(summary_table(summary), width=min(80, console.width))


def shown(folder: Path) -> Path:
    """The folder as seen from here, if it lies below."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
