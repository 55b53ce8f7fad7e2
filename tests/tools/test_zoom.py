import asyncio
import io
import json
import math
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from axpo import images
from axpo.images import open_image
from axpo.tools.base import Conversation, PolicyFault, SystemFault, Toolbox, ToolResult, encode_png
from axpo.tools.zoom import crop_box, make_zoom, result_size


def gradient(width: int, height: int) -> PIL.Image.Image:
    """Each pixel tells where it is: red is x, green is y."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width)
    pixels[..., 1] = np.arange(height)[:, None]
    return PIL.Image.fromarray(pixels)


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def zoom(conversation: Conversation, bbox: Any, index: Any = 0, min_pixels: int = 1) -> ToolResult:
    toolbox = Toolbox([make_zoom(min_pixels)])
    arguments = {"bbox_2d": bbox, "label": "spot", "img_idx": index}
    call = json.dumps({"name": "image_zoom_in_tool", "arguments": arguments})
    return asyncio.run(toolbox.run(call, conversation))


def pixels(result: ToolResult) -> np.ndarray[Any, Any]:
    (data,) = result.images
    image = PIL.Image.open(io.BytesIO(data))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return np.asarray(image)


@pytest.mark.parametrize(
    ("bbox", "size", "box"),
    [
        ([100, 200, 300, 400], (1000, 500), (100, 100, 300, 200)),
        ([0, 0, 1000, 1000], (1000, 500), (0, 0, 1000, 500)),
        ([-50, -50, 500, 2000], (1000, 500), (0, 0, 500, 500)),  # clamped
        ([100.5, 0, 199.5, 1000], (1000, 500), (100, 0, 200, 500)),  # rounded outwards
        ([500, 500, 510, 520], (1000, 500), (489, 239, 521, 271)),  # 10 px about 505 and about 255, grown to 32
        ([995, 990, 1000, 1000], (1000, 500), (968, 468, 1000, 500)),  # grown, then shifted inside
        ([0, 0, 1, 1], (1000, 500), (0, 0, 32, 32)),
        ([100, 100, 900, 110], (1000, 500), (100, 36, 900, 68)),  # y 50 to 55: only the short side grows
        ([0, 0, 500, 500], (20, 100), (0, 0, 20, 50)),  # the image has no 32 px
        ([999.9999999999999, 0, 1000, 1000], (1000, 500), (968, 0, 1000, 500)),
    ],
)
def test_boxes_in_pixels(bbox: list[float], size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    assert crop_box(bbox, *size) == box


@pytest.mark.parametrize(
    ("size", "min_pixels", "result"),
    [
        ((32, 32), 262_144, (512, 512)),
        ((64, 32), 262_144, (736, 384)),  # times 11.31: 724.1 and 362.0, rounded up
        ((33, 33), 262_144, (512, 512)),
        ((21, 525), 262_144, (128, 2560)),  # times 512/105: 102.4, and 2560 without a rounding error on top
        ((1000, 500), 262_144, (992, 512)),  # large enough: the nearest multiples
        ((20, 50), 1, (32, 64)),
        ((64, 64), 128 * 128, (128, 128)),
        ((1, 1), 262_144, (512, 512)),
        ((1, 100), 262_144, (64, 5120)),  # times 51.2: 51.2 and 5120
        ((3584, 3584), 262_144, (3584, 3584)),  # 12,845,056 pixels exactly
        ((8192, 8192), 262_144, (3584, 3584)),
        ((16_000, 4000), 262_144, (7168, 1792)),  # times 0.448
        ((16_000, 4100), 262_144, (7072, 1792)),  # times 0.4425: 7080.1 and 1814.3, rounded down
        ((8192, 8192), 16_000_000, (4000, 4000)),  # the least size goes before the largest
    ],
)
def test_sizes_after_enlarging(size: tuple[int, int], min_pixels: int, result: tuple[int, int]) -> None:
    assert result_size(*size, min_pixels) == result


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(1, 1_000_000))
def test_every_enlarged_image_is_of_whole_tokens_and_large_enough(width: int, height: int, min_pixels: int) -> None:
    wide, high = result_size(width, height, min_pixels)
    assert wide % 32 == high % 32 == 0
    assert wide * high >= min_pixels
    if max(width, height) <= 100 * min(width, height):
        assert wide * high <= 12_845_056
        assert max(wide, high) < 200 * min(wide, high)  # or image processors refuse it


coordinate = st.floats(-200, 1200)


@given(coordinate, coordinate, coordinate, coordinate, st.integers(1, 3000), st.integers(1, 3000))
def test_every_box_is_a_fault_or_lies_inside(
    x1: float, y1: float, x2: float, y2: float, width: int, height: int
) -> None:
    visible = max(x1, 0) < min(x2, 1000) and max(y1, 0) < min(y2, 1000)
    if not visible:
        with pytest.raises(PolicyFault):
            crop_box([x1, y1, x2, y2], width, height)
        return
    left, top, right, bottom = crop_box([x1, y1, x2, y2], width, height)
    for low, high, a, b, size in ((x1, x2, left, right, width), (y1, y2, top, bottom, height)):
        assert 0 <= a < b <= size
        assert b - a >= min(32, size)
        assert a <= max(low, 0) * size / 1000 + 1e-6
        assert b >= min(high, 1000) * size / 1000 - 1e-6


def test_the_crop_shows_exactly_the_box() -> None:
    conversation = Conversation([encoded(gradient(250, 200))])
    shown = pixels(zoom(conversation, [400, 320, 656, 640]))  # x 100 to 164, y 64 to 128
    assert np.array_equal(shown, np.asarray(gradient(250, 200))[64:128, 100:164])


def test_the_original_is_enlarged_to_the_least_size() -> None:
    conversation = Conversation([encoded(gradient(250, 200))])
    shown = pixels(zoom(conversation, [400, 320, 656, 640], min_pixels=262_144))
    assert shown.shape == (512, 512, 3)
    # Eight pixels for one: the middle of each block has the value of its source, to rounding.
    assert np.abs(shown[4::8, 4::8, 0].astype(int) - np.arange(100, 164)).max() <= 1
    assert np.abs(shown[4::8, 4::8, 1].astype(int) - np.arange(64, 128)[:, None]).max() <= 1


def test_images_of_tools_are_counted_too() -> None:
    first, second = PIL.Image.new("RGB", (64, 64), "red"), PIL.Image.new("RGB", (64, 64), "blue")
    conversation = Conversation([encoded(first)])
    assert zoom(conversation, [0, 0, 1000, 1000], index=1).fault == "bad_arguments"
    conversation.images.append(encoded(second))
    assert pixels(zoom(conversation, [0, 0, 1000, 1000], index=1))[0, 0].tolist() == [0, 0, 255]
    assert pixels(zoom(conversation, [0, 0, 1000, 1000], index=0))[0, 0].tolist() == [255, 0, 0]


def test_a_rotated_photo_is_cropped_as_it_is_seen() -> None:
    upright = PIL.Image.new("RGB", (64, 128), "red")
    upright.paste("blue", (0, 0, 64, 64))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # stored on its side: to be turned clockwise when shown
    stored = encoded(upright.transpose(PIL.Image.Transpose.ROTATE_90), exif=exif)
    shown = pixels(zoom(Conversation([stored]), [0, 0, 1000, 500]))
    assert shown.shape == (64, 64, 3)
    assert np.array_equal(shown, np.full_like(shown, (0, 0, 255)))


def awkward() -> dict[str, bytes]:
    """Pictures of 96 × 64 that look other than they are stored, in one way or another."""
    noise = np.random.default_rng(3).integers(0, 256, (64, 96, 4), dtype=np.uint8)
    colour, clear = PIL.Image.fromarray(noise[..., :3]), PIL.Image.fromarray(noise)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    stored = colour.transpose(PIL.Image.Transpose.ROTATE_90)
    return {
        "RGB": encoded(colour),
        "RGBA": encoded(clear),
        "LA": encoded(clear.convert("LA")),
        "L": encoded(colour.convert("L")),
        "1": encoded(colour.convert("1")),
        "P": encoded(colour.convert("P"), transparency=5),
        "RGB, one colour transparent": encoded(colour, transparency=tuple(noise[0, 0, :3].tolist())),
        "I;16": encoded(PIL.Image.fromarray(noise[..., 0].astype(np.uint16) * 256 + 9)),
        "F": encoded(PIL.Image.fromarray(noise[..., 0].astype(np.float32)), "TIFF"),
        "CMYK": encoded(colour.convert("CMYK"), "JPEG"),
        "turned": encoded(stored, exif=exif),
        "GIF": encoded(colour, "GIF", save_all=True, append_images=[colour.rotate(180)]),
    }


@pytest.mark.parametrize("name", awkward())
def test_what_is_cropped_is_what_the_model_sees(name: str) -> None:
    data = awkward()[name]
    seen = np.asarray(open_image(data).convert("RGB"))
    assert seen.shape == (64, 96, 3)
    assert len(np.unique(seen)) > 1
    assert np.array_equal(pixels(zoom(Conversation([data]), [0, 0, 1000, 1000])), seen)
    right = pixels(zoom(Conversation([data]), [334, 0, 1000, 1000]))  # pixels 32 to 96
    assert np.array_equal(right, seen[:, 32:])


@pytest.mark.parametrize(
    ("bbox", "index", "complaint"),
    [
        ([300, 0, 200, 100], 0, "x1 < x2"),
        ([0, 100, 200, 100], 0, "y1 < y2"),
        ([1000, 0, 1100, 100], 0, "outside the image"),
        ([-100, 0, 0, 100], 0, "outside the image"),
        ([0, 1200, 100, 1300], 0, "outside the image"),
        ([0, -10, 100, -5], 0, "outside the image"),
        ([0, 0, 100], 0, "four numbers"),
        ([0, 0, 100, 100, 5], 0, "four numbers"),
        ([math.nan, 0, 100, 100], 0, "finite"),
        ([0, 0, math.inf, 100], 0, "finite"),
        ([0, 0, 100, 100], 1, "has 1, from index 0"),
        ([0, 0, 100, 100], -1, "has 1, from index 0"),
        ([300, 200, 200, 100], 0, "empty or reversed"),
        ([0, 0, 100], 0, "not 3"),
        ([], 0, "not 0"),
        ([0.0] * 10_000, 0, "not 10000"),
        ([5, 5, 5, 5], 0, "[5, 5, 5, 5] is empty"),
        ([1e300, 0, 1e301, 100], 0, "outside the image"),
        ([10**400, 0, 0, 100], 0, "bbox_2d[0]"),
        (["0", 0, 100, 100], 0, "bbox_2d[0]"),
        ([True, 0, 100, 100], 0, "bbox_2d[0]"),
        ([None, 0, 100, 100], 0, "bbox_2d[0]"),
        ([[0, 0, 100, 100]], 0, "bbox_2d[0]"),
        ("[0, 0, 100, 100]", 0, "valid array"),
        ({"x1": 0}, 0, "valid array"),
        (None, 0, "valid array"),
        (7, 0, "valid array"),
        ([0, 0, 100, 100], 10**30, "has 1, from index 0"),
        ([0, 0, 100, 100], 0.5, "img_idx"),
        ([0, 0, 100, 100], "0", "img_idx"),
    ],
)
def test_faults_of_the_policy(bbox: Any, index: Any, complaint: str) -> None:
    result = zoom(Conversation([encoded(gradient(100, 100))]), bbox, index)
    assert result.fault == "bad_arguments"
    assert complaint in result.text
    assert len(result.text) < 300
    assert result.images == ()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_box_that_is_not_finite(bad: float) -> None:
    for place in range(4):
        bbox = [0.0, 0.0, 100.0, 100.0]
        bbox[place] = bad
        with pytest.raises(PolicyFault, match="four numbers"):
            crop_box(bbox, 100, 100)


def test_an_image_that_does_not_open_is_not_the_fault_of_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("axpo.tools.base.RETRY_AFTER", ())
    with pytest.raises(SystemFault):
        zoom(Conversation([b"no image"]), [0, 0, 100, 100])


def test_the_schema_is_that_of_the_qwen_agents() -> None:
    (schema,) = Toolbox([make_zoom()]).schemas
    assert schema["function"]["name"] == "image_zoom_in_tool"
    parameters = schema["function"]["parameters"]
    assert parameters["required"] == ["bbox_2d", "label", "img_idx"]
    types = {name: field["type"] for name, field in parameters["properties"].items()}
    assert types == {"bbox_2d": "array", "label": "string", "img_idx": "integer"}


@pytest.mark.parametrize(
    ("size", "bbox", "crop"),
    [
        ((7680, 320), [0, 500, 1000, 501], "7680 × 32 pixels"),
        ((1, 500), [0, 0, 1000, 1000], "1 × 500 pixels"),
        ((500, 1), [0, 0, 1000, 1000], "500 × 1 pixels"),
    ],
)
def test_a_crop_too_thin_for_an_image_processor_is_the_policys_fault(
    size: tuple[int, int], bbox: list[float], crop: str
) -> None:
    result = zoom(Conversation([encode_png(PIL.Image.new("RGB", size))]), bbox)
    assert result.fault == "bad_arguments"
    assert "too thin" in result.text
    assert crop in result.text


@given(st.integers(1, 90), st.integers(1, 90), st.lists(st.integers(-300, 1300), min_size=4, max_size=4))
def test_any_box_of_a_small_image_is_cropped_or_refused(width: int, height: int, bbox: list[float]) -> None:
    data = encode_png(gradient(width, height))
    result = zoom(Conversation([data]), bbox)
    if result.fault:
        assert (result.fault, "bbox_2d" in result.text) == ("bad_arguments", True)
        return
    image = PIL.Image.open(io.BytesIO(result.images[0]))
    left, top, right, bottom = crop_box(bbox, width, height)
    assert image.size == result_size(right - left, bottom - top, 1)
    part = np.asarray(gradient(width, height))[top:bottom, left:right]
    resized = PIL.Image.fromarray(np.ascontiguousarray(part)).resize(image.size, PIL.Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(image), np.asarray(resized))


def test_an_image_that_is_too_large_is_the_policys_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation([encoded(gradient(100, 100))])
    monkeypatch.setattr(images, "MAX_PIXELS", 9_999)
    monkeypatch.setattr(images, "_opened", images._Opened(10**9))
    result = zoom(conversation, [0, 0, 500, 500])
    assert result.fault == "bad_arguments"
    assert "image 0 is too large to zoom in: it has 100 × 100 pixels, and 9,999 are allowed." in result.text


def test_many_rollouts_decode_an_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data, decoded, decode = encoded(gradient(251, 200)), [], images._decode
    monkeypatch.setattr(images, "_decode", lambda data: decoded.append(data) or decode(data))
    toolbox = Toolbox([make_zoom(1)])

    async def rollout() -> list[ToolResult]:
        calls = ({"bbox_2d": [x, 0, x + 500, 1000], "label": "", "img_idx": 0} for x in (0, 200, 400))
        return [await toolbox.call("image_zoom_in_tool", call, Conversation([data])) for call in calls]

    async def all_rollouts() -> list[list[ToolResult]]:
        return await asyncio.gather(*(rollout() for _ in range(8)))

    results = asyncio.run(all_rollouts())
    assert decoded.count(data) == 1  # the others are the crops
    assert all(result == results[0] for result in results)
    assert len({result.images for result in results[0]}) == 3
