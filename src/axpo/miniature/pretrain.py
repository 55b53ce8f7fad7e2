"""Pre-trains the miniature's base on dense tasks, from nothing.

    python -m axpo.miniature.pretrain --out src/axpo/miniature/base

The base learns what a foundation model brings along: to point at a place of a picture, to read a digit that is
large enough, to copy names and numbers into code and queries, to find a fact in a text, to carry out a call that a
question spells out and read what comes back. It is never shown which call helps.
`--stage` trains one stage on what the one before has left; of the first two, one that was cut short goes on.
"""

import argparse
import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from axpo.agent import Agent, Limits
from axpo.chat import Chat
from axpo.config import load_config
from axpo.engines.base import Sampling
from axpo.miniature import base
from axpo.miniature.scene import draw_crop, draw_scene
from axpo.miniature.teacher import THOUGHTS, Teacher, queries, tell
from axpo.miniature.tools import call_text, tools, zoom_call
from axpo.miniature.unseen import PAINTERS, image_search, sample_pictures
from axpo.miniature.world import (
    DIVISORS,
    EVEN,
    FACTS,
    HEADS,
    TAILS,
    capital_of,
    corpus,
    describe,
    sample_even_facts,
    sample_land,
    sample_problems,
    sample_scene,
)
from axpo.packing import pack_logprobs, pack_trees
from axpo.policy import banned_tokens, load_policy
from axpo.sft import imitate, sft_steps
from axpo.tools.base import Toolbox
from axpo.tree import Credit, Kind, RolloutTree

WARM_UP = 50
COOL_DOWN = 0.3  # of the steps, at the end


# The corpora that the last stages ask about, and their steps: as skewed as the world's, then where nothing is usual.
TOLD = {"told": (range(1, 17), 600), "read": (range(EVEN, EVEN + 8), 300)}
TOLD_PROBLEMS = 384  # of each corpus
TOLD_PICTURES = 40  # besides, of every other one: so that the base knows the tool that training never offers
TOLD_OPTIONS = [
    "sft.batch=24",
    "sft.learning_rate=0.001",
    "sft.warmup_steps=10",
    "train.pack_tokens=6000",
]


@dataclass(frozen=True)
class Exchange:
    """What is asked, what is to be answered, and pictures that only this exchange shows."""

    asked: str
    answer: str
    images: tuple[bytes, ...] = ()


Task = tuple[tuple[bytes, ...], list[Exchange]]  # pictures that all of its exchanges are about, and these


def look(rng: np.random.Generator) -> Task:
    """Say what is at a place of a scene; point at it, in the format of Qwen's grounding; zoom when told to."""
    scene = sample_scene(rng)
    seen, pointed, zoomed = (scene[int(rng.integers(len(scene)))] for _ in range(3))
    box = json.dumps({"bbox_2d": list(pointed.box), "label": pointed.name})
    return (draw_scene(scene, rng),), [
        Exchange(f"What is in {seen.place}?", seen.name),
        Exchange(f"Where is the {pointed.name} in {pointed.place}?", box),
        Exchange(f"Zoom in on the {zoomed.name} in {zoomed.place}.", zoom_call(zoomed.box, zoomed.name)),
    ]


def read(rng: np.random.Generator) -> Task:
    """Read the digit in a close view."""
    plaque = replace(sample_scene(rng, 1, 1)[0], digit=int(rng.integers(10)))
    return (), [Exchange("Read the digit.", str(plaque.digit), (draw_crop(plaque, rng),))]


def compute(rng: np.random.Generator) -> Task:
    """Put code into a call; read a result off."""
    a, b = map(int, rng.integers(12, 100 if rng.random() < 0.8 else 1000, 2))
    d = int(rng.choice(DIVISORS))
    codes = f"print({a} * {b} % {d})", f"print(({a} + {b}) % {d})", f"print({a} * {b} // {d})", f"r = {a} * {b} % {d}"
    code = str(rng.choice(codes))
    result = int(rng.integers(0, 12 if rng.random() < 0.7 else 10_000))
    return (), [
        Exchange(f'Run "{code}".', call_text("python", {"code": code})),
        Exchange(f"<tool_response>\n{result}\n</tool_response>\nWhat is the result?", str(result)),
    ]


def find(rng: np.random.Generator) -> Task:
    """Find a fact about made-up lands in a text; put what is named into a query."""
    response, facts = _search_response(rng)
    asked, kind = str(rng.choice(list(facts))), str(rng.choice(list(FACTS)))
    # Mostly the first document, as it is for whoever searches well; the others keep the base reading.
    if rng.random() < 0.7:
        asked = next(iter(facts))
    query = str(rng.choice(queries(sample_land(rng, 1 + (rng.random() < 0.2)), kind)))
    return (), [
        Exchange(f"{response}\nWhat is the {kind} of {_asked(asked)}?", facts[asked][kind]),
        Exchange(f'Search for "{query}".', call_text("search", {"query": query})),
    ]


def recite(rng: np.random.Generator) -> Task:
    """Say what a text says of a made-up land: all of it, or what is asked."""
    response, facts = _search_response(rng)
    asked, kind = next(iter(facts)), str(rng.choice(list(FACTS)))
    return (), [
        Exchange(f"{response}\nWhat do you know of {_asked(asked)}?", describe(asked, facts[asked])["text"]),
        Exchange(f"What is the {kind} of {_asked(asked)}?\n{response}", f"Its {kind} is {facts[asked][kind]}."),
    ]


def _search_response(rng: np.random.Generator) -> tuple[str, dict[str, dict[str, str]]]:
    """A tool response with the documents of one or two made-up places, and their facts."""
    facts = {}
    for _ in range(int(rng.integers(1, 3))):
        land = sample_land(rng)
        name = capital_of(land) if rng.random() < 0.5 else land
        facts[name] = sample_even_facts(rng)
    documents = [describe(name, known) for name, known in facts.items()]
    text = "\n".join(f"{i}. {d['title']}: {d['text']}" for i, d in enumerate(documents, 1))
    return f"<tool_response>\n{text}\n</tool_response>", facts


def _asked(name: str) -> str:
    """A place as questions call it."""
    land = name.split(" ")[0]
    return f'the capital of "{land}"' if name == capital_of(land) else f'"{land}"'


@dataclass(frozen=True)
class Stage:
    """How many of each task make a step. With `tools`, the tools stand in the prompt, as many tasks in one tree as
    `together`: it is long, and they share it."""

    steps: int
    peak_rate: float
    tasks: dict[Callable[[np.random.Generator], Task], int]
    later: dict[Callable[[np.random.Generator], Task], int]  # from LATER_FROM on
    together: int = 1
    tools: bool = False


LATER_FROM = 200
STAGES = {
    # Reading pictures first, then finding facts in texts.
    "alone": Stage(400, 2e-3, {look: 8, read: 28, compute: 4, find: 8}, {look: 10, read: 10, compute: 8, find: 16}),
    # The same with the tools described before it, as for every agent, and more of reading what a search shows.
    "tools": Stage(
        300,
        1.5e-3,
        {look: 5, read: 8, compute: 4, find: 6, recite: 12},
        {look: 5, read: 8, compute: 4, find: 6, recite: 12},
        together=8,
        tools=True,
    ),
}


def make_trees(chat: Chat, tasks: Sequence[Task], tools: list[dict[str, Any]], together: int) -> list[RolloutTree]:
    """The tasks as trees whose branches are exchanges, so that what they share is computed once.

    Tasks with pictures of their own make a tree each, of the others `together` make one.
    """
    alone = [task for task in tasks if task[0]]
    plain = [exchange for task in tasks if not task[0] for exchange in task[1]]
    size = together * max(1, len(plain) // max(1, len(tasks) - len(alone)))
    groups = alone + [((), plain[start : start + size]) for start in range(0, len(plain), size)]
    return [make_tree(chat, shared, exchanges, tools) for shared, exchanges in groups]


def make_tree(
    chat: Chat, shared: tuple[bytes, ...], exchanges: Sequence[Exchange], tools: list[dict[str, Any]]
) -> RolloutTree:
    """One tree: the root holds the shared pictures, each branch an exchange."""
    tree = None
    for exchange in exchanges:
        pictures = [*shared, *exchange.images]
        content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": exchange.asked}]
        ids, images = chat.prompt([{"role": "user", "content": content}], pictures, tools)
        start = ids.index(chat.tokenizer.convert_tokens_to_ids("<|im_start|>"), 1 if tools else 0) + 3  # "user\n"
        start += sum(image.tokens + 2 for image in images[: len(shared)])  # and vision start and end
        if tree is None:
            tree = RolloutTree("pretraining", ids[:start], images[: len(shared)])
        assert tree.root.ids.tolist() == ids[:start]
        branch = tree.append(tree.root, Kind.OBSERVATION, ids[start:], images=images[len(shared) :])
        reply = chat.turn(f"\n</think>\n\n{exchange.answer}")
        segment = tree.append(branch, Kind.POLICY, reply, [0.0] * len(reply))
        segment.credits = (Credit(1.0, len(reply)),)
    assert tree is not None
    return tree


@cache
def tool_schemas() -> list[dict[str, Any]]:
    """What the prompt says of the tools."""
    return Toolbox(tools()).schemas


def world_text() -> Iterator[str]:
    """What the tokenizer is trained on."""
    rng = np.random.default_rng(1)
    for problem in sample_problems(300, seed=1):
        yield str(problem.question.messages[0]["content"][-1]["text"])
    for document in corpus():
        yield f"{document['title']}: {document['text']}"
    for task in STAGES["alone"].tasks:
        for _ in range(60):
            for exchange in task(rng)[1]:
                yield f"{exchange.asked}\n{exchange.answer}"
    for thought in [*THOUGHTS, *(f'"{syllable}-{syllable}"' for syllable in (*HEADS, *TAILS)), *PAINTERS]:
        yield from [thought] * 20
    for _ in range(40):
        yield base.TEMPLATE.read_text().split("# Tools")[1].split("<|im_end|>")[0]
        yield "\n".join(json.dumps(schema) for schema in tool_schemas())
        yield "system user assistant <answer> </answer> Error: Traceback (most recent call last):"


def learning_rate(step: int, stage: Stage) -> float:
    """Warm up, stay, and fall linearly to zero."""
    return stage.peak_rate * min(1.0, (step + 1) / WARM_UP, (stage.steps - step) / (COOL_DOWN * stage.steps))


def train(out: Path, name: str, seed: int = 0) -> None:
    """Train a stage, or go on with it, and write the base into `out`. The first stage begins from nothing."""
    stage = STAGES[name]
    if name == "alone":
        tokenizer = base.build_tokenizer(list(world_text()))
        chat = Chat(tokenizer, base.build_image_processor())
        model: PreTrainedModel = base.build_model(tokenizer, seed)
    else:
        chat, model = Chat.from_pretrained(out), load_policy(out)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    progress = out.with_suffix(f".{name}.pt")
    step = 0
    if progress.exists():
        state = torch.load(progress, weights_only=True)
        step = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    started = time.time()
    while step < stage.steps:
        losses = train_step(model, chat, optimizer, stage, step, seed)
        step += 1
        if step % 25 == 0:
            shown = " ".join(f"{task} {loss:.4f}" for task, loss in losses.items())
            print(f"{name} {step} {time.time() - started:.0f}s {shown}", flush=True)
        if step % 100 == 0:
            state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, progress.with_suffix(".tmp"))
            os.replace(progress.with_suffix(".tmp"), progress)
    save_base(model, chat, out)
    progress.unlink(missing_ok=True)


def train_step(
    model: PreTrainedModel, chat: Chat, optimizer: torch.optim.Optimizer, stage: Stage, step: int, seed: int
) -> dict[str, float]:
    """One step over every task; returns the mean loss a token of each."""
    losses = {}
    banned = banned_tokens(chat, model)
    schemas = tool_schemas() if stage.tools else []
    for number, (task, count) in enumerate((stage.tasks if step < LATER_FROM else stage.later).items()):
        rng = np.random.default_rng([seed, step + 1000 * stage.tools, number])
        trees = make_trees(chat, [task(rng) for _ in range(count)], schemas, stage.together)
        packs = pack_trees(trees, chat, 4000)
        tokens = sum(len(pack.targets) for pack in packs)
        losses[task.__name__] = 0.0
        for pack in packs:
            loss = -pack_logprobs(model, pack, chat, banned).sum() / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            losses[task.__name__] += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, stage)
    optimizer.step()
    optimizer.zero_grad()
    return losses


def save_base(model: PreTrainedModel, chat: Chat, out: Path) -> None:
    """A `from_pretrained` folder, its weights in bfloat16 to keep the package small."""
    out.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]  # what other frameworks open a checkpoint by
    model.config.save_pretrained(out)
    chat.save(out)
    tied = "lm_head.weight"
    weights = {
        name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.state_dict().items() if name != tied
    }
    save_file(weights, out / "model.safetensors.tmp", metadata={"format": "pt"})
    os.replace(out / "model.safetensors.tmp", out / "model.safetensors")


def train_told(out: Path, name: str) -> None:
    """A last stage: whole exchanges with the real tools, each call spelled out in the question.

    So the base can act and read what comes back; which call helps, it is never shown.
    """
    chat, model = Chat.from_pretrained(out), load_policy(out)
    corpora, steps = TOLD[name]
    trees = [tree for number in corpora for tree in asyncio.run(told(chat, number))]
    started = time.time()
    for figures in sft_steps(load_config(None, [*TOLD_OPTIONS, f"sft.steps={steps}"]), model, chat, trees):
        if figures["step"] % 25 == 0:
            print(f"{name} {figures['step']} {time.time() - started:.0f}s {figures['loss']:.4f}", flush=True)
    save_base(model, chat, out)


async def told(chat: Chat, number: int) -> list[RolloutTree]:
    """Exchanges about the corpus of this number."""
    rng = np.random.default_rng([3, number])
    pictures = sample_pictures(TOLD_PICTURES, number) if number % 2 else []
    problems = [tell(problem, rng) for problem in sample_problems(TOLD_PROBLEMS, number, "base") + pictures]
    known = tools(number) + ([image_search(pictures)] if pictures else [])
    agent = Agent(Teacher(problems, chat), chat, Toolbox(known), Sampling(), Limits())
    trees = []
    for index, problem in enumerate(problems):
        tree = agent.new_tree(problem.question)
        await agent.draw((tree, problem.question), tree.root, range(1), (0, index))
        trees.append(imitate(tree, tree.leaves()))
    return trees


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=base.BASE)
    parser.add_argument("--stage", choices=[*STAGES, *TOLD], help="only this stage; default: all of them")
    arguments = parser.parse_args()
    for chosen in [arguments.stage] if arguments.stage else [*STAGES, *TOLD]:
        if chosen in TOLD:
            train_told(arguments.out, chosen)
        else:
            train(arguments.out, chosen)
