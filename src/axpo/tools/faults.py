"""Whose fault a failed call is: the policy's, which reads about it, or the system's, which the policy never sees."""

import contextlib
from collections.abc import Iterator
from enum import StrEnum


class Fault(StrEnum):
    """What the policy did wrong in a call."""

    MALFORMED = "malformed"  # the call is not the JSON that was asked for
    UNKNOWN_TOOL = "unknown_tool"
    BAD_ARGUMENTS = "bad_arguments"
    RAISED = "raised"  # the tool, or the policy's code in it, raised an exception
    TIMEOUT = "timeout"


class ToolError(ValueError):
    """A tool cannot be offered: it is not described well enough, or its file, server or corpus cannot be used."""


@contextlib.contextmanager
def blame(key: str) -> Iterator[None]:
    """Puts the key of the config that is at fault before the message of a ToolError, unless it names one."""
    try:
        yield
    except ToolError as error:
        if str(error).startswith("tools."):
            raise
        raise ToolError(f"{key}: {error}") from error


class PolicyFault(Exception):  # noqa: N818 (a fault, not a mistake in the program)
    """Raised by a tool to tell the policy what it did wrong."""

    def __init__(self, message: str, kind: Fault = Fault.BAD_ARGUMENTS) -> None:
        super().__init__(message)
        self.kind = kind


class SystemFault(Exception):  # noqa: N818
    """Raised by a tool whose provider is down or whose sandbox is lost. The policy never sees it.

    `final` where the toolbox is not to try again: the tool has done so itself, or it would be of no use.
    """

    def __init__(self, message: str = "", final: bool = False) -> None:
        super().__init__(message)
        self.final = final


def is_system(error: BaseException) -> bool:
    """Whether an exception came from outside: of the system, or of an HTTP client's transport.

    So do a group whose members all did, and what was raised from (`raise … from …`) a lost connection. Raised from
    another OSError, such as a missing file, it may well be the policy's fault.
    """
    if isinstance(error, PolicyFault):
        return False
    if isinstance(error, BaseExceptionGroup):
        return all(is_system(member) for member in error.exceptions)
    return isinstance(error, OSError) or _is_lost(error)


def _is_lost(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_lost(member) for member in error.exceptions)
    if isinstance(error, SystemFault | ConnectionError | TimeoutError):
        return True
    # The base class of httpx, and of what is made like it, goes by its name.
    if any(base.__name__ == "TransportError" for base in type(error).__mro__):
        return True
    return error.__cause__ is not None and error.__cause__ is not error and _is_lost(error.__cause__)


def alone(error: BaseException) -> BaseException:
    """The exception itself where a group holds but one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def described(error: BaseException) -> str:
    """The kind of an exception, or of a group's first, and what it says."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def short(value: object, length: int = 60) -> str:
    """The value as Python writes it, cut where it is longer than `length` characters."""
    return cut(repr(value), length)


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
