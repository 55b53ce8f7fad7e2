"""The model's own chat template, in token ids.

Built on the tokenizer, its template and the PIL image processor; `AutoProcessor` is not used, because it
insists on torchvision for its video half. Ids are only ever appended: an observation is the suffix that the
template renders after a finished assistant turn, and the conversation itself is never rendered again.
"""

import hashlib
import re
import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import jinja2
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from axpo.images import open_image
from axpo.tree import CallSpan, Image

Message = Mapping[str, Any]

STOP = "<|im_end|>"
IMAGE = "<|image_pad|>"
THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
_TAGS = frozenset({THINK, END_THINK, CALL, END_CALL})
_SENTINEL = "axpo-sentinel"
_PROBE_TOOL = {
    "type": "function",
    "function": {"name": "axpo_probe", "description": "", "parameters": {"type": "object", "properties": {}}},
}
_CACHED_PATCHES = 32_768  # 200 MB of pixels at 1,536 values a patch


class ChatError(ValueError):
    """A checkpoint, a conversation or an image that cannot be put into tokens."""


@dataclass(frozen=True)
class Turn:
    """What one turn of the policy holds, in token indices of that turn.

    `thinking_end` is the index just past `</think>`: 0 for a turn without thinking, None where thinking never
    ends. `call_texts` are what stands between the tags, stripped.
    `answer` is the text after the thinking without the calls, stripped.
    """

    thinking_end: int | None
    calls: tuple[CallSpan, ...]
    call_texts: tuple[str, ...]
    answer: str


class Chat:
    """Renders conversations into ids and reads the policy's turns.

    `stop_id` ends a turn; `banned_ids` are the special tokens that a policy must never write (vision
    placeholders, padding, role markers); `image_token_id` is None and `merge_size` 1 for a text-only model;
    `opens_thinking` tells whether the generation prompt already holds the opening `<think>`.
    """

    def __init__(self, tokenizer: Any, image_processor: Any | None = None) -> None:
        """Raises ChatError where the tokenizer or its template cannot serve a tool-using agent."""
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        special = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special and str(t) not in _TAGS}
        self._special_ids = frozenset(special)
        self._special_text = _alternatives(special.values())
        self._added_text = _alternatives(map(str, tokenizer.added_tokens_decoder.values()))
        self._bytes: dict[int, bytes] = {}
        self._pixels: OrderedDict[bytes, tuple[torch.Tensor, tuple[int, int, int]]] = OrderedDict()
        self._lock = threading.Lock()  # an engine may prepare images in a thread of its own
        self.stop_id: int = self._required_id(STOP)
        self.image_token_id: int | None = None if image_processor is None else self._required_id(IMAGE)
        self.merge_size: int = 1 if image_processor is None else image_processor.merge_size
        self.pad_id: int = self.stop_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.banned_ids: tuple[int, ...] = tuple(sorted(self._special_ids - {self.stop_id}))
        self._check_template()
        self.opens_thinking: bool = self._opens_thinking()

    @classmethod
    def from_pretrained(cls, path: str | Path, max_pixels: int | None = None) -> "Chat":
        """Load the tokenizer, template and image processor of a checkpoint, but no weights.

        `max_pixels` lowers the largest size, in pixels, that an image is resized to. Raises ChatError where
        `path` is not a checkpoint, its template is missing or knows no tools, or `max_pixels` is impossible.
        """
        if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
            raise ChatError(f"{path} is not a checkpoint: it holds no config.json")
        try:
            config = AutoConfig.from_pretrained(path)
            vision = getattr(config, "vision_config", None) is not None
            tokenizer = AutoTokenizer.from_pretrained(path)
            processor = AutoImageProcessor.from_pretrained(path) if vision else None  # type: ignore[no-untyped-call]
        except (OSError, ValueError, KeyError) as error:
            raise ChatError(f"{path} is not a checkpoint that can be opened: {error}") from error
        _check_architecture(path, config, vision)
        if processor is not None and max_pixels is not None:
            least = (processor.patch_size * processor.merge_size) ** 2
            if max_pixels < least:
                raise ChatError(f"max_pixels is {max_pixels}, but one image token of this model takes {least}")
            longest = min(max_pixels, processor.size["longest_edge"])
            shortest = min(max_pixels, processor.size["shortest_edge"])
            processor.size = {"shortest_edge": shortest, "longest_edge": longest}
        return cls(tokenizer, processor)

    def shorten(self, text: str, tokens: int) -> str:
        """The beginning of a text, at most so many tokens of it."""
        places = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text if len(places) <= tokens else text[: places[tokens - 1][1]]

    def save(self, folder: Path) -> None:
        """Write the tokenizer, its template and the image processor beside a model's weights."""
        self.tokenizer.save_pretrained(folder)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(folder)

    # Rendering

    def prompt(
        self, messages: Sequence[Message], image_bytes: Sequence[bytes], tools: Sequence[dict[str, Any]]
    ) -> tuple[list[int], tuple[Image, ...]]:
        """The ids of a conversation up to where the policy begins to write, and its images.

        A message is {"role", "content"}, the content a text or a list of {"type": "text", "text"} and
        {"type": "image"}; the images are given apart, in the order in which they appear. Special tokens spelled
        out in the texts are broken, so that they stay text. Raises ChatError where images and their places
        do not match, or an image does not open (named by its index).
        """
        messages = [self._plain(message, self._special_text) for message in messages]
        places = sum(
            part["type"] == "image" for m in messages if not isinstance(m["content"], str) for part in m["content"]
        )
        if places != len(image_bytes):
            raise ChatError(f"the messages have places for {places} images, but {len(image_bytes)} are given")
        images = tuple(self._encode_images(image_bytes))
        return self._expand(self._ids(self._render(messages, tools)), images), images

    def observation(self, results: Sequence[tuple[str, Sequence[bytes]]]) -> tuple[list[int], tuple[Image, ...]]:
        """The ids that follow a policy turn's `<|im_end|>`, up to where the policy writes on, and their images.

        Each result is the text and the images of one tool call, rendered as one tool message, the images after
        the text. Added tokens spelled out in the texts, tags included, are broken. Raises ChatError without
        any result, and where an image does not open (named by its index among all of them).
        """
        if not results:
            raise ChatError("an observation needs at least one tool result")
        messages = [self._plain(_tool_message(text, len(data)), self._added_text) for text, data in results]
        images = tuple(self._encode_images([data for _, many in results for data in many]))
        return self._expand(self._ids(self._after_turn(messages)), images), images

    def reply(self, text: str) -> list[int]:
        """The ids of a user's message that follow a policy turn's `<|im_end|>`, up to where the policy writes on."""
        return self._ids(self._after_turn([self._plain({"role": "user", "content": text}, self._added_text)]))

    def turn(self, text: str) -> list[int]:
        """The ids of a policy turn that a teacher wrote, its `<|im_end|>` included; tags become their tokens.

        Raises ChatError where the text holds a token that a policy must not write.
        """
        ids = self._ids(text + STOP)
        if banned := {self.tokenizer.convert_ids_to_tokens(i) for i in ids if i in self.banned_ids}:
            raise ChatError(f"a policy turn cannot hold {', '.join(sorted(banned))}")
        return ids

    def _render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), prompt: bool = True) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt
            )
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as error:
            raise ChatError(f"the chat template cannot render these messages: {error}") from error
        return text

    def _after_turn(self, messages: Sequence[Message]) -> str:
        """What the template writes after the `<|im_end|>` of an assistant turn, with a call for each tool's message.

        The conversation is a dummy, so nothing of the real one is rendered again.
        """
        call = {"type": "function", "function": {"name": "axpo_probe", "arguments": {}}}
        said: dict[str, Any] = {"role": "assistant", "content": _SENTINEL}
        if calls := [call for message in messages if message["role"] == "tool"]:
            said["tool_calls"] = calls
        text = self._render([{"role": "user", "content": "?"}, said, *messages], [_PROBE_TOOL])
        _, found, rest = text.partition(_SENTINEL)
        _, stopped, observation = rest.partition(STOP)
        if not found or not stopped:
            raise ChatError(f"the chat template does not end an assistant turn with {STOP}")
        return observation

    def _plain(self, message: Message, control: "re.Pattern[str] | None") -> dict[str, Any]:
        """The message with control tokens in its texts broken, and neighbouring texts joined first."""
        content = message.get("content") or ""
        if isinstance(content, str):
            return {**message, "content": _broken(content, control)}
        parts: list[dict[str, str]] = []
        for kind, run in groupby(content, key=lambda part: part.get("type")):
            if kind not in ("text", "image"):
                raise ChatError(f"a part of a message has type {kind!r}: allowed are 'text' and 'image'")
            if kind == "text":
                parts.append({"type": "text", "text": _broken("".join(part["text"] for part in run), control)})
            else:
                parts.extend({"type": "image"} for _ in run)
        if all(part["type"] == "text" for part in parts):  # templates of text-only models know no lists
            return {**message, "content": "".join(part["text"] for part in parts)}
        return {**message, "content": parts}

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _expand(self, ids: Sequence[int], images: Sequence[Image]) -> list[int]:
        """Repeat each image's placeholder as often as the image has tokens."""
        if not images:
            return list(ids)
        places = ids.count(self.image_token_id)
        if places != len(images):
            raise ChatError(f"the chat template wrote {places} image placeholders for {len(images)} images")
        waiting = iter(images)
        expanded: list[int] = []
        for i in ids:
            expanded.extend([i] * next(waiting).tokens if i == self.image_token_id else [i])
        return expanded

    # Images

    def encode_image(self, data: bytes) -> Image:
        """Open an encoded image and measure it as the model will see it. Raises ChatError where it does not open."""
        patches, grid = self._processed(data)
        return Image(data, grid, len(patches) // self.merge_size**2)

    def seen_size(self, image: Image) -> tuple[int, int]:
        """The width and height in pixels that the model sees of an image."""
        assert self.image_processor is not None, "there are no images without one"
        _, height, width = image.grid
        return width * self.image_processor.patch_size, height * self.image_processor.patch_size

    def pixels(self, images: Sequence[Image]) -> tuple[torch.Tensor, torch.Tensor]:
        """The vision encoder's input: patches (P, dim) float32 of all images in order, and grids (n, 3)."""
        processed = [self._processed(image.data) for image in images]
        return torch.cat([p for p, _ in processed]), torch.tensor([grid for _, grid in processed])

    def forget_images(self) -> None:
        """Give back the memory of images that were prepared already."""
        self._pixels.clear()

    def _encode_images(self, image_bytes: Sequence[bytes]) -> list[Image]:
        images = []
        for index, data in enumerate(image_bytes):
            try:
                images.append(self.encode_image(data))
            except ChatError as error:
                raise ChatError(f"image {index}: {error}") from error
        return images

    def _processed(self, data: bytes) -> tuple[torch.Tensor, tuple[int, int, int]]:
        if self.image_processor is None:
            raise ChatError("this model takes no images")
        key = hashlib.blake2b(data).digest()
        with self._lock:
            if key not in self._pixels:
                try:
                    picture = open_image(data).convert("RGB")
                    features = self.image_processor(images=[picture], return_tensors="pt")
                except ValueError as error:
                    raise ChatError(f"the image ({len(data)} bytes) does not open: {error}") from error
                t, h, w = features["image_grid_thw"][0].tolist()
                self._pixels[key] = (features["pixel_values"].float(), (t, h, w))
                while sum(len(p) for p, _ in self._pixels.values()) > _CACHED_PATCHES and len(self._pixels) > 1:
                    self._pixels.popitem(last=False)
            self._pixels.move_to_end(key)
            return self._pixels[key]

    # Reading

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; a special token stands for its own name."""
        if token_id not in self._bytes:
            if (added := self.tokenizer.added_tokens_decoder.get(token_id)) is not None:
                self._bytes[token_id] = str(added).encode()
            else:
                token = self.tokenizer.convert_ids_to_tokens(token_id) or ""
                self._bytes[token_id] = bytes(_BYTE_OF[char] for char in token if char in _BYTE_OF)
        return self._bytes[token_id]

    def parse(self, ids: Sequence[int]) -> Turn:
        """Find the thinking, the tool calls and the answer in the ids of one policy turn.

        Tags are found in the bytes of the tokens, so a tag may be one token or several. A call counts only
        after the thinking, and outside any that is opened again; it ends past its closing tag, or where the turn
        does (before `<|im_end|>`).
        """
        ids = list(ids)
        body = ids[: ids.index(self.stop_id)] if self.stop_id in ids else ids
        pieces = [b"" if i in self._special_ids else self.token_bytes(i) for i in body]
        text = b"".join(pieces)
        starts = list(accumulate(map(len, pieces), initial=0))  # (n + 1,) byte offset at which each token starts
        begin = 0
        if self.opens_thinking or text.lstrip().startswith(THINK.encode()):
            found = text.find(END_THINK.encode())
            if found < 0:
                return Turn(None, (), (), "")
            begin = found + len(END_THINK)
        calls, texts, outside = [], [], []
        position = begin
        while (opening := text.find(CALL.encode(), position)) >= 0:
            again = text.find(THINK.encode(), position, opening)
            if again >= 0:
                outside.append(text[position:again])
                ended = text.find(END_THINK.encode(), again)
                position = len(text) if ended < 0 else ended + len(END_THINK)
                continue
            inside = opening + len(CALL)
            closing = text.find(END_CALL.encode(), inside)
            end = len(text) if closing < 0 else closing + len(END_CALL)
            opened = bisect_left(starts, inside)
            calls.append(
                CallSpan(
                    start=bisect_right(starts, opening) - 1,
                    opened=opened if starts[opened] == inside else None,
                    end=bisect_left(starts, end),
                )
            )
            texts.append(_text(text[inside : len(text) if closing < 0 else closing]))
            outside.append(text[position:opening])
            position = end
        answer = _text(b"".join([*outside, text[position:]]))
        return Turn(bisect_left(starts, begin), tuple(calls), tuple(texts), answer)

    # Checks before anything is loaded

    def _required_id(self, token: str) -> int:
        token_id = self.tokenizer.get_vocab().get(token)
        if token_id is None or token_id not in self._special_ids:
            raise ChatError(f"the tokenizer has no special token {token}")
        return int(token_id)

    def _check_template(self) -> None:
        """Prove by rendering probes that the template knows tools, tool messages and images."""
        if self.tokenizer.chat_template is None:
            raise ChatError("the tokenizer has no chat template")
        probe = "Ünïcode 😀\n"
        if b"".join(map(self.token_bytes, self._ids(probe))) != probe.encode():
            raise ChatError("the tokenizer is not a byte-level BPE")
        user = {"role": "user", "content": "?"}
        if "axpo_probe" not in self._render([user], [_PROBE_TOOL]):
            raise ChatError("the chat template ignores tools: it does not list the ones that it is given")
        if "axpo-result" not in self._after_turn([_tool_message("axpo-result", 0)]):
            raise ChatError("the chat template does not support messages of role 'tool'")
        if self.image_processor is not None:
            for rendered in (
                self._render([{"role": "user", "content": [{"type": "image"}]}]),
                self._after_turn([_tool_message("axpo-result", 1)]),
            ):
                if rendered.count(IMAGE) != 1:
                    raise ChatError(f"the chat template does not write one {IMAGE} for an image")

    def _opens_thinking(self) -> bool:
        user = [{"role": "user", "content": "?"}]
        generation = self._render(user)[len(self._render(user, prompt=False)) :]
        return generation.rfind(THINK) > generation.rfind(END_THINK)


def _tool_message(text: str, images: int) -> dict[str, Any]:
    if not images:
        return {"role": "tool", "content": text}
    return {"role": "tool", "content": [{"type": "text", "text": text}, *[{"type": "image"}] * images]}


def _alternatives(tokens: Iterable[str]) -> "re.Pattern[str] | None":
    """A pattern that matches any of these tokens spelled out, or None without any."""
    words = sorted((t for t in tokens if len(t) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, words))) if words else None


def _check_architecture(path: str | Path, config: Any, vision: bool) -> None:
    if vision and not config.model_type.startswith("qwen3_vl"):
        raise ChatError(f"{path} is a vision-language model of type {config.model_type}; supported is Qwen3-VL")
    layers = set(getattr(config.get_text_config(), "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"}:
        raise ChatError(f"{path} has layers of {', '.join(sorted(layers))}; supported is full_attention alone")
    window = getattr(config.get_text_config(), "sliding_window", None)
    if window is not None and getattr(config.get_text_config(), "use_sliding_window", True):
        raise ChatError(f"{path} attends in a sliding window of {window}; supported is full attention alone")


def _broken(text: str, control: "re.Pattern[str] | None") -> str:
    """Put a space behind the first character of each control token: it reads the same, but stays text."""
    return text if control is None else control.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace").strip()


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte (`bytes_to_unicode` of GPT-2), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shifted = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(shifted)}


_BYTE_OF = _byte_alphabet()
