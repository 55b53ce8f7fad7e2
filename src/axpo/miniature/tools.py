"""The three tools as the miniature offers them, and calls to them as the template writes them."""

import json
from collections.abc import Sequence

from axpo.miniature.base import SIDE
from axpo.miniature.world import corpus
from axpo.tools.base import Tool
from axpo.tools.corpus import open_corpus
from axpo.tools.python import make_python
from axpo.tools.sandbox import NONE, Sandbox
from axpo.tools.search import make_search
from axpo.tools.zoom import make_zoom


def tools(number: int = 0) -> list[Tool]:
    """Zoom, Python without isolation (for teachers), and search over the corpus of this number (0: the world's)."""
    return [make_zoom(SIDE * SIDE), make_python(Sandbox(NONE)), make_search(open_corpus(corpus(number)), 1)]


def call_text(name: str, arguments: dict[str, object]) -> str:
    """A tool call as the template writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def zoom_call(box: Sequence[int], label: str) -> str:
    """A call of the zoom tool on the question's image."""
    return call_text("image_zoom_in_tool", {"bbox_2d": list(box), "label": label, "img_idx": 0})
