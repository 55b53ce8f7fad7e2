"""The zoom tool of Qwen3-VL agents: a crop of the original image, enlarged.

It does what Qwen-Agent's `image_zoom_in_qwen3vl.py` does, but for these: where the box is under 32 pixels, only that
side grows, and to 32 also at the edge of the image (there both grow in proportion, are cut off at the edge, and stay
small where that leaves one side under 32); fractions of a pixel are rounded outwards; the image is turned as its EXIF
data says; a negative index is an error; and the schema says "integer" for an index.
"""

import math

import PIL.Image

from axpo.images import MAX_ASPECT, ImageError, ImageTooLargeError, crop, open_image
from axpo.tools.base import Conversation, PolicyFault, SystemFault, Tool, encode_png

SIDE = 32  # pixels a vision token covers: the least side of a crop, and what both sides of the result are multiples of
MOST_PIXELS = 12_845_056  # of a result; larger crops are reduced


def make_zoom(min_pixels: int = 262_144) -> Tool:
    """The tool `image_zoom_in_tool`, whose result has at least `min_pixels` pixels.

    262,144 is the value of Qwen-Agent; SenseNova-MARS takes 65,536. A box is (x1, y1, x2, y2), relative to the indexed
    image on a scale of 0 to 1000. It is clamped to the image; an empty or reversed box, and one wholly outside, are the
    policy's fault, as are an index without an image and an image that is too large to open.
    """

    def image_zoom_in_tool(bbox_2d: list[float], label: str, img_idx: int, conversation: Conversation) -> bytes:
        """Zoom in on a region of an image.

        Args:
            bbox_2d: [x1, y1, x2, y2], from 0 to 1000.
            label: What the region shows.
            img_idx: Index of the image, from 0.
        """
        images = conversation.images
        if not 0 <= img_idx < len(images):
            raise PolicyFault(f"img_idx {img_idx} names no image; the conversation has {len(images)}, from index 0.")
        try:
            image = open_image(images[img_idx])
        except ImageTooLargeError as error:
            raise PolicyFault(f"image {img_idx} is too large to zoom in: {error}.") from error
        except ImageError as error:
            raise SystemFault(f"image {img_idx} of the conversation does not open: {error}") from error
        box = crop_box(bbox_2d, *image.size)
        width, height = box[2] - box[0], box[3] - box[1]
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise PolicyFault(
                f"bbox_2d {_shown(bbox_2d)} is too thin: it is {width} × {height} pixels of the image, and one side "
                f"may be {MAX_ASPECT} times the other at most."
            )
        size = result_size(width, height, min_pixels)
        return encode_png(crop(image, box).resize(size, PIL.Image.Resampling.BICUBIC).convert("RGB"))

    image_zoom_in_tool.keeps = False  # type: ignore[attr-defined]
    return image_zoom_in_tool


def crop_box(bbox: list[float], width: int, height: int) -> tuple[int, int, int, int]:
    """The pixels (left, top, right, bottom) of a relative box in an image of width × height pixels.

    Raises PolicyFault for a box that is not four finite numbers, is empty, reversed or wholly outside.
    """
    if len(bbox) != 4:
        raise PolicyFault(f"bbox_2d takes the four numbers [x1, y1, x2, y2], not {len(bbox)}.")
    if not all(map(math.isfinite, bbox)):
        raise PolicyFault(f"bbox_2d takes the four numbers [x1, y1, x2, y2], not {_shown(bbox)}.")
    x1, y1, x2, y2 = bbox
    if x1 >= x2 or y1 >= y2:
        raise PolicyFault(f"bbox_2d {_shown(bbox)} is empty or reversed: x1 < x2 and y1 < y2 must hold.")
    if x2 <= 0 or y2 <= 0 or x1 >= 1000 or y1 >= 1000:
        raise PolicyFault(f"bbox_2d {_shown(bbox)} lies outside the image, which spans 0 to 1000.")
    left, right = _span(x1, x2, width)
    top, bottom = _span(y1, y2, height)
    return left, top, right, bottom


def _span(low: float, high: float, size: int) -> tuple[int, int]:
    """One side of the box in pixels: clamped, rounded outwards, at least SIDE long where the image is."""
    start = math.floor(max(low, 0) * size / 1000)
    end = math.ceil(min(high, 1000) * size / 1000)
    length = min(max(end - start, SIDE), size)
    if length > end - start:
        start = min(max((start + end - length) // 2, 0), size - length)
        end = start + length
    return start, end


def _shown(bbox: list[float]) -> str:
    return f"[{', '.join(f'{value:g}' for value in bbox)}]"


def result_size(width: int, height: int, min_pixels: int) -> tuple[int, int]:
    """The size nearest to width × height whose sides are multiples of SIDE and that has at least `min_pixels`.

    The aspect is kept as far as that allows, and the size is at most MOST_PIXELS where `min_pixels` is smaller
    (`smart_resize` of Qwen-Agent).
    """
    sides = [max(SIDE, round(side / SIDE) * SIDE) for side in (width, height)]
    if sides[0] * sides[1] > MOST_PIXELS:
        scale = math.sqrt(MOST_PIXELS / (width * height))
        sides = [max(SIDE, math.floor(side * scale / SIDE + 1e-9) * SIDE) for side in (width, height)]
    if sides[0] * sides[1] < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        # Less a trifle, so that rounding errors do not add a whole step.
        sides = [math.ceil(side * scale / SIDE - 1e-9) * SIDE for side in (width, height)]
    return sides[0], sides[1]
