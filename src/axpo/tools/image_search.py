"""The image search tool: an image of the conversation to a provider, what it finds as titles with thumbnails."""

import asyncio
import base64
import io
import logging
import math
from pathlib import Path

import PIL.Image
import PIL.ImageOps

from axpo.images import MAX_ASPECT, as_seen
from axpo.tools.base import Conversation, PolicyFault, SystemFault, Tool, ToolResult, encode_png
from axpo.tools.cache import Answers
from axpo.tools.image_providers import ImageProvider
from axpo.tools.search import NOTHING
from axpo.tools.threads import Worker
from axpo.tools.web import Limits, Web

logger = logging.getLogger(__name__)

TOP_K = 5  # hits that are shown
SIDE = 512  # pixels of a thumbnail's longer side
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_MAX_BYTES = 4_000_000  # of a thumbnail's file
_MAX_PIXELS = 25_000_000  # of a thumbnail before it is made smaller


def make_image_search(provider: ImageProvider, limits: Limits | None = None, cache: Path | None = None) -> Tool:
    """The tool `image_search`, which shows the TOP_K best hits: their titles, and thumbnails of at most SIDE × SIDE.

    Its form is that of Qwen-Agent. A thumbnail that cannot be had is left out. `limits` are for the thumbnails, by
    default twice 5 seconds for each; `cache` keeps their files. As with `search`, the tool itself has no deadline.
    """
    limits = limits or Limits(timeout=5.0, attempts=2, failures=None)  # their hosts differ: one does not speak for all
    thumbnails = _Thumbnails(limits, cache)

    async def image_search(img_idx: int, conversation: Conversation) -> ToolResult:
        """Search the web for an image.

        Args:
            img_idx: Index of the image, from 0.
        """
        images = conversation.images
        if not 0 <= img_idx < len(images):
            raise PolicyFault(f"img_idx {img_idx} names no image; the conversation has {len(images)}, from index 0.")
        hits = await provider.search(images[img_idx], TOP_K)
        if not hits:
            return ToolResult(NOTHING)
        lines: list[str] = []
        shown: list[bytes] = []
        files = await asyncio.gather(*(thumbnails.get(hit.thumbnail) for hit in hits))
        for rank, (hit, file) in enumerate(zip(hits, files, strict=True), 1):
            line = f"{rank}. {hit.title or hit.link}".rstrip()
            if file is not None:
                shown.append(file)
                line += f" (thumbnail {len(shown)})"
            lines.append(line)
        return ToolResult("\n".join(lines), tuple(shown))

    image_search.timeout = math.inf  # type: ignore[attr-defined]
    image_search.counts = False  # type: ignore[attr-defined]
    image_search.keeps = False  # type: ignore[attr-defined]
    image_search.provider = provider  # type: ignore[attr-defined]
    return image_search


class _Thumbnails:
    """Gets thumbnails and makes them small PNG files.

    Their addresses come from strangers. What is behind one is asked without a key, redirects are not followed, and only
    a picture ever reaches the policy; a machine whose neighbours trust any request should not run this tool.
    """

    def __init__(self, limits: Limits, cache: Path | None) -> None:
        self._web, self._answers = Web("thumbnails", limits), Answers(str, cache)

    async def get(self, thumbnail: str) -> bytes | None:
        """The thumbnail as PNG; None where there is none, it cannot be had, or it is no picture."""
        if not thumbnail:
            return None
        try:
            if thumbnail.startswith(("http://", "https://")):
                kept = await self._answers.get({"thumbnail": thumbnail}, lambda: self._ask(thumbnail))
            else:
                kept = thumbnail.partition("base64,")[2] or thumbnail
            file = base64.b64decode(kept, validate=True)
            small: bytes = await Worker().run(lambda: shrink(file))
            return small
        except (SystemFault, ValueError) as error:
            logger.info("a thumbnail is left out: %s", error)
            return None

    async def _ask(self, url: str) -> str:
        def read(body: bytes) -> str:
            _open(body).close()  # only pictures are kept
            return base64.b64encode(body).decode()

        return await self._web.fetch("GET", url, read, max_bytes=_MAX_BYTES)


def shrink(file: bytes) -> bytes:
    """An image file as a PNG file of at most SIDE × SIDE pixels. Raises ValueError for what is no fit picture."""
    try:
        with _open(file) as image:
            image.draft("RGB", (SIDE, SIDE))  # a JPEG is decoded no larger than needed
            image.thumbnail((SIDE, SIDE))
            return encode_png(as_seen(PIL.ImageOps.exif_transpose(image)).convert("RGB"))
    except (OSError, SyntaxError) as error:  # as PIL has it for files that are cut short or broken
        raise ValueError(f"a broken picture: {error}") from error


def _open(file: bytes) -> PIL.Image.Image:
    """The picture, not yet decoded. Raises ValueError for what is none, is too large or too thin."""
    if len(file) > _MAX_BYTES:
        raise ValueError(f"a picture of {len(file)} bytes")
    try:
        image = PIL.Image.open(io.BytesIO(file), formats=_FORMATS)
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"no picture: {error}") from error
    width, height = image.size
    if width * height > _MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"a picture of {width} × {height} pixels")
    return image
