"""Pre-trains the miniature's base on dense tasks, from nothing.

    python -m axpo.miniature.pretrain --steps 500 --out src/axpo/miniature/base

The base learns what a foundation model brings along: to point at a place of a picture, to read a digit that is
large enough, to copy names and numbers into code and queries, to find a fact in a text, to write a call that
is spelled out for it. It never sees a question of the world together with the tools, nor a whole trajectory.
Progress is kept beside the output and taken up again when the command is repeated.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from axpo.chat import Chat
from axpo.miniature import base
from axpo.miniature.scene import Plaque, draw_crop, draw_scene
from axpo.miniature.teacher import THOUGHTS
from axpo.miniature.tools import call_text, tools, zoom_call
from axpo.miniature.world import (
    DIVISORS,
    FACTS,
    corpus,
    describe,
    sample_facts,
    sample_land,
    sample_problems,
    sample_scene,
)
from axpo.packing import pack_logprobs, pack_trees
from axpo.policy import banned_tokens
from axpo.tools.base import Toolbox
from axpo.tree import Credit, Kind, RolloutTree

PEAK_RATE = 2e-3
WARM_UP = 50
COOL_DOWN = 0.3  # of the steps, at the end

Exchange = tuple[str, str]  # what is asked, what is to be answered


def look(rng: np.random.Generator) -> tuple[list[bytes], list[Exchange]]:
    """Say what is at a place of a scene; point at it, in the format of Qwen's grounding; zoom when told to."""
    scene = sample_scene(rng)
    seen, pointed, zoomed = (scene[int(rng.integers(len(scene)))] for _ in range(3))
    box = json.dumps({"bbox_2d": list(pointed.box), "label": pointed.name})
    return [draw_scene(scene, rng)], [
        (f"What is in {seen.place}?", seen.name),
        (f"Where is the {pointed.name} in {pointed.place}?", box),
        (f"Zoom in on the {zoomed.name} in {zoomed.place}.", zoom_call(zoomed.box, zoomed.name)),
    ]


def read(rng: np.random.Generator) -> tuple[list[bytes], list[Exchange]]:
    """Read the digit in a close view."""
    plaque = sample_scene(rng, 1, 1)[0]
    plaque = Plaque(plaque.colour, plaque.shape, plaque.cell, int(rng.integers(10)))
    return [draw_crop(plaque, rng)], [("Read the digit.", str(plaque.digit))]


def compute(rng: np.random.Generator) -> tuple[list[bytes], list[Exchange]]:
    """Put numbers into code; read a result off."""
    a, b, divisor = int(rng.integers(12, 100)), int(rng.integers(12, 100)), int(rng.choice(DIVISORS))
    code = f"print({a} * {b} % {divisor})"
    result = int(rng.integers(0, 12 if rng.random() < 0.7 else 10_000))
    return [], [
        (f"Code for the remainder of {a} * {b} divided by {divisor}?", json.dumps({"code": code})),
        (f"Run {code}", call_text("python", {"code": code})),
        (f"<tool_response>\n{result}\n</tool_response>\nWhat is the result?", str(result)),
    ]


def find(rng: np.random.Generator) -> tuple[list[bytes], list[Exchange]]:
    """Find a fact about made-up lands in a text; put a name into a query."""
    names = list(dict.fromkeys(sample_land(rng) for _ in range(4)))[:3]
    facts = {name: sample_facts(rng, favoured=0.0) for name in names}
    documents = [describe(name, facts[name]) for name in names]
    text = "\n".join(f"{i}. {d['title']}: {d['text']}" for i, d in enumerate(documents, 1))
    asked, kind = str(rng.choice(names)), str(rng.choice(list(FACTS)))
    # Mostly the first document, as it is for whoever searches well; the others keep the base reading.
    if rng.random() < 0.5:
        asked = names[0]
    return [], [
        (f"<tool_response>\n{text}\n</tool_response>\nWhat is the {kind} of {asked}?", facts[asked][kind]),
        (f"What to search for {asked}?", json.dumps({"query": asked})),
        (f"Search for {asked}", call_text("search", {"query": asked})),
    ]


# How many of each task in a step: reading pictures first, then finding facts in texts.
FIRST = {look: 8, read: 28, compute: 4, find: 8}
LATER = {look: 8, read: 12, compute: 8, find: 16}
LATER_FROM = 250


def make_tree(chat: Chat, images: list[bytes], exchanges: list[Exchange], name: str) -> RolloutTree:
    """All exchanges over the same pictures as branches of one tree, so that each picture is encoded once."""
    marker = "axpo-question"
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": marker}]
    ids, encoded = chat.prompt([{"role": "user", "content": content}], images, [])
    text = chat.tokenizer.encode(marker, add_special_tokens=False)
    at = next(i for i in range(len(ids)) if ids[i : i + len(text)] == text)
    tree = RolloutTree(name, ids[:at], encoded)
    for asked, answer in exchanges:
        question = chat.tokenizer.encode(asked, add_special_tokens=False)
        branch = tree.append(tree.root, Kind.OBSERVATION, question + ids[at + len(text) :])
        reply = chat.turn(f"\n</think>\n\n{answer}")
        segment = tree.append(branch, Kind.POLICY, reply, [0.0] * len(reply))
        segment.credit = Credit(1.0, len(reply))
    return tree


def world_text() -> Iterator[str]:
    """What the tokenizer is trained on."""
    schemas = Toolbox(tools()).schemas
    rng = np.random.default_rng(1)
    for problem in sample_problems(300, seed=1):
        yield str(problem.question.messages[0]["content"][-1]["text"])
    for document in corpus():
        yield f"{document['title']}: {document['text']}"
    for task in FIRST:
        for _ in range(60):
            for asked, answer in task(rng)[1]:
                yield f"{asked}\n{answer}"
    for thought in THOUGHTS:
        yield from [thought] * 20
    for _ in range(40):
        yield base.TEMPLATE.read_text().split("# Tools")[1].split("<|im_end|>")[0]
        yield "\n".join(json.dumps(schema) for schema in schemas)
        yield "system user assistant <answer> </answer> Error: Traceback (most recent call last):"


def learning_rate(step: int, steps: int) -> float:
    """Warm up, stay, and fall linearly to zero."""
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP, (steps - step) / (COOL_DOWN * steps))


def train(out: Path, steps: int, seed: int = 0) -> None:
    """Train, or go on training, and write the base into `out`."""
    tokenizer = base.build_tokenizer(list(world_text()))
    chat = Chat(tokenizer, base.build_image_processor())
    model = base.build_model(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    progress = out.with_suffix(".progress.pt")
    step = 0
    if progress.exists():
        state = torch.load(progress, weights_only=True)
        step = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    banned = banned_tokens(chat, model)
    model.train()
    started = time.time()
    while step < steps:
        losses = train_step(model, chat, optimizer, banned, step, learning_rate(step, steps), seed)
        step += 1
        if step % 25 == 0:
            shown = " ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
            print(f"step {step} {time.time() - started:.0f}s {shown}", flush=True)
        if step % 100 == 0 or step == steps:
            state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, progress.with_suffix(".tmp"))
            os.replace(progress.with_suffix(".tmp"), progress)
            save_base(model, chat, out)
    progress.unlink()


def train_step(
    model: PreTrainedModel,
    chat: Chat,
    optimizer: torch.optim.Optimizer,
    banned: torch.Tensor,
    step: int,
    rate: float,
    seed: int,
) -> dict[str, float]:
    """One step over every task; returns the mean loss a token of each."""
    losses = {}
    for number, (task, count) in enumerate((FIRST if step < LATER_FROM else LATER).items()):
        rng = np.random.default_rng([seed, step, number])
        trees = [make_tree(chat, *task(rng), f"{task.__name__}-{i}") for i in range(count)]
        total = 0.0
        packs = pack_trees(trees, chat, 4000)
        tokens = sum(len(pack.targets) for pack in packs)
        for pack in packs:
            # A digit of a box or of a picture is what is to be learned; words around it are cheap.
            loss = -pack_logprobs(model, pack, chat, banned).sum() / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        losses[task.__name__] = total
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return losses


def save_base(model: PreTrainedModel, chat: Chat, out: Path) -> None:
    """A `from_pretrained` folder, its weights in bfloat16 to keep the package small."""
    out.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(out)
    chat.save(out)
    tied = "lm_head.weight"
    weights = {
        name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.state_dict().items() if name != tied
    }
    save_file(weights, out / "model.safetensors.tmp", metadata={"format": "pt"})
    os.replace(out / "model.safetensors.tmp", out / "model.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=base.BASE)
    arguments = parser.parse_args()
    train(arguments.out, arguments.steps)
