"""What a tool call means, and which calls mean the same.

AXPO (arXiv 2605.28774, section 1) counts "semantic clusters" of the calls that follow one prefix and leaves open how
they are found: all rules here are our choice. Pure functions on the text of calls.
"""

import ast
import json
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SAME_BOX = 0.5  # least intersection over union of two boxes that show the same
SAME_WORDS = 0.5  # share of common words above which two queries ask the same

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Call:
    """A call as it is written between its tags, and the text that it returned; "" where it returned none."""

    text: str
    output: str = ""


@dataclass(frozen=True)
class _Crop:
    image: int
    box: Box


@dataclass(frozen=True)
class _Program:
    tree: str
    output: str


@dataclass(frozen=True)
class _Query:
    words: frozenset[str]


_Meaning = _Crop | _Program | _Query | str


def cluster(calls: Sequence[Call]) -> list[int]:
    """The cluster of each call (n,), numbered from 0 in the order in which they appear.

    Two calls are in one cluster where they are alike, or linked by others that are: the clusters do not depend on the
    order of the calls.
    """
    meanings = [_meaning(call) for call in calls]
    groups: list[list[int]] = []
    for place, meaning in enumerate(meanings):
        linked = [group for group in groups if any(_alike(meaning, meanings[other]) for other in group)]
        merged = sorted([place, *(other for group in linked for other in group)])
        groups = [group for group in groups if group not in linked] + [merged]
    numbers = {place: number for number, group in enumerate(sorted(groups)) for place in group}
    return [numbers[place] for place in range(len(calls))]


def alike(a: Call, b: Call) -> bool:
    """Whether two calls mean the same.

    - `image_zoom_in_tool`: boxes of one image whose intersection is at least half of their union.
    - `python`: one syntax tree, whatever the layout, comments and names of variables; or else the same output.
    - `search`: more than half of all words of the two queries are in both, so "metal of X" is not "metal of Y".
    - Anything else, and a call that its tool could not read: the same JSON, whatever the order of its keys and its
      layout, or the same text where it is not JSON.
    """
    return _alike(_meaning(a), _meaning(b))


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2), neither of which is empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return common / (areas - common)


def normalised(code: str) -> str | None:
    """The syntax tree of a Python program in text, its variables renamed in order; None where it does not parse.

    Renamed is what the program only ever assigns: parameters, functions, classes and imports keep their names.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes and the like
            tree = ast.parse(code)
        nodes = list(ast.walk(tree))
        names = [node for node in nodes if isinstance(node, ast.Name)]
        own = {name.id for name in names if isinstance(name.ctx, ast.Store)} - _named_otherwise(nodes)
        renamed: dict[str, str] = {}
        for name in names:
            if name.id in own:
                name.id = renamed.setdefault(name.id, f"${len(renamed)}")
        return ast.dump(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _named_otherwise(nodes: Sequence[ast.AST]) -> set[str]:
    """The names that a program also holds as plain strings, where renaming would have to follow them."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, ast.Global | ast.Nonlocal):
            found.update(node.names)
    return found


def _alike(a: _Meaning, b: _Meaning) -> bool:
    if isinstance(a, _Crop) and isinstance(b, _Crop):
        return a.image == b.image and overlap(a.box, b.box) >= SAME_BOX
    if isinstance(a, _Program) and isinstance(b, _Program):
        return a.tree == b.tree or (a.output != "" and a.output == b.output)
    if isinstance(a, _Query) and isinstance(b, _Query):
        return len(a.words & b.words) > SAME_WORDS * len(a.words | b.words)
    return a == b


def _meaning(call: Call) -> _Meaning:
    read = _read(call.text)
    name, arguments = read if isinstance(read, tuple) else ("", {})
    if name == "image_zoom_in_tool":
        image, box = arguments.get("img_idx"), _box(arguments.get("bbox_2d"))
        if box is not None and _is_number(image) and image == int(image):
            return _Crop(int(image), box)
    code, query = arguments.get("code"), arguments.get("query")
    if name == "python" and isinstance(code, str) and (tree := normalised(code)) is not None:
        return _Program(tree, call.output)
    if name == "search" and isinstance(query, str) and (words := re.findall(r"\w+", query.casefold())):
        return _Query(frozenset(words))
    return json.dumps(read, sort_keys=True)


def _read(text: str) -> Any:
    """The name and the arguments of a call as the toolbox reads it; of a malformed one its JSON, or else its text."""
    try:
        call = json.loads(text)
        if isinstance(call, dict) and isinstance(call.get("arguments"), str):
            call["arguments"] = json.loads(call["arguments"])
    except (ValueError, RecursionError):
        return text.strip()
    if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
        return call
    name, arguments = call["name"], call["arguments"]
    return (name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else call


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _box(value: Any) -> Box | None:
    """A relative box within its image, which spans 0 to 1000; None where nothing of it is."""
    if not isinstance(value, list) or len(value) != 4 or not all(map(_is_number, value)):
        return None
    x1, y1, x2, y2 = (float(min(max(side, 0), 1000)) for side in value)
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None
