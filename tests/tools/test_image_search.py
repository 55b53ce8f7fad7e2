import asyncio
import base64
import hashlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from axpo.tools import image_providers
from axpo.tools.base import Conversation, SystemFault, Toolbox, ToolError, ToolResult
from axpo.tools.image_providers import ImageHit, ImageTable, hash_pixels, image_endpoint, serper_lens
from axpo.tools.image_search import make_image_search, shrink
from axpo.tools.web import Limits

QUICK = Limits(timeout=0.5, attempts=2, pause=0.01)


def picture(width: int, height: int, kind: str = "PNG", color: Any = (200, 100, 50), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    PIL.Image.new(mode, (width, height), color).save(file, kind)
    return file.getvalue()


IMAGE = picture(30, 20)


def size(file: bytes) -> tuple[int, int]:
    image = PIL.Image.open(io.BytesIO(file))
    assert image.format == "PNG"
    assert image.mode == "RGB"
    return image.size


def call(tool: Any, index: int = 0) -> ToolResult:
    return asyncio.run(Toolbox([tool]).call("image_search", {"img_idx": index}, Conversation([IMAGE])))


@pytest.fixture
def server(search_server: Any) -> Any:
    url = search_server.url
    search_server.results = [
        {"title": "A wide\n tower", "link": "https://a.example", "thumbnail": f"{url}/thumbnails/600.png"},
        {"title": "No picture", "link": "https://b.example", "thumbnail": f"{url}/nowhere.png"},
        {"title": "", "link": "https://c.example", "thumbnail": f"{url}/thumbnails/40.png"},
        {"title": "Plain"},
    ]
    return search_server


EXPECTED = "1. A wide tower (thumbnail 1)\n2. No picture\n3. https://c.example (thumbnail 2)\n4. Plain"


def test_titles_with_thumbnails(server: Any) -> None:
    result = call(make_image_search(image_endpoint(f"{server.url}/images", limits=QUICK)))
    assert result.text == EXPECTED
    assert [size(image) for image in result.images] == [(512, 512), (40, 40)]


def test_an_endpoint_is_sent_the_file(server: Any) -> None:
    provider = image_endpoint(f"{server.url}/images?k={{key:MY_KEY}}")
    call(make_image_search(provider))
    request = server.requests[0]
    assert request.query == {"k": server.key}
    assert request.headers["content-type"].startswith("multipart/form-data")
    assert b'name="image"; filename="image.png"\r\nContent-Type: image/png\r\n\r\n' + IMAGE in request.body
    assert b'name="count"\r\n\r\n5\r\n' in request.body
    assert server.key not in str(provider) + repr(provider)


def test_lens_is_sent_the_address_of_an_upload(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_providers, "SERPER", f"{server.url}/serper")
    provider = serper_lens(f"{server.url}/upload", limits=QUICK)
    assert call(make_image_search(provider)).text == EXPECTED
    upload, lens = server.requests[:2]
    assert IMAGE in upload.body
    assert upload.headers.get("x-api-key") is None, "the key is not for the upload"
    assert lens.json == {"url": f"{server.url}/uploaded.png"}
    server.results = []
    assert call(make_image_search(provider)) == ToolResult("No results.")


@pytest.mark.parametrize("answer", [{"url": "nowhere"}, [], "http://a b"])
def test_an_upload_without_an_address_is_a_fault(server: Any, answer: Any) -> None:
    server.answer = answer
    provider = serper_lens(f"{server.url}/any", limits=QUICK)
    with pytest.raises(SystemFault, match=r"the upload endpoint: .*holds no address"):
        call(make_image_search(provider))


def test_thumbnails_may_be_base64(server: Any) -> None:
    plain = base64.b64encode(picture(40, 50, "JPEG")).decode()
    server.results = [{"name": "A", "image": plain}, {"name": "B", "thumbnail": f"data:image/jpeg;base64,{plain}"}]
    server.results += [{"name": "C", "thumbnail": "not base64!"}, {"name": "D", "thumbnail": plain[:100]}]
    result = call(make_image_search(image_endpoint(f"{server.url}/images")))
    assert result.text == "1. A (thumbnail 1)\n2. B (thumbnail 2)\n3. C\n4. D"
    assert [size(image) for image in result.images] == [(40, 50)] * 2


@pytest.mark.parametrize("fault", ["500", "hang", "drip", "garbage", "truncated", "404"])
def test_a_thumbnail_that_cannot_be_had_is_left_out(server: Any, fault: str) -> None:
    server.results = server.results[:1]
    server.faults = ["", fault, fault]
    tool = make_image_search(image_endpoint(f"{server.url}/images"), limits=QUICK)
    assert call(tool) == ToolResult("1. A wide tower")
    server.faults = []
    assert call(tool).images, "nor is that kept"


def test_a_provider_that_fails_is_a_fault(server: Any) -> None:
    server.faults = ["500", "garbage"]
    with pytest.raises(SystemFault, match="the image search endpoint: JSONDecodeError"):
        call(make_image_search(image_endpoint(f"{server.url}/images", limits=QUICK)))
    assert len(server.requests) == 2


def test_a_run_is_repeated_from_the_cache(server: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server.results.pop(1)
    results = []
    with caplog.at_level(logging.DEBUG):
        for _ in range(2):
            provider = image_endpoint(f"{server.url}/images?k={{key:MY_KEY}}", cache=tmp_path)
            results.append(call(make_image_search(provider, cache=tmp_path)))
    assert results[0] == results[1]
    assert len(results[0].images) == 2
    assert len(server.requests) == 3
    kept = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert server.key not in kept + caplog.text
    assert "%2B" not in caplog.text


@pytest.mark.parametrize("damaged", [3, {}, [["A wide tower"]], [["A wide tower", "https://a.example", None]]])
def test_damage_to_the_cache_is_not_the_policys_fault(server: Any, tmp_path: Path, damaged: Any) -> None:
    tool = make_image_search(image_endpoint(f"{server.url}/images", cache=tmp_path), cache=tmp_path)
    call(tool)
    asked = len(server.requests)
    for path in tmp_path.rglob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"answer": damaged}))
    assert call(tool) == call(tool)
    assert call(tool).text == EXPECTED
    found = server.requests[asked:]
    assert [request.path for request in found].count("/images") == 1


def test_images_that_are_not_there() -> None:
    tool = make_image_search(image_endpoint("http://127.0.0.1:9"))
    for index in (1, -1):
        result = call(tool, index)
        assert result.fault == "bad_arguments"
        assert f"img_idx {index} names no image; the conversation has 1, from index 0." in result.text


def test_a_continued_rollout_does_not_ask_again(server: Any) -> None:
    toolbox = Toolbox([make_image_search(image_endpoint(f"{server.url}/images"))])
    call_text = '{"name": "image_search", "arguments": {"img_idx": 0}}'
    asyncio.run(toolbox.repeat(call_text, Conversation([IMAGE])))
    assert server.requests == []


def test_a_table(tmp_path: Path) -> None:
    (tmp_path / "thumbs").mkdir()
    (tmp_path / "thumbs" / "a.jpg").write_bytes(picture(50, 40, "JPEG"))
    other = picture(8, 9, color=(1, 2, 3))
    rows = [
        {"sha256": hash_pixels(other), "results": [{"title": "By pixels"}]},
        {
            "sha256": hashlib.sha256(IMAGE).hexdigest(),
            "results": [{"title": "By file", "url": "u", "thumbnail": "thumbs/a.jpg"}, {"title": "Two"}],
        },
    ]
    path = tmp_path / "table.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    table = ImageTable(path)
    result = call(make_image_search(table))
    assert result.text == "1. By file (thumbnail 1)\n2. Two"
    assert [size(image) for image in result.images] == [(50, 40)]
    assert [hit.title for hit in table.find(IMAGE, 1)] == ["By file"]
    assert table.find(picture(8, 9, "BMP", (1, 2, 3)), 5) == [ImageHit("By pixels", "", "")]
    assert table.find(picture(9, 8, color=(1, 2, 3)), 5) == []


@pytest.mark.parametrize(
    "line", ["no json", "[]", '{"sha256": "ab", "results": []}', '{"results": []}', '{"sha256": 3, "results": []}']
)
def test_a_table_with_a_bad_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "table.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(ToolError, match=r"table\.jsonl:2: a line is an object with .sha256."):
        ImageTable(path)
    with pytest.raises(ToolError, match=r"nowhere\.jsonl cannot be read"):
        ImageTable(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(("width", "height", "fits"), [(1024, 600, (512, 300)), (100, 300, (100, 300)), (3, 3, (3, 3))])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_pictures_are_made_small(width: int, height: int, fits: tuple[int, int], kind: str) -> None:
    assert size(shrink(picture(width, height, kind))) == fits


def test_what_is_transparent_becomes_white() -> None:
    small = PIL.Image.open(io.BytesIO(shrink(picture(9, 9, color=(0, 0, 0, 0), mode="RGBA"))))
    assert small.getpixel((4, 4)) == (255, 255, 255)


def test_sixteen_bits_lose_their_lower_half() -> None:
    small = PIL.Image.open(io.BytesIO(shrink(picture(9, 9, color=0x4012, mode="I;16"))))
    assert small.getpixel((4, 4)) == (0x40, 0x40, 0x40)


@pytest.mark.parametrize(
    "file",
    [b"", b"<svg/>", IMAGE[:40], picture(6000, 5000), picture(1010, 10), picture(9, 9, "TIFF"), b"x" * 4_000_001],
    ids=["empty", "svg", "short", "large", "thin", "tiff", "long"],
)
def test_what_is_no_fit_picture(file: bytes) -> None:
    with pytest.raises(ValueError, match="picture"):
        shrink(file)
