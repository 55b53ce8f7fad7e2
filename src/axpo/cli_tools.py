"""`axpo tools check`: what the configured tools answer, how fast, and what the policy would see of it."""

import asyncio
import inspect
import io
import json
import math
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from axpo.cli_shared import ConfigFile, Overrides, command, prepare, shown
from axpo.config import Config, ConfigError, load_config
from axpo.progress import WIDTH

if TYPE_CHECKING:
    from axpo.chat import Chat
    from axpo.tools.base import Conversation, Offer, Toolbox
    from axpo.tree import Image

LINES = 20  # of an observation that are shown
PICTURE = (512, 384)  # pixels of the test picture
CODE = """\
import sys
import matplotlib.pyplot as plt
print("Python", sys.version.split()[0], image_0.size)
plt.figure(figsize=(2, 2))
line = plt.plot([1, 4, 9])"""

tools = typer.Typer(help="Try the configured tools.", no_args_is_help=True)


@tools.command()
def check(
    config_file: ConfigFile,
    overrides: Overrides = None,
    call: Annotated[
        list[str] | None,
        typer.Option(
            metavar="JSON",
            help='A call, {"name": …, "arguments": {…}}, in place of the sample for that tool; can be repeated.',
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write the test picture and the tools' images there.")
    ] = None,
) -> None:
    """Run each configured tool, and show what the policy would see.

    Every tool has a conversation of its own that holds a small test picture. Each call is made twice: the first may
    have to start something, the second tells what later ones take. What is shown is the answer to the first.

    Ends with code 1 where a call failed by the system's fault, which makes a rollout void.
    """
    with command():
        config = load_config(config_file, overrides or [])
        if not config.tools.names and not config.eval.tools:
            raise ConfigError(
                "tools.names: got nothing, but this command needs tools to check; "
                "must be a list of them, such as tools.names=[zoom,python]"
            )
        given = _given(call or [])
        chat, toolbox = prepare(config)
        names = toolbox.in_evaluation.names
        for name in given:
            if name not in names:
                raise ConfigError(f"--call: got the tool {name!r}, must be one of {', '.join(names)}")
        failed = asyncio.run(_check_all(config, chat, toolbox, given, images))
        if images is not None:
            typer.echo(f"\nimages written to {shown(images.absolute())}")
        if failed:
            typer.echo(f"failed: {', '.join(failed)}; a rollout that meets this is void", err=True)
            raise typer.Exit(1)


def _given(texts: Sequence[str]) -> dict[str, list[str]]:
    """The calls of each tool. Raises ConfigError for a text that is no call."""
    from axpo.tools.arguments import parse_call
    from axpo.tools.faults import PolicyFault

    calls: dict[str, list[str]] = {}
    for text in texts:
        try:
            calls.setdefault(parse_call(text)[0], []).append(text)
        except PolicyFault as fault:
            raise ConfigError(f"--call: got {text!r}: {fault}") from fault
    return calls


async def _check_all(
    config: Config, chat: "Chat", toolbox: "Toolbox", given: Mapping[str, Sequence[str]], folder: Path | None
) -> list[str]:
    """Try and show every tool. Returns the names of those that failed by the system's fault."""
    from axpo.chat import CALL, END_CALL
    from axpo.tools.base import Conversation

    picture = draw_picture()
    _save(folder, "image_0.png", picture)
    failed = []
    for offer in toolbox.in_evaluation.offers:
        only = "" if offer.name in toolbox.names else " (only in evaluation)"
        typer.echo(f"\n{offer.name}{only}")
        _say(f"{_origin(offer)}; {_limits(offer, config.tools.timeout)}")
        async with Conversation([picture]) as conversation:
            for number, text in enumerate(given.get(offer.name) or [_sample_call(offer)], 1):
                typer.echo("  call")
                _quote(f"{CALL}\n{text}\n{END_CALL}")
                first = await _ask(toolbox.in_evaluation, chat, text, conversation)
                again = None if first.broken else await _ask(toolbox.in_evaluation, chat, text, conversation)
                _show(first, again, chat)
                for index, image in enumerate(first.images, 1):
                    _save(folder, f"{offer.name}-{number}-{index}.png", image.data)
                if (first.broken or (again and again.broken)) and offer.name not in failed:
                    failed.append(offer.name)
    return failed


@dataclass(frozen=True)
class Answer:
    """What came of one call.

    `tokens` are those of the whole observation, `fault` is the kind of the policy's fault, `broken` the reason of the
    system's; both are "" where there was none.
    """

    seconds: float
    text: str = ""
    images: "tuple[Image, ...]" = ()
    tokens: int = 0
    fault: str = ""
    broken: str = ""


async def _ask(toolbox: "Toolbox", chat: "Chat", call: str, conversation: "Conversation") -> Answer:
    """Make a call as a rollout does."""
    from axpo.chat import ChatError
    from axpo.tools.base import SystemFault

    start = time.perf_counter()
    try:
        result = await toolbox.run(call, conversation)
        seconds = time.perf_counter() - start
        ids, images = chat.observation([(result.text, result.images)])
    except (SystemFault, ChatError) as fault:
        return Answer(time.perf_counter() - start, broken=str(fault) or type(fault).__name__)
    conversation.images.extend(result.images)
    return Answer(seconds, result.text, images, len(ids), result.fault or "")


# What is shown --------------------------------------------------------------------------------------------------------


def _show(first: Answer, again: Answer | None, chat: "Chat") -> None:
    times = [f"{1000 * answer.seconds:.1f} ms" for answer in (first, again) if answer]
    _say(", then ".join(times), "latency  ")
    if first.broken:
        _say(_printable(first.broken), "system's fault  ")
        return
    fault = f", the policy's fault: {first.fault}" if first.fault else ""
    _say(f"{first.tokens} tokens{fault}", "observed ")
    if first.text:
        _quote(first.text)
    for image in first.images:
        width, height = chat.seen_size(image)
        typer.echo(f"  image {_size(image.data)}, seen as {width}×{height}, {image.tokens} tokens")
    if again and again.broken:
        _say(_printable(again.broken), "the second call failed by the system's fault  ")
    elif again and again.fault != first.fault:
        _say(again.fault or "none", "the policy's fault at the second call  ")


def _origin(offer: "Offer") -> str:
    """Where a tool comes from, and what it stands on."""
    function: Any = offer.function
    match function.__module__:
        case "axpo.tools.zoom":
            return "built-in zoom"
        case "axpo.tools.python":
            return f"built-in python, sandbox level {function.level}"
        case "axpo.tools.search":
            return f"built-in search, {function.provider}"
        case "axpo.tools.image_search":
            return f"built-in image search, {function.provider}"
        case "axpo.tools.mcp":
            return f"MCP server {function.server}"
    return f"file {shown(Path(inspect.getfile(inspect.unwrap(function))).absolute())}"


def _limits(offer: "Offer", timeout: float) -> str:
    """The deadline of a call and how many run at once. `timeout` is that which python keeps itself."""
    seconds = timeout if offer.function.__module__ == "axpo.tools.python" else offer.timeout
    deadline = f"deadline {seconds:g} s" if math.isfinite(seconds) else "no deadline but its provider's"
    return f"{deadline}, {'any number of' if offer.concurrency is None else offer.concurrency} calls at once"


def _say(text: str, label: str = "") -> None:
    for line in textwrap.wrap(
        text,
        _width(),
        initial_indent=f"  {label}",
        subsequent_indent=" " * (11 if label else 2),
        break_on_hyphens=False,
    ):
        typer.echo(line)


def _quote(text: str) -> None:
    """Show a text with all its blanks; where it is long, its beginning. A bar tells where its own lines begin."""
    width = _width() - 4
    head = text[: LINES * width]
    pieces: list[str] = []
    for line in head.split("\n"):
        wrapped = textwrap.wrap(_printable(line), width, drop_whitespace=False, break_on_hyphens=False)
        pieces.extend(f"  {' ' if number else '|'} {piece}" for number, piece in enumerate(wrapped or [""]))
    for piece in pieces[:LINES]:
        typer.echo(piece)
    if len(pieces) > LINES or len(head) < len(text):
        typer.echo(f"  (cut here; it has {len(text)} characters)")


def _printable(text: str) -> str:
    """Other people's text with escapes for what a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _width() -> int:
    return min(WIDTH, Console().width)


def _size(image: bytes) -> str:
    import PIL.Image

    with PIL.Image.open(io.BytesIO(image)) as opened:
        return f"{opened.width}×{opened.height}"


def _save(folder: Path | None, name: str, image: bytes) -> None:
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image)
    except OSError as error:
        raise ConfigError(f"--images: {folder} cannot be written: {error.strerror}") from error


# What is asked --------------------------------------------------------------------------------------------------------


def draw_picture() -> bytes:
    """The test picture, a PNG: a disc, a square, and in the middle a line too small to read from afar."""
    import PIL.Image
    import PIL.ImageDraw
    import PIL.ImageFont

    from axpo.tools.base import encode_png

    width, height = PICTURE
    image = PIL.Image.new("RGB", PICTURE, "white")
    draw = PIL.ImageDraw.Draw(image)
    draw.ellipse((40, 40, 160, 160), fill="firebrick")
    draw.rectangle((width - 160, height - 160, width - 40, height - 40), fill="steelblue")
    draw.text((40, height - 60), "test picture", "black", PIL.ImageFont.load_default(28))
    draw.text((width // 2, height // 2), "zoom works: 4711", "black", PIL.ImageFont.load_default(9), anchor="mm")
    return encode_png(image)


def _sample_call(offer: "Offer") -> str:
    return json.dumps({"name": offer.name, "arguments": _sample_arguments(offer)}, ensure_ascii=False)


def _sample_arguments(offer: "Offer") -> dict[str, Any]:
    function: Any = offer.function
    match function.__module__:
        case "axpo.tools.zoom":
            return {"bbox_2d": [250, 250, 750, 750], "label": "the middle", "img_idx": 0}
        case "axpo.tools.python":
            return {"code": CODE}
        case "axpo.tools.search":
            return {"query": _query(function.provider)}
        case "axpo.tools.image_search":
            return {"img_idx": 0}
    parameters = offer.arguments.schema["function"]["parameters"]
    return {name: sample(parameters.get("properties", {}).get(name), parameters) for name in _required(parameters)}


def _query(provider: Any) -> str:
    """A word that is found: the longest in the title of a corpus's first document."""
    from axpo.tools.corpus import Corpus, words

    found = words(provider.documents[0].title) if isinstance(provider, Corpus) else []
    return max(found, key=len, default="tower")


def sample(schema: Any, root: Mapping[str, Any], depth: int = 0) -> Any:
    """A value for a JSON schema that lies in the schema `root`: what it names itself, else the simplest of its type."""
    if not isinstance(schema, Mapping) or depth > 8:
        return "test"
    if "default" in schema or "const" in schema:
        return schema.get("default", schema.get("const"))
    for key in ("enum", "examples"):
        if schema.get(key):
            return schema[key][0]
    if str(schema.get("$ref", "")).startswith("#/"):
        found: Any = root
        for part in schema["$ref"][2:].split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        return sample(found, root, depth + 1)
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return sample(schema[key][0], root, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    match kind if isinstance(kind, str) else kind[0]:
        case "integer" | "number":
            return 1
        case "boolean":
            return True
        case "array":
            return [sample(schema.get("items"), root, depth + 1)]
        case "object":
            properties = schema.get("properties", {})
            return {name: sample(properties.get(name), root, depth + 1) for name in _required(schema)}
        case "null":
            return None
    return "test"


def _required(schema: Mapping[str, Any]) -> Sequence[str]:
    required: Sequence[str] = schema.get("required", [])
    return required
