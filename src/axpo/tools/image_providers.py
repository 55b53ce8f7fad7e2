"""Who answers an image search: an endpoint that takes the image, Google Lens by Serper, or a table on disk."""

import base64
import hashlib
import io
import json
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import PIL.Image

from axpo.tools.base import ToolError
from axpo.tools.cache import Answers
from axpo.tools.keys import check_address, fill_keys, read_key
from axpo.tools.providers import LINKS, SERPER, TEXTS, TITLES, first, items, organic
from axpo.tools.threads import Worker
from axpo.tools.web import Limits, Web, read_json

THUMBNAILS = ("thumbnail", "thumbnailUrl", "image", "imageUrl")


class ImageHit(NamedTuple):
    """One thing found. `thumbnail` is the address of an image, or the image as base64 or a data URL; "" for none."""

    title: str
    link: str
    thumbnail: str


class ImageProvider(Protocol):
    """Who answers an image search."""

    async def search(self, image: bytes, count: int) -> list[ImageHit]:
        """At most `count` hits for an image file, the best first. Raises SystemFault where the provider fails."""
        ...


class WebImageProvider:
    """A provider that is asked over HTTP. `ask` sends one image file and returns what is found."""

    def __init__(
        self, identity: str, ask: Callable[[bytes, int], Awaitable[list[ImageHit]]], cache: Path | None
    ) -> None:
        self._identity, self._ask, self._answers = identity, ask, Answers(list[ImageHit], cache)

    def __str__(self) -> str:
        return self._identity

    async def search(self, image: bytes, count: int) -> list[ImageHit]:
        async def ask() -> list[ImageHit]:
            return (await self._ask(image, count))[:count]

        question = {"provider": self._identity, "image": hashlib.sha256(image).hexdigest(), "count": count}
        return await self._answers.get(question, ask)


def image_endpoint(url: str, limits: Limits | None = None, cache: Path | None = None) -> WebImageProvider:
    """An endpoint that is POSTed the image file (multipart/form-data: the file `image`, and `count`) and answers JSON.

    {key:VARIABLE} in the address stands for the key in that environment variable. The answer is a list, or an object
    with one in `results`, `items`, `organic`, `data` or `hits`, of objects with `title` or `name` (or a text), `url`,
    `link` or `href`, and `thumbnail`, `thumbnailUrl`, `image` or `imageUrl`: an address, base64, or a data URL.
    Raises ToolError for what is no address, and without the keys.
    """
    purpose = "the image search endpoint"
    address = check_address(fill_keys(url, purpose, in_url=True), purpose)
    web = Web(purpose, limits)

    async def ask(image: bytes, count: int) -> list[ImageHit]:
        files, data = {"image": _file(image)}, {"count": str(count)}
        return await web.fetch("POST", address, _hits, "check its address and key", files=files, data=data)

    return WebImageProvider(f"endpoint {url}", ask, cache)


def serper_lens(upload: str, limits: Limits | None = None, cache: Path | None = None) -> WebImageProvider:
    """Google Lens by Serper: POST {SERPER}/lens with SERPER_API_KEY as X-API-KEY and the public `url` of an image.

    The images of a rollout have no address, so each is first uploaded: `upload` is POSTed the file (multipart, as
    `file`), and answers its public address, as JSON with `url` or `link`, or as plain text. What is
    uploaded can be seen by whoever the address reaches. {key:VARIABLE} is as in `image_endpoint`. An answer has
    `organic` of `title`, `link`, `thumbnailUrl`, `imageUrl`; one without it found nothing. https://serper.dev
    """
    purpose = "the upload endpoint"
    headers = {"X-API-KEY": read_key("SERPER_API_KEY", "serper")}
    address = check_address(fill_keys(upload, purpose, in_url=True), purpose)
    web, uploads = Web("serper", limits), Web(purpose, limits)

    def read(body: bytes) -> list[ImageHit]:
        return image_hits(organic(body))

    async def ask(image: bytes, count: int) -> list[ImageHit]:
        files = {"file": _file(image)}
        url = await uploads.fetch("POST", address, _address, "check its address and key", files=files)
        advice = "check the key in SERPER_API_KEY, and what is left of its credits"
        return await web.fetch("POST", f"{SERPER}/lens", read, advice, json={"url": url}, headers=headers)

    return WebImageProvider(f"serper {SERPER}", ask, cache)


class ImageTable:
    """Hits that were found before, in a JSONL file: a line has `sha256` and `results`, which are as endpoints answer.

    `sha256` is the hash of an image's file, or of its pixels (`hash_pixels`), which other files of the picture share.
    A thumbnail may also be the path of an image file, relative to the table. An image that is not in the table, as a
    crop, finds nothing. Raises ToolError that names the line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[bytes, int] = {}  # where the line of a hash begins
        try:
            with path.open("rb") as lines:
                place = 0
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        self._places[self._hash(line, number)] = place
                    place += len(line)
        except OSError as error:
            raise ToolError(f"the image table {path} cannot be read: {error}") from error

    def __str__(self) -> str:
        return f"table {self.path}"

    def _hash(self, line: bytes, number: int) -> bytes:
        try:
            row = json.loads(line)
            if not isinstance(row["results"], list):
                raise TypeError("results is no list")
            digest = bytes.fromhex(row["sha256"])
            if len(digest) != 32:
                raise ValueError("sha256 has other than 64 hexadecimal digits")
        except (ValueError, KeyError, TypeError) as error:
            form = 'a line is an object with "sha256", of 64 hexadecimal digits, and a list "results"'
            raise ToolError(f"{self.path}:{number}: {form} ({type(error).__name__}: {error})") from error
        return digest

    async def search(self, image: bytes, count: int) -> list[ImageHit]:
        found: list[ImageHit] = await Worker().run(lambda: self.find(image, count))
        return found

    def find(self, image: bytes, count: int) -> list[ImageHit]:
        place = self._places.get(hashlib.sha256(image).digest())
        if place is None:
            place = self._places.get(bytes.fromhex(hash_pixels(image)))
        if place is None:
            return []
        with self.path.open("rb") as lines:
            lines.seek(place)
            hits = image_hits(json.loads(lines.readline())["results"])[:count]
        return [hit._replace(thumbnail=self._thumbnail(hit.thumbnail)) for hit in hits]

    def _thumbnail(self, thumbnail: str) -> str:
        if len(thumbnail) < 1000 and not thumbnail.startswith(("http://", "https://", "data:")):
            path = self.path.parent / thumbnail
            if path.is_file():
                return base64.b64encode(path.read_bytes()).decode()
        return thumbnail


def hash_pixels(image: bytes) -> str:
    """The SHA-256 of an image's size and RGB pixels, in hexadecimal: the same for all lossless files of a picture."""
    with PIL.Image.open(io.BytesIO(image)) as opened:
        pixels = opened.convert("RGB")
    return hashlib.sha256(f"{pixels.width}x{pixels.height}:".encode() + pixels.tobytes()).hexdigest()


def image_hits(found: Iterable[Any]) -> list[ImageHit]:
    """The hits in the objects of an answer; those with neither a title nor a thumbnail are left out."""
    hits = []
    for item in found:
        if isinstance(item, dict):
            title, link, thumbnail = (first(item, keys) for keys in ((*TITLES, *TEXTS), LINKS, THUMBNAILS))
            if title or thumbnail:
                hits.append(ImageHit(title, link, thumbnail))
    return hits


def _file(image: bytes) -> tuple[str, bytes, str]:
    """The image as httpx takes a file of a form: name, content, media type."""
    with PIL.Image.open(io.BytesIO(image)) as opened:
        kind = (opened.format or "PNG").lower()
    return f"image.{kind}", image, f"image/{kind}"


def _address(body: bytes) -> str:
    """The public address that an upload answers. Raises ValueError."""
    text = body.decode().strip()
    if not text.startswith(("http://", "https://")):
        answer = read_json(body)
        text = first(answer, LINKS) if isinstance(answer, dict) else ""
    if not text.startswith(("http://", "https://")) or len(text.split()) != 1:
        raise ValueError("the answer to the upload holds no address")
    return text


def _hits(body: bytes) -> list[ImageHit]:
    return image_hits(items(read_json(body)))
