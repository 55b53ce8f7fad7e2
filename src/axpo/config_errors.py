"""Config problems in words: the key, what was given, what is allowed, and the nearest key for one that is unknown."""

from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import Any

from pydantic import BaseModel, ValidationError

# What people know some keys by: the symbols of the paper and of other trainers.
_SYMBOLS = {
    "b": "rollout.questions",
    "n": "rollout.rollouts",
    "r": "method.budget",
    "k": "method.continuations",
    "beta": "method.kl",
    "lr": "train.learning_rate",
}

_RULES = {"path_type": "must be a path", "model_type": "must be a section that holds keys"}


def describe(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line for each problem in `error`, raised by validating `model`."""
    lines: list[str] = []
    allowed: dict[str, list[str]] = {}
    given: dict[str, Any] = {}
    for problem in error.errors():
        if problem["type"] == "extra_forbidden":
            for key in _leaves(".".join(map(str, problem["loc"])), problem["input"]):
                lines.append(f"{key}: unknown key{_suggestion(key, model)}")
        elif not problem["loc"]:  # a check of several keys together, which explains itself
            lines.extend(str(problem["ctx"]["error"]).splitlines() if "ctx" in problem else [problem["msg"]])
        else:
            key = _key(problem["loc"], model)
            given[key] = problem["input"]
            allowed.setdefault(key, []).append(_RULES.get(problem["type"]) or _allowed(problem["msg"]))
    for key, rules in allowed.items():
        lines.append(f"{key}: got {given[key]!r}, {' or '.join(dict.fromkeys(rules))}")
    return lines


def key_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted names of all keys that hold a value."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from key_names(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def _leaves(key: str, value: Any) -> list[str]:
    if isinstance(value, dict) and value:
        return [leaf for name, below in value.items() for leaf in _leaves(f"{key}.{name}", below)]
    return [key]


def _key(location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """The key of a problem's location, without the names of union members that follow it."""
    names = set(key_names(model))
    for end in range(len(location), 0, -1):
        key = ".".join(map(str, location[:end]))
        if key in names:
            index = location[end] if end < len(location) else None
            return f"{key}[{index}]" if isinstance(index, int) else key
    return ".".join(map(str, location))


def _allowed(message: str) -> str:
    message = message.removeprefix("Value error, ")
    for start in ("Input should be", "String should"):
        if message.startswith(start):
            return message.replace(start, "must be" if start.endswith("be") else "must", 1)
    return message


def _suggestion(key: str, model: type[BaseModel]) -> str:
    names = list(key_names(model))
    leaf = key.rpartition(".")[2].lower()
    same_leaf = [name for name in names if name.rpartition(".")[2] == leaf]
    if _SYMBOLS.get(leaf) in names:
        nearest = [_SYMBOLS[leaf]]
    elif "." not in key and same_leaf:
        nearest = same_leaf
    else:
        score, best = max((_similarity(key, name), name) for name in names)
        nearest = [best] if score >= 0.6 else []
    return f" -> did you mean {' or '.join(nearest)}?" if nearest else f"; the keys are {', '.join(names)}"


def _similarity(key: str, name: str) -> float:
    whole = SequenceMatcher(None, key, name).ratio()
    last = SequenceMatcher(None, key.rpartition(".")[2], name.rpartition(".")[2]).ratio()
    return (whole + last) / 2
