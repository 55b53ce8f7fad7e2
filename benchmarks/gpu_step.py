"""One update's forward and backward at the shape of Qwen3-VL-2B on a CUDA device: packed trees against rows.

    python benchmarks/gpu_step.py         (needs CUDA; ends with status 2 where there is none)

Random weights in bfloat16, every layer computed again for the gradient. No rollouts, no reference, no optimizer and
none of its memory: what packing changes, and nothing else. Each question's prompt holds an image; its rollouts form a
tree with one fork. Both sides train the same tokens with the same log-prob code, and must agree on their sum.
**Packed** encodes each image once and fills packs of `--pack-tokens`; **rows** encode it for each row, as a trainer
without trees does, under SDPA's causal kernel, as many rows at once as is fastest and fits.

`computed_tokens_per_second` counts what each side puts through the model, `trained_tokens_per_second` what comes of
it. `mfu` is the operations of flops.py over the device's dense bfloat16 peak (of its data sheet, or `--peak-tflops`);
what checkpointing computes again does not count.
"""

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from flops import attended, causal, text_flops, vision_flops
from forked import CONTINUATIONS, ROLLOUTS, Rows, make_tree, trained_paths
from timing import alternate, machine, options, ratio, shown, spread, table, write
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel, Qwen3VLConfig

from axpo.packing import pack_logprobs, pack_trees
from axpo.policy import update_forward, use_tree_attention
from axpo.tree import Image, RolloutTree

NO_CUDA = 2  # exit status
PEAK_TFLOPS = {  # dense bfloat16, by a part of the device's name; the first that fits
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "RTX 4090": 165,
}
TEXT = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [24, 20, 20]},
    "tie_word_embeddings": True,
}
VISION = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}
SPECIAL = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


class Size(NamedTuple):
    """Tokens of a prompt (its image's included) and of a rollout; the image's height and width in patches."""

    prompt: int
    length: int
    image: tuple[int, int]
    questions: int
    fork_at: float = 0.5


FULL = Size(prompt=1024, length=512, image=(28, 28), questions=4)
TINY = Size(prompt=24, length=8, image=(4, 4), questions=2)


def make_model(device: str, tiny: bool) -> PreTrainedModel:
    """Random weights, made on the device."""
    text, vision, special = TEXT, VISION, SPECIAL
    if tiny:
        rope = TEXT["rope_parameters"] | {"mrope_section": [6, 5, 5]}
        text = text | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
        text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "rope_parameters": rope}
        vision = vision | {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
        vision |= {"out_hidden_size": 64, "deepstack_visual_indexes": [0]}
        special = {name: 511 - index for index, name in enumerate(SPECIAL)}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **special)
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    return model.eval()


class RandomImages:
    """In place of a chat: what packing asks of one, with noise for every image."""

    def __init__(self, model: PreTrainedModel) -> None:
        vision = model.config.vision_config
        self.image_token_id = model.config.image_token_id
        self.merge_size = vision.spatial_merge_size
        self._width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2

    def pixels(self, images: Sequence[Image]) -> tuple[Tensor, Tensor]:
        noise = [torch.randn(int(np.prod(image.grid)), self._width, generator=_seeded(image)) for image in images]
        return torch.cat(noise), torch.tensor([image.grid for image in images])


def _seeded(image: Image) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(image.data))


def make_trees(size: Size, chat: RandomImages) -> list[RolloutTree]:
    """A tree with an image of its own for each question."""
    trees = []
    for index in range(size.questions):
        tokens = size.image[0] * size.image[1] // chat.merge_size**2
        places = [chat.image_token_id] * tokens
        tree = make_tree(size.prompt, size.length, size.fork_at, seed=index, placeholders=places)
        tree.root.images = (Image(index.to_bytes(2), (1, *size.image), tokens),)
        trees.append(tree)
    return trees


def finished(run: Callable[[], float], device: str) -> Callable[[], float]:
    """The run, waited for until the device has done it."""

    def waited() -> float:
        result = run()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return waited


def packed_step(model: PreTrainedModel, trees: Sequence[RolloutTree], chat: Any, banned: Tensor, limit: int) -> float:
    """Pack, forward and backward; the sum of the trained tokens' log-probs."""
    use_tree_attention(model)
    total = 0.0
    for pack in pack_trees(trees, chat, limit):
        with update_forward(model, checkpointing=True):
            loss = -pack_logprobs(model, pack, chat, banned).sum()
        loss.backward()
        total -= loss.item()
    model.zero_grad()
    return total


def rows_step(model: PreTrainedModel, rows: Rows, chat: Any, banned: Tensor, batch: int) -> float:
    """Forward and backward of so many rows at once; the same sum."""
    model.set_attn_implementation({"text_config": "sdpa"})
    with update_forward(model, checkpointing=True):
        return rows.step(model, banned, batch, chat.pixels)


def fastest_batch(step: Callable[[int], Callable[[], float]], count: int) -> int:
    """How many rows at once take the least time, among those that fit."""
    seconds: dict[int, float] = {}
    for batch in sorted({1, 4, 16, count}):
        try:
            seconds[batch] = alternate({"rows": step(batch)}, 1)["rows"][0]
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
    return min(seconds, key=lambda batch: seconds[batch])


def work(model: PreTrainedModel, trees: Sequence[RolloutTree], size: Size) -> dict[str, dict[str, float]]:
    """Tokens and operations of both sides."""
    paths = [path for tree in trees for path in trained_paths(tree)]
    lengths = [sum(map(len, path)) for path in paths]
    needed = {segment for path in paths for segment in path}
    trained = sum(len(s) for s in needed if s.credits)
    unique, patches = sum(map(len, needed)), size.image[0] * size.image[1]
    flops = {
        "packed": text_flops(model, unique, attended(paths), trained) + vision_flops(model, [patches] * len(trees)),
        "rows": text_flops(model, sum(lengths), sum(map(causal, lengths)), trained)
        + vision_flops(model, [patches] * len(paths)),
    }
    tokens = {"packed": unique, "rows": sum(lengths)}
    return {name: {"computed_tokens": tokens[name], "trained_tokens": trained, "flops": flops[name]} for name in tokens}


def peak_gb(run: Callable[[], float], device: str) -> float | None:
    """The most memory that the device held during a run, weights included."""
    if device != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 2**30


def peak_tflops(device: str, given: float | None) -> float | None:
    """What the device can do, where it is known."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return given or next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def compare(device: str, size: Size, tiny: bool, limit: int, runs: int, peak: float | None) -> dict[str, Any]:
    """Both sides' figures."""
    model = make_model(device, tiny)
    chat = RandomImages(model)
    banned = torch.tensor([chat.image_token_id], device=device)
    trees = make_trees(size, chat)
    rows = Rows.of(trees, chat.image_token_id, chat.merge_size)

    def in_rows(batch: int) -> Callable[[], float]:
        return finished(partial(rows_step, model, rows, chat, banned, batch), device)

    batch = fastest_batch(in_rows, len(rows.ids))
    steps = {
        "packed": finished(partial(packed_step, model, trees, chat, banned, limit), device),
        "rows": in_rows(batch),
    }
    found = {name: step() for name, step in steps.items()}
    if not np.isclose(found["packed"], found["rows"], rtol=1e-2):
        raise RuntimeError(f"packed and rows do not compute the same: {found}")
    seconds = alternate(steps, runs)
    sides = {}
    for name, done in work(model, trees, size).items():
        rates = {key: spread([done[key] / s for s in seconds[name]]) for key in ("computed_tokens", "trained_tokens")}
        sides[name] = done | {
            "seconds": spread(seconds[name]),
            **{f"{key}_per_second": rate for key, rate in rates.items()},
            "mfu": peak and spread([done["flops"] / s / peak / 1e12 for s in seconds[name]]),
            "peak_gb": peak_gb(steps[name], device),
        }
    return {"sides": sides, "rows_at_once": batch, "packed_over_rows": ratio(seconds["packed"], seconds["rows"])}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--questions", type=int, help="trees of one update")
    parser.add_argument("--pack-tokens", type=int, default=16384)
    parser.add_argument("--peak-tflops", type=float, help="the device's dense bfloat16 peak, for the utilisation")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that it runs")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("gpu_step needs a CUDA device, and torch sees none here", file=sys.stderr)
        sys.exit(NO_CUDA)
    size = TINY if chosen.tiny else FULL
    size = size._replace(questions=chosen.questions or size.questions)
    peak = peak_tflops(chosen.device, chosen.peak_tflops)
    found = compare(chosen.device, size, chosen.tiny, chosen.pack_tokens, chosen.runs, peak)
    name = torch.cuda.get_device_name() if chosen.device == "cuda" else "cpu"
    sizes = size._asdict() | {"rollouts": ROLLOUTS, "continuations": CONTINUATIONS, "runs": chosen.runs}
    sizes |= {"pack_tokens": chosen.pack_tokens, "tiny": chosen.tiny}
    result = {"machine": machine() | {"device": name, "peak_tflops": peak}, "sizes": sizes, **found}
    write("gpu_step", result, chosen.out)
    print(json.dumps(result))
    columns = ("seconds", "computed_tokens_per_second", "trained_tokens_per_second", "mfu")
    print(
        table(
            [
                {"side": side, **{key: figures[key] and shown(figures[key]) for key in columns}}
                | {"peak GB": figures["peak_gb"]}
                for side, figures in found["sides"].items()
            ]
        )
    )


if __name__ == "__main__":
    main()
