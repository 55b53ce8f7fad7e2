"""Opening images: the pixels of every kind of file by hand, what is refused, and that each is decoded once."""

import contextlib
import io
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from axpo import images
from axpo.images import ImageError, ImageTooLargeError, as_seen, check_image, crop, open_image


def saved(image: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def of(mode: str, *values: Any) -> PIL.Image.Image:
    """An image of one row."""
    image = PIL.Image.new(mode, (len(values), 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    return image


def png(size: tuple[int, int], depth: int, colour: int, row: bytes, **chunks: bytes) -> bytes:
    """A PNG written by hand, of equal rows: colour 0 is grey, 2 RGB, 4 grey and alpha."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    middle = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    body = chunk(b"IDAT", zlib.compress((b"\0" + row) * size[1])) if row else b""
    return b"\x89PNG\r\n\x1a\n" + header + middle + body + chunk(b"IEND", b"")


def palette(alpha: bytes | int | None = None) -> bytes:
    image = of("P", 0, 1, 2)
    image.putpalette([10, 20, 30, 200, 100, 0, 7, 7, 7])
    return saved(image) if alpha is None else saved(image, transparency=alpha)


def animated(kind: str, **options: Any) -> bytes:
    first, second = PIL.Image.new("RGB", (1, 1), (255, 0, 0)), PIL.Image.new("RGB", (1, 1), (0, 0, 255))
    return saved(first, kind, save_all=True, append_images=[second], **options)


def pixels(image: PIL.Image.Image) -> list[tuple[int, ...]]:
    return [tuple(pixel) for pixel in np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()]


def grey(*values: int) -> list[tuple[int, ...]]:
    return [(value,) * 3 for value in values]


WHITE = (255, 255, 255)
FILES: dict[str, tuple[bytes, list[tuple[int, ...]]]] = {
    "RGB": (saved(of("RGB", (1, 2, 3), (250, 0, 9))), [(1, 2, 3), (250, 0, 9)]),
    "L": (saved(of("L", 0, 77, 255)), grey(0, 77, 255)),
    "1": (saved(of("1", 0, 255)), grey(0, 255)),
    "P": (palette(), [(10, 20, 30), (200, 100, 0), (7, 7, 7)]),
    "P, one colour transparent": (palette(1), [(10, 20, 30), WHITE, (7, 7, 7)]),
    # 51 of 255 is a fifth: 10/5 + 4/5 of 255 is 206, 20/5 + 204 is 208, 30/5 + 204 is 210.
    "P, an alpha for each colour": (palette(bytes([51, 0, 255])), [(206, 208, 210), WHITE, (7, 7, 7)]),
    "LA": (saved(of("LA", (100, 51), (9, 0), (9, 255))), grey(224, 255, 9)),
    "RGBA": (saved(of("RGBA", (10, 20, 30, 51), (9, 9, 9, 0), (1, 2, 3, 255))), [(206, 208, 210), WHITE, (1, 2, 3)]),
    "grey of 1 bit, white transparent": (png((2, 1), 1, 0, b"\x40", tRNS=b"\0\1"), grey(0, 255)),
    "grey of 1 bit, black transparent": (png((2, 1), 1, 0, b"\x40", tRNS=b"\0\0"), grey(255, 255)),
    "grey of 2 bits, 2 transparent": (png((4, 1), 2, 0, b"\x1b", tRNS=b"\0\2"), grey(0, 85, 255, 255)),
    "grey of 4 bits, 3 transparent": (png((3, 1), 4, 0, b"\x3f\x10", tRNS=b"\0\3"), grey(255, 255, 17)),
    "grey of 8 bits, 3 transparent": (png((3, 1), 8, 0, b"\x03\x04\xff", tRNS=b"\0\3"), grey(255, 4, 255)),
    "grey of 16 bits": (png((3, 1), 16, 0, b"\0\xff\x80\x01\xff\xff"), grey(0, 128, 255)),
    "grey of 16 bits, transparent": (png((2, 1), 16, 0, b"\x03\x10\x03\x11", tRNS=b"\x03\x10"), grey(255, 3)),
    "grey and alpha of 16 bits": (png((2, 1), 16, 4, b"\x64\0\x33\0\x10\0\xff\xff"), grey(224, 16)),
    "RGB, transparent": (png((2, 1), 8, 2, b"\1\2\3\4\5\6", tRNS=b"\0\1\0\2\0\3"), [WHITE, (4, 5, 6)]),
    "RGB of 16 bits": (png((1, 1), 16, 2, b"\1\2\3\4\xff\6"), [(1, 3, 255)]),
    "RGB of 16 bits, transparent": (
        png((2, 1), 16, 2, b"\1\2\3\4\5\6\1\2\3\4\7\6", tRNS=b"\1\2\3\4\5\6"),
        [WHITE, (1, 3, 7)],
    ),
    "I;16": (saved(of("I;16", 0, 0x80FF, 65535), "TIFF"), grey(0, 128, 255)),
    "I;16B": (saved(of("I;16B", 0, 0x80FF, 65535), "TIFF"), grey(0, 128, 255)),
    "I of 16 bits": (b"P5 3 1 65535\n\0\xff\x80\xff\xff\xff", grey(0, 128, 255)),
    "I beyond 16 bits": (saved(of("I", 100_000, 150_000, 200_000), "TIFF"), grey(0, 128, 255)),
    "I below 0": (saved(of("I", -50, 0, 50), "TIFF"), grey(0, 128, 255)),
    "I, one value far off": (saved(of("I", 70_000, 70_000), "TIFF"), grey(0, 0)),
    "F to 1": (saved(of("F", 0.0, 0.2, 1.0), "TIFF"), grey(0, 51, 255)),
    "F to 255": (saved(of("F", 0.0, 100.4, 254.6), "TIFF"), grey(0, 100, 255)),
    "F to 65535": (saved(of("F", 0.0, 25700.0, 65535.0), "TIFF"), grey(0, 100, 255)),
    "F of any scale": (saved(of("F", -10.0, 0.0, 1e6), "TIFF"), grey(0, 0, 255)),
    "F with gaps": (saved(of("F", float("nan"), 1.0, float("inf"), float("-inf")), "TIFF"), grey(0, 255, 255, 0)),
    "F without a number": (saved(of("F", float("nan")), "TIFF"), grey(0)),
    # Without black, the inks of 55, 155 and 255 leave 200, 100 and 0; black of 127 takes a half: 100, 50 and 0.
    "CMYK": (saved(of("CMYK", (55, 155, 255, 0), (55, 155, 255, 127)), "TIFF"), [(200, 100, 0), (100, 50, 0)]),
    "GIF": (saved(of("L", 0, 77, 255), "GIF"), grey(0, 77, 255)),
    "GIF, transparent": (saved(of("L", 0, 77, 255), "GIF", transparency=77), grey(0, 255, 255)),
    "GIF, animated": (animated("GIF"), [(255, 0, 0)]),
    "PNG, animated": (animated("PNG"), [(255, 0, 0)]),
    "WebP, animated": (animated("WEBP", lossless=True), [(255, 0, 0)]),
    "TIFF of two pages": (animated("TIFF"), [(255, 0, 0)]),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_by_hand(name: str) -> None:
    data, expected = FILES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = open_image(data)
        check_image(data)
    assert image.mode in ("L", "RGB")
    assert pixels(image) == expected


def test_a_jpeg_of_four_inks_is_not_a_negative() -> None:
    """PIL writes and reads them as Adobe does: inverted. White paper is no ink."""
    data = saved(PIL.Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG", quality=100)
    assert b"Adobe" in data
    assert pixels(open_image(data)) == [WHITE] * 256
    black = saved(PIL.Image.new("CMYK", (16, 16), (0, 0, 0, 255)), "JPEG", quality=100)
    assert pixels(open_image(black)) == [(0, 0, 0)] * 256


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (of("RGBa", (2, 4, 6, 51), (0, 0, 0, 0)), [(206, 208, 210), WHITE]),  # 10, 20, 30 times a fifth
        (PIL.Image.frombytes("La", (2, 1), b"\x14\x33\0\0"), grey(224, 255)),
        (of("RGBX", (1, 2, 3, 9)), [(1, 2, 3)]),
        (of("HSV", (0, 0, 200)), grey(200)),
        (of("YCbCr", (90, 128, 128)), grey(90)),
    ],
)
def test_modes_of_images_in_memory(image: PIL.Image.Image, expected: list[tuple[int, ...]]) -> None:
    assert pixels(as_seen(image)) == expected


def test_a_palette_with_an_alpha_channel() -> None:
    image = PIL.Image.frombytes("PA", (3, 1), bytes([0, 51, 1, 0, 1, 255]))
    image.putpalette([10, 20, 30, 200, 100, 0])
    assert image.mode == "PA"
    assert pixels(as_seen(image)) == [(206, 208, 210), WHITE, (200, 100, 0)]


def test_a_plain_picture_is_not_copied() -> None:
    for mode in ("RGB", "L"):
        image = PIL.Image.new(mode, (2, 2))
        assert as_seen(image) is image


TURNS: dict[int, Callable[[Any], Any]] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda a: np.rot90(a, -1),  # clockwise
    7: lambda a: np.rot90(np.transpose(a), 2),
    8: np.rot90,
    9: lambda a: a,  # there is no such orientation
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_a_picture_is_turned_once_as_its_exif_data_says(kind: str, orientation: int) -> None:
    stored = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    image = PIL.Image.fromarray(stored)
    data = saved(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(np.asarray(open_image(data).convert("L")), TURNS[orientation](stored))


@pytest.mark.parametrize("exif", [b"Exif\0\0junk", b"Exif\0\0MM\0*\0\0\0\x08\0", b"Exif\0\0II*\0\xff\xff\xff\xff"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_data_is_ignored(exif: bytes) -> None:
    data = saved(PIL.Image.new("RGB", (16, 8), (255, 255, 255)), "JPEG", exif=exif)
    assert open_image(data).size == (16, 8)


def test_an_rgb_png_has_its_own_pixels() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(open_image(saved(PIL.Image.fromarray(noise)))), noise)


def test_a_crop() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    for values in (noise, noise[..., 0]):
        part = crop(PIL.Image.fromarray(values), (5, 7, 50, 30))
        assert np.array_equal(np.asarray(part), values[7:30, 5:50])


# What does not open

PICTURE = PIL.Image.effect_noise((40, 30), 60)
KINDS = [saved(PICTURE.convert("RGB"), kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "JPEG2000")]


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"BM", *[whole[:-99] for whole in KINDS]])
@pytest.mark.parametrize("opening", [open_image, check_image])
def test_broken_and_truncated_files(data: bytes, opening: Callable[[bytes], Any]) -> None:
    with pytest.raises(ImageError):
        opening(data)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(st.sampled_from(KINDS), st.data())
def test_a_damaged_file_opens_or_is_refused(whole: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(whole)
    for _ in range(draw.draw(st.integers(1, 5))):
        damaged[draw.draw(st.integers(0, len(whole) - 1))] = draw.draw(st.integers(0, 255))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "MAX_PIXELS", 10_000)
        for opening in (open_image, check_image):
            with contextlib.suppress(ImageError):
                opening(bytes(damaged))


def test_the_limit_is_in_pixels_and_read_off_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = png((16_385, 16_384), 8, 2, b"")
    for opening in (open_image, check_image):
        with pytest.raises(ImageTooLargeError, match=r"16385 × 16384 pixels, and 268,435,456 are allowed"):
            opening(bomb)
    with pytest.raises(ImageError) as refused:  # of a size that is allowed, but there is nothing in it
        check_image(png((16_384, 16_384), 8, 2, b""))
    assert not isinstance(refused.value, ImageTooLargeError)
    monkeypatch.setattr(images, "MAX_PIXELS", 6)
    assert open_image(saved(PIL.Image.new("RGB", (2, 3)))).size == (2, 3)
    with pytest.raises(ImageTooLargeError):
        open_image(saved(PIL.Image.new("RGB", (7, 1))))


@pytest.mark.parametrize("limit", [40, 70, None])  # PIL refuses what passes twice its limit, and warns below that
def test_the_limit_of_pil_does_not_matter(limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", limit)
    data = saved(PIL.Image.new("RGB", (10, 10), (limit or 0, 0, 0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_image(data)
        assert crop(open_image(data), (0, 0, 10, 9)).size == (10, 9)
    assert limit == PIL.Image.MAX_IMAGE_PIXELS


# Decoding once


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What is decoded from here on, in order; each takes 50 ms longer."""
    files: list[bytes] = []
    decode = images._decode

    def slow(data: bytes) -> PIL.Image.Image:
        files.append(data)
        time.sleep(0.05)
        return decode(data)

    monkeypatch.setattr(images, "_decode", slow)
    return files


def in_threads(number: int, work: Callable[[], Any]) -> list[Any]:
    outcomes: list[Any] = []

    def run() -> None:
        try:
            outcomes.append(work())
        except Exception as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_threads_share_one_decoding(decoded: list[bytes]) -> None:
    opened = images._Opened(10**9)
    data = saved(PIL.Image.new("RGB", (5, 5)))
    pictures = in_threads(8, lambda: opened.get(data))
    assert len(pictures) == 8
    assert all(picture is pictures[0] for picture in pictures)
    assert opened.get(bytes(bytearray(data))) is pictures[0]  # equal bytes, another object
    assert len(decoded) == 1


def test_different_images_are_decoded_side_by_side(decoded: list[bytes]) -> None:
    opened = images._Opened(10**9)
    files = [saved(PIL.Image.new("L", (5, 5), level)) for level in range(8)]
    waiting = iter(files)
    began = time.monotonic()
    assert len(in_threads(8, lambda: opened.get(next(waiting)))) == 8
    assert time.monotonic() - began < 0.3  # one after another would take 0.4 s
    assert sorted(decoded) == sorted(files)


def test_a_failure_reaches_all_who_wait_and_is_not_kept(decoded: list[bytes]) -> None:
    opened = images._Opened(10**9)
    outcomes = in_threads(4, lambda: opened.get(b"broken"))
    assert [type(outcome) for outcome in outcomes] == [ImageError] * 4
    before = len(decoded)
    assert before == 1
    with pytest.raises(ImageError):
        opened.get(b"broken")
    assert len(decoded) == before + 1


def test_what_was_not_used_for_longest_is_forgotten(decoded: list[bytes]) -> None:
    """A picture of 10 × 10 takes 400 bytes in colour and 100 in grey, and its file less than 100."""
    red, green, blue = (saved(PIL.Image.new("RGB", (10, 10), name)) for name in ("red", "green", "blue"))
    dark = saved(PIL.Image.new("L", (10, 10), 3))
    opened = images._Opened(1200)
    for data in (red, green, dark, red, blue):  # 200 too many with blue: green goes
        opened.get(data)
    assert decoded == [red, green, dark, blue]
    for data in (red, dark, blue):
        opened.get(data)
    assert len(decoded) == 4
    opened.get(green)
    assert decoded[4:] == [green]
    large = saved(PIL.Image.new("RGB", (100, 100)))
    opened.get(large)  # over the limit by itself: kept, alone
    opened.get(large)
    opened.get(green)
    assert decoded[5:] == [large, green]
