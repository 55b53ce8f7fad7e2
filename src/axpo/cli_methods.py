"""`axpo methods`: which methods there are, what each takes, and where it comes from."""

import json
import textwrap
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from axpo.methods import COMMON, METHODS
from axpo.options import MethodConfig


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with the default of every option.")] = False,
) -> None:
    """List the methods, with the options that each takes and where it comes from."""
    if as_json:
        listed = [
            {
                "name": method.name,
                "summary": method.summary,
                "source": method.source,
                "options": _defaults([*method.options, *COMMON], method.name),
            }
            for method in METHODS.values()
        ]
        typer.echo(json.dumps(listed, indent=1))
        return
    for method in METHODS.values():
        _say(f"{method.name}: {method.summary}")
        _say(method.source, "  ")
        if method.options:
            _say("options: " + ", ".join(method.options), "  ")
    typer.echo()
    _say(f"All take {', '.join(COMMON)}.")
    _say("`method=NAME` chooses one, `method.OPTION=VALUE` sets an option.")


def _defaults(names: Sequence[str], method: str) -> dict[str, Any]:
    options = MethodConfig.model_validate(method)
    return {name: getattr(options, name) for name in names}


def _say(text: str, indent: str = "") -> None:
    typer.echo(textwrap.fill(text, 80, initial_indent=indent, subsequent_indent=indent or "  "))
