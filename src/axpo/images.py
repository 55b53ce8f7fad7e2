"""Images as the model sees them: one way to open a file, for the prompt, for the data and for the tools.

What the model sees and what a tool crops must be the same picture: turned as its EXIF data says, 8 bits a channel, and
over white where it is transparent (`qwen_vl_utils` does so too). Of an animation or a file of several pages it is the
first.
"""

import io
import struct
import threading
from collections import OrderedDict
from concurrent.futures import Future

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageFile

MAX_PIXELS = 2**28  # 16,384 × 16,384; decoded it takes 1 GiB
MAX_ASPECT = 100  # a side may be so many times the other in what tools show: image processors refuse 200
_KEPT = 2**29  # bytes of images that stay decoded
_TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}

# The common formats first, and all of them now: later, two threads could do it at once.
PIL.Image.preinit()
PIL.Image.init()


class ImageError(ValueError):
    """An image that does not open."""


class ImageTooLargeError(ImageError):
    """An image of more than MAX_PIXELS pixels. It was not decoded."""


def open_image(data: bytes) -> PIL.Image.Image:
    """The picture in an encoded file, of mode "RGB", or "L" where it has neither colours nor transparency.

    The pictures opened last are kept and shared by all who ask for them, in any thread: do not change one in place.
    Raises ImageError, or ImageTooLargeError.
    """
    return _opened.get(data)


def check_image(data: bytes) -> None:
    """Raises ImageError where `open_image` would; a JPEG is read to its end, but decoded at an eighth of its size."""
    _decode(data, small=True)


def crop(image: PIL.Image.Image, box: tuple[int, int, int, int]) -> PIL.Image.Image:
    """The pixels (left, top, right, bottom) of a picture. Other than PIL's own, it crops without a limit on pixels."""
    if box == (0, 0, *image.size):
        return image
    left, top, right, bottom = box
    part = PIL.Image.new(image.mode, (right - left, bottom - top))
    part.paste(image, (-left, -top))
    return part


def as_seen(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image in mode "RGB" or "L": over white where it is transparent, and of 8 bits a channel.

    16 bits lose their lower half. Of 32-bit integers that leave the range of 16 bits, the least becomes black and the
    largest white. Floats have the first of these scales that holds them all: 0 to 1, to 255, to 65535, from the least
    to the largest; NaN is black. Raises ValueError for a mode that PIL cannot convert.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey(image)
    if image.has_transparency_data:
        solid = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = PIL.Image.new("RGB", image.size, "white")
        white.paste(solid, mask=solid)
        return white
    mode = "L" if image.mode in ("1", "L") else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _grey(image: PIL.Image.Image) -> PIL.Image.Image:
    values = np.asarray(image)
    finite = values[np.isfinite(values)] if image.mode == "F" else values
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if image.mode != "F" and low >= 0 and high <= 65535:
        grey = (values >> 8).astype(np.uint8)
    else:
        if image.mode == "F" and low >= 0 and high <= 65535:
            low, high = 0.0, next(scale for scale in (1.0, 255.0, 65535.0) if high <= scale)
        scaled = (values - np.float64(low)) * 255 / ((high - low) or 1.0)
        grey = np.nan_to_num(scaled, nan=0, posinf=255, neginf=0).round().astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 255
    return PIL.Image.fromarray(grey)


class _Opened:
    """The pictures that were opened last. Threads that want the same one wait for the first of them to decode it."""

    def __init__(self, limit: int) -> None:
        """`limit` is in bytes, files included; a single larger picture is kept until the next one comes."""
        self._limit = limit
        self._lock = threading.Lock()
        self._pictures: OrderedDict[bytes, PIL.Image.Image] = OrderedDict()
        self._decoding: dict[bytes, Future[PIL.Image.Image]] = {}

    def get(self, data: bytes) -> PIL.Image.Image:
        with self._lock:
            if data in self._pictures:
                self._pictures.move_to_end(data)
                return self._pictures[data]
            waiting = self._decoding.get(data)
            if waiting is None:
                decoding = self._decoding[data] = Future()
        if waiting is not None:
            return waiting.result()
        try:
            picture = _decode(data)
        except BaseException as error:
            with self._lock:
                del self._decoding[data]
            decoding.set_exception(error)
            raise
        with self._lock:
            del self._decoding[data]
            self._pictures[data] = picture
            while len(self._pictures) > 1 and self._held() > self._limit:
                self._pictures.popitem(last=False)
        decoding.set_result(picture)
        return picture

    def _held(self) -> int:
        # PIL keeps four bytes for a pixel of three colours.
        return sum(
            len(data) + picture.width * picture.height * (4 if picture.mode == "RGB" else 1)
            for data, picture in self._pictures.items()
        )


_opened = _Opened(_KEPT)


def _decode(data: bytes, small: bool = False) -> PIL.Image.Image:
    try:
        image = _header(data)
        if image.width * image.height > MAX_PIXELS:
            raise ImageTooLargeError(f"it has {image.width} × {image.height} pixels, and {MAX_PIXELS:,} are allowed")
        if small:
            image.draft(image.mode, (1, 1))
        _rescale_transparency(image)
        image.load()
        turn = _TURNS.get(_orientation(image))
        picture = as_seen(image)
        return picture if turn is None else picture.transpose(turn)
    except (ImageError, MemoryError):
        raise
    except PIL.Image.DecompressionBombError as error:
        raise ImageTooLargeError(str(error)) from error
    except Exception as error:  # of a broken file, PIL's parsers raise whatever they stumble over
        raise ImageError(str(error) or type(error).__name__) from error


def _header(data: bytes) -> PIL.ImageFile.ImageFile:
    """The image that a file holds, not yet decoded.

    `PIL.Image.open` would refuse, or warn of, images over a limit that belongs to the whole process.
    """
    for name in PIL.Image.ID:
        factory, accept = PIL.Image.OPEN[name]
        try:
            accepted = accept is None or accept(data[:16])
            if accepted and not isinstance(accepted, str):  # a text says what is not installed
                return factory(io.BytesIO(data), "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # how a factory says that it is of another format
            continue
    raise ImageError("it is broken, or of no format that is known")


def _rescale_transparency(image: PIL.ImageFile.ImageFile) -> None:
    """PIL scales the values of PNGs of 2, 4 and 16 bits to 8, but not the one of them that is transparent."""
    if image.format != "PNG" or not image.tile:
        return
    transparent, bits = image.info.get("transparency"), image.tile[0][3]
    if isinstance(transparent, int) and bits in ("L;2", "L;4"):
        image.info["transparency"] = transparent * (85 if bits == "L;2" else 17)
    elif isinstance(transparent, tuple) and bits == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in transparent)


def _orientation(image: PIL.Image.Image) -> int:
    try:
        return int(image.getexif().get(PIL.ExifTags.Base.Orientation, 1))
    except Exception:  # viewers show an image with broken EXIF data as it is stored
        return 1
