"""The arguments of a tool: how they are described to the policy, how a call is read, and how they are checked."""

import difflib
import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from transformers.utils.chat_template_utils import (
    DocstringParsingException,
    TypeHintParsingException,
    get_json_schema,
)

from axpo.tools.conversation import Conversation
from axpo.tools.faults import Fault, PolicyFault, SystemFault, ToolError, cut, short

_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
_DEPTH = 64  # how deep arguments may be nested: servers and their libraries have limits of their own
_SHOWN = 12  # parameters that a complaint lists
_FORM = 'A call is {"name": <name>, "arguments": <object>}.'


class Arguments(Protocol):
    """What a tool takes. `schema` is what chat templates take; `conversation` names the parameters that it fills."""

    schema: dict[str, Any]
    conversation: list[str]

    def check(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as the function takes them. Raises PolicyFault that says what is wrong with them."""


def read_arguments(function: Callable[..., Any]) -> Arguments:
    """What a tool takes: by the schema that it carries, else by its signature and docstring. Raises ToolError."""
    if not inspect.isroutine(function):
        raise ToolError(f"a tool is a function, but {function!r} is not")
    return BySchema(function) if hasattr(function, "schema") else BySignature(function)


class BySignature:
    """The arguments of a function with type hints and a Google-style docstring."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name: str = function.__name__
        signature, hints = inspect.signature(function), resolved_hints(function)
        for parameter in signature.parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise ToolError(f"tool {self.name!r}: the parameter {str(parameter)!r} cannot be passed by name")
        self.conversation = [name for name, hint in hints.items() if hint is Conversation]
        shown = {name: p for name, p in signature.parameters.items() if name not in self.conversation}
        try:
            self.schema: dict[str, Any] = get_json_schema(_stand_in(function, shown, hints))
            self.adapters = {name: TypeAdapter[Any](hints[name], config=_STRICT) for name in shown}
        except (DocstringParsingException, TypeHintParsingException, PydanticUserError) as error:
            raise ToolError(f"tool {self.name!r}: {error}") from error
        self.required = [name for name, parameter in shown.items() if parameter.default is parameter.empty]

    def check(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        wrong = [f"missing argument {name!r}" for name in self.required if name not in arguments]
        values = {}
        for name, value in arguments.items():
            if name not in self.adapters:
                wrong.append(_unknown(name, self.adapters))
                continue
            try:
                values[name] = self.adapters[name].validate_json(json.dumps(_whole(value)))
            except (ValidationError, PolicyFault) as error:
                wrong.append(f"{name}{_complaint(error)}, not {short(value)}")
        if wrong:
            parameters = self.schema["function"]["parameters"]["properties"]
            raise PolicyFault(f"{'; '.join(wrong[:3])}. {self.name} takes {in_short(parameters, self.required)}.")
        return values


class BySchema:
    """The arguments of a function that takes any by name and carries their JSON schema as an attribute `schema`.

    An argument that a plain list of properties does not have is unknown, as with a signature, although JSON Schema
    would let it pass where nothing is said about it. Raises ToolError for a schema that is none.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        import jsonschema  # type: ignore[import-untyped]
        import referencing

        self.name: str = function.__name__
        self.conversation: list[str] = []
        self.parameters: dict[str, Any] = function.schema  # type: ignore[attr-defined]
        described = {"name": self.name, "description": function.__doc__ or "", "parameters": self.parameters}
        self.schema: dict[str, Any] = {"type": "function", "function": described}
        kind = jsonschema.validators.validator_for(self.parameters, default=jsonschema.Draft202012Validator)
        try:
            kind.check_schema(self.parameters)
        except jsonschema.SchemaError as error:
            raise ToolError(f"tool {self.name!r}: its JSON schema is not valid: {error.message}") from error
        # An empty registry: nothing is fetched for the sake of a reference.
        self.validator = kind(self.parameters, registry=referencing.Registry())
        self.unresolvable = referencing.exceptions.Unresolvable
        self.best = jsonschema.exceptions.best_match
        self.properties: dict[str, Any] = self.parameters.get("properties", {})
        self.required: list[str] = self.parameters.get("required", [])
        open_keys = {"patternProperties", "unevaluatedProperties", "allOf", "anyOf", "oneOf", "$ref", "if"}
        listed = "properties" in self.parameters and self.parameters.get("additionalProperties", False) is False
        self.closed = listed and not open_keys & self.parameters.keys()

    def check(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        wrong = [f"missing argument {name!r}" for name in self.required if name not in arguments]
        if self.closed:
            wrong += [_unknown(name, self.properties) for name in arguments if name not in self.properties]
        values = {}
        for name, value in arguments.items():
            try:
                values[name] = _whole(value)
                json.dumps([name, value], ensure_ascii=False).encode()
            except PolicyFault as error:
                wrong.append(f"{cut(name, 60)}{_complaint(error)}, not {short(value)}")
            except UnicodeEncodeError:
                wrong.append(f"{cut(name, 60)}: half a surrogate pair is no character")
        if not wrong:
            try:
                wrong = [self._complaint(error) for error in self.validator.iter_errors(values)]
            except self.unresolvable as error:
                raise SystemFault(f"the schema of {self.name} refers to what is not there: {error}") from error
        if wrong:
            raise PolicyFault(f"{'; '.join(wrong[:3])}. {self.name} takes {in_short(self.properties, self.required)}.")
        return values

    def _complaint(self, found: Any) -> str:
        error = self.best([found])  # of several alternatives, where the nearest fails
        place = "".join(f"[{part}]" if depth else f"{part}" for depth, part in enumerate(error.absolute_path))
        return cut(f"{place}: " if place else "", 100) + cut(
            error.message.replace(repr(error.instance), short(error.instance)), 200
        )


def in_short(properties: Mapping[str, Any], required: Iterable[str]) -> str:
    """The parameters of a JSON schema with their types, in few words."""
    described = [
        f"{name} ({_kind(schema)}{'' if name in required else ', optional'})"
        for name, schema in list(properties.items())[:_SHOWN]
    ]
    if len(properties) > _SHOWN:
        described.append(f"and {len(properties) - _SHOWN} more")
    return ", ".join(described) or "no arguments"


def _kind(schema: Any) -> str:
    if not isinstance(schema, Mapping):
        return "any"
    alternatives = schema.get("anyOf") or schema.get("oneOf")
    kinds = [_kind(one) for one in alternatives] if alternatives else schema.get("type", "any")
    return kinds if isinstance(kinds, str) else " or ".join(dict.fromkeys(kinds))


def near(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like this one, if one is."""
    return next(iter(difflib.get_close_matches(name, known, 1)), None) if len(name) <= 100 else None


def _unknown(name: str, known: Iterable[str]) -> str:
    meant = near(name, known)
    return f"unknown argument {short(name)}" + (f" (did you mean {meant!r}?)" if meant else "")


def resolved_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The type hints of a function. Raises ToolError where one names what does not exist."""
    try:
        return get_type_hints(function)
    except NameError as error:
        raise ToolError(f"tool {function.__name__!r}: a type hint cannot be resolved: {error}") from error


def _stand_in(
    function: Callable[..., Any], shown: Mapping[str, inspect.Parameter], hints: Mapping[str, Any]
) -> Callable[..., Any]:
    """What `get_json_schema` is to see: no conversation, and no return type, which would only lengthen the prompt."""

    def stand_in() -> None: ...

    stand_in.__name__ = function.__name__
    stand_in.__doc__ = function.__doc__
    stand_in.__annotations__ = {name: hints[name] for name in shown if name in hints}
    stand_in.__signature__ = inspect.Signature(list(shown.values()))  # type: ignore[attr-defined]
    return stand_in


def parse_call(call_text: str) -> tuple[str, dict[str, Any]]:
    """The tool's name and the arguments of a call as the policy writes it. Raises PolicyFault that tells the form."""
    try:
        call = json.loads(call_text, object_pairs_hook=_unique)
        if isinstance(call, dict) and isinstance(call.get("arguments"), str):
            call["arguments"] = json.loads(call["arguments"], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise PolicyFault(f"the call is not valid JSON: {error}. {_FORM}", Fault.MALFORMED) from error
    if not isinstance(call, dict):
        raise PolicyFault(f"the call is not a JSON object. {_FORM}", Fault.MALFORMED)
    if call.keys() != {"name", "arguments"}:
        keys = ", ".join(map(short, list(call)[:6])) or "none"
        raise PolicyFault(f"the call has these keys: {keys}. {_FORM}", Fault.MALFORMED)
    if not isinstance(call["name"], str) or not isinstance(call["arguments"], dict):
        raise PolicyFault(f"the name is not a string or the arguments are not an object. {_FORM}", Fault.MALFORMED)
    return call["name"], call["arguments"]


def called_tool(call_text: str) -> str | None:
    """The tool that a call names, None where the call is malformed."""
    try:
        return parse_call(call_text)[0]
    except PolicyFault:
        return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {short(key)} is given twice")
        found[key] = value
    return found


def _whole(value: Any, depth: int = 0) -> Any:
    """The value with 3.0 as 3, which JSON does not tell apart.

    Raises PolicyFault for NaN, infinities and nesting without end.
    """
    if depth > _DEPTH:
        raise PolicyFault(f": nested over {_DEPTH} deep")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise PolicyFault(": Input should be a finite number")
        return int(value) if value.is_integer() else value
    if isinstance(value, list | tuple):
        return [_whole(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {key: _whole(item, depth + 1) for key, item in value.items()}
    return value


def _complaint(error: ValidationError | PolicyFault) -> str:
    if isinstance(error, PolicyFault):
        return str(error)
    first = error.errors(include_url=False)[0]
    return "".join(f"[{place}]" for place in first["loc"]) + f": {first['msg']}"
