"""What is proved before the first step: that the model sees its images, that the template keeps what it has written,
that engine and trainer agree, that the tools answer, and that a checkpoint fits on the disk.

Each of these has gone wrong unnoticed in somebody's training for hours. A check costs a few forwards of a few hundred
tokens, a short generation, or one call; what loading has checked already is not checked again.
"""

import asyncio
import datetime
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch
from torch import Tensor
from transformers import PreTrainedModel

from axpo.agent import Agent
from axpo.attention import TreeMask
from axpo.chat import END_THINK, THINK, Chat, ChatError
from axpo.config import Config, ConfigError
from axpo.diagnostics.mismatch import Mismatch
from axpo.engines.base import Request, RolloutKey, Sampling
from axpo.packing import pack_logprobs, pack_trees
from axpo.parallel import ALONE, Ranks, computing
from axpo.policy import banned_tokens, forward_logits, policy_logprobs, update_forward
from axpo.positions import mrope_positions
from axpo.tools.base import Conversation, SystemFault, Toolbox, ToolResult, encode_png
from axpo.tree import Credit, Kind, RolloutTree, Segment

logger = logging.getLogger(__name__)

# How much the next token's log-probs must change with the picture, in nats on average over the vocabulary, and how many
# times as much as they change when nothing does (on a GPU, by the order of additions). A model that does not see gives
# the same numbers to the last bit in every dtype; a small one that sees little changes by 0.01.
SEEN = 1e-3
OVER_NOISE = 4
# How much the log-probs of the engine and the trainer may differ, in nats on average over the generated tokens. In
# float32 other kernels give 1e-5. In bfloat16 a logit of 16 to 32 is rounded by up to 0.06, so that a few hundredths
# remain; a picture that is lost, or weights that are not the trainer's, give 0.5 and more. The bound is where
# alarms.mismatch warns.
AGREED = {"float32": 1e-3, "bfloat16": 0.05}
TOKENS = 16  # that the engine generates
TOOL_SECONDS = 60.0  # that one tool may take to answer, retries included
_CALL = '<tool_call>\n{"name": "axpo_probe", "arguments": {}}\n</tool_call>'
_KEY = RolloutKey("preflight", 0)


class PreflightError(ConfigError):
    """A run that would train on something else than it seems to: one line for each check that failed."""


async def preflight(
    config: Config, model: PreTrainedModel, agent: Agent, folder: Path | None = None, ranks: Ranks = ALONE
) -> None:
    """Prove what a run relies on, with the policy, engine and tools that it will use.

    `folder` is that of the run's checkpoints, None where none will be written. The engine has the model's weights after
    it and remembers nothing. Raises PreflightError with all that failed.
    """
    started = time.perf_counter()
    chat, engine = agent.chat, agent.engine
    toolbox = agent.toolbox.in_evaluation if folder else agent.toolbox  # a training evaluates, too
    found = [
        disk_space(config, model, folder) if folder else None,
        stable_template(chat, config),
        *await answering_tools(toolbox, picture(0)),
    ]
    with computing(config, ranks):
        engine.sleep()
        engine.update_weights()  # as after a step: the weights that it generates with are those that were sent
        found += [sees_images(config, model, chat), await agreement(config, model, agent)]
    _judge(found, ranks)
    with computing(config, ranks):
        engine.sleep()
        engine.update_weights()
    logger.info("preflight took %.1f s", time.perf_counter() - started)


def preflight_sft(config: Config, model: PreTrainedModel, chat: Chat, folder: Path, ranks: Ranks = ALONE) -> None:
    """Prove what fine-tuning relies on, which neither generates nor calls tools, before the weights are shared.

    `folder` is that of the run. Raises PreflightError with all that failed.
    """
    found = [disk_space(config, model, folder, tuning=True), stable_template(chat, config)]
    _judge([*found, sees_images(config, model, chat)], ranks)


def _judge(found: Sequence[str | None], ranks: Ranks) -> None:
    everywhere = (text for texts in ranks.all(list(found)) for text in texts if text)
    if failures := list(dict.fromkeys(everywhere)):
        hint = "preflight: the run has not begun; preflight=false begins it without these checks"
        raise PreflightError("\n".join([*(f"preflight: {text}" for text in failures), hint]))


# Images ---------------------------------------------------------------------------------------------------------------


def picture(number: int) -> bytes:
    """One of two pictures of the same size that have nothing in common, as a PNG file."""
    image = PIL.Image.new("RGB", (64, 64), ("white", "navy")[number])
    draw = PIL.ImageDraw.Draw(image)
    if number:
        for left in range(0, 64, 16):
            draw.rectangle((left, 0, left + 7, 63), "yellow")
    else:
        draw.ellipse((12, 12, 51, 51), "red")
    return encode_png(image)


def rollout(chat: Chat, shown: bytes | None, returned: bytes | None) -> tuple[RolloutTree, Segment]:
    """A question with a picture or without, a call, and its result with a picture or without; and the last segment."""
    text = {"type": "text", "text": "What does the picture show?"}
    content: list[dict[str, str]] = [text] if shown is None else [{"type": "image"}, text]
    tree = RolloutTree("preflight", *chat.prompt([{"role": "user", "content": content}], [shown] if shown else [], []))
    thought = f"I look closer.\n{END_THINK}\n\n" if chat.opens_thinking else ""
    turn = chat.turn(thought + _CALL)
    called = tree.append(tree.root, Kind.POLICY, turn, [float("nan")] * len(turn))
    ids, images = chat.observation([("Here it is.", [returned] if returned else [])])
    return tree, tree.append(called, Kind.OBSERVATION, ids, images=images)


def sees_images(config: Config, model: PreTrainedModel, chat: Chat) -> str | None:
    """Whether the next token depends on a picture of the prompt, and on one that a tool has returned."""
    most = config.rollout.max_images
    if chat.image_token_id is None or most == 0:
        return None
    one, other = picture(0), picture(1)
    prompt = None if most == 1 else one
    seen = {
        "a prompt": [rollout(chat, shown, None)[0].root for shown in (one, one, other)],
        "a tool's result": [rollout(chat, prompt, returned)[1] for returned in (one, one, other)],
    }
    blind = []
    for place, leaves in seen.items():
        first, again, changed = (next_logprobs(config, model, chat, leaf) for leaf in leaves)
        least = max(SEEN, OVER_NOISE * _distance(first, again))
        if not _distance(first, changed) >= least:  # also where it is not a number
            blind.append(f"by {_distance(first, changed):.2g} with the one in {place}, less than {least:.2g}")
    if not blind:
        return None
    return (
        f"model: {config.model} does not see its images: when the picture is another, the next token's "
        f"log-probs change {' and '.join(blind)}. Take a checkpoint whose vision weights are whole (a file of the "
        "language model alone has none), with its own chat_template.jinja and preprocessor_config.json"
    )


def _distance(one: Tensor, other: Tensor) -> float:
    """How much log-probs (V,) differ, on average over the tokens that may be written."""
    return (one - other)[one > float("-inf")].abs().mean().item()


@torch.no_grad()
def next_logprobs(config: Config, model: PreTrainedModel, chat: Chat, leaf: Segment) -> Tensor:
    """The log-probs (V,) of the token after a path, by the trainer's forward."""
    path = leaf.path()
    ids = np.concatenate([segment.ids for segment in path])
    images = [image for segment in path for image in segment.images]
    positions, _ = mrope_positions(ids, images, chat.image_token_id or 0, chat.merge_size)
    with update_forward(model, autocast=config.train.autocast):
        logits = forward_logits(
            model,
            torch.from_numpy(ids)[None].to(model.device),
            torch.from_numpy(positions)[:, None].to(model.device),
            TreeMask(torch.full((len(ids),), len(ids), device=model.device)),
            chat.pixels(images) if images else None,
            torch.tensor([len(ids) - 1], device=model.device),
        )
    return policy_logprobs(logits[0], banned_tokens(chat, model))[0]


# Template -------------------------------------------------------------------------------------------------------------


def stable_template(chat: Chat, config: Config) -> str | None:
    """Whether the prompt of each turn, which tools' results end, begins with that of the turn before, holds what was
    thought, and ends with what training appends for the result.

    Training never renders a turn again. What serves the policy later does, and would feed it other tokens than those it
    was trained on. A user's next message is another matter: none is trained on (but by rltf, whose second
    attempt is no conversation), and the templates of Qwen3 drop the thinking before it on purpose.
    """
    call = {"type": "function", "function": {"name": "axpo_probe", "arguments": {}}}
    messages: list[dict[str, Any]] = [{"role": "user", "content": "?"}]
    mend = f"mend chat_template.jinja of model {config.model}, so that it keeps turns that a tool's result follows"
    decode = chat.tokenizer.decode
    try:
        before, _ = chat.prompt(messages, [], [])
        for number in "one", "two":
            said = f"{THINK}\nThought {number}.\n{END_THINK}\n\nI call."
            messages.append({"role": "assistant", "content": said, "tool_calls": [call]})
            messages.append({"role": "tool", "content": f"Result {number}."})
            (after, _), (appended, _) = chat.prompt(messages, [], []), chat.observation([(f"Result {number}.", ())])
            if after[: len(before)] != before:
                place = next(n for n, i in enumerate(before) if [i] != after[n : n + 1])
                old, new = (decode(ids[place : place + 12]) for ids in (before, after))
                return f"model: the chat template rewrites what came before: {old!r} becomes {new!r}; {mend}"
            if f"Thought {number}." not in decode(after):
                return f"model: the chat template drops the thinking of a turn that called a tool; {mend}"
            if after[-len(appended) :] != appended:
                old, new = decode(appended), decode(after[-len(appended) :])
                return f"model: the chat template writes a tool's result as {new!r}, but alone as {old!r}; {mend}"
            before = after
    except ChatError as error:
        return f"model: {error}; {mend}"
    return None


# Engine ---------------------------------------------------------------------------------------------------------------


async def agreement(config: Config, model: PreTrainedModel, agent: Agent) -> str | None:
    """Whether the engine tells the log-probs that the trainer computes, for what follows a tool's image.

    It samples at the rollouts' temperature, but from the whole distribution, which is what the trainer computes.
    """
    chat, engine = agent.chat, agent.engine
    most = config.rollout.max_images if chat.image_token_id is not None else 0
    tree, leaf = rollout(chat, picture(0) if most > 1 else None, picture(1) if most else None)
    path = leaf.path()
    ids = [int(i) for segment in path for i in segment.ids]
    images = [image for segment in path for image in segment.images]
    sampling = Sampling(config.rollout.temperature, max_tokens=TOKENS)
    with engine.rollout(_KEY):
        generation = await engine.generate(Request(ids, images, sampling, config.seed, _KEY))
    written = tree.append(leaf, Kind.POLICY, generation.ids, generation.logprobs)
    written.credits = (Credit(1.0, len(written)),)
    (pack,) = pack_trees([tree], chat, config.train.pack_tokens)
    with torch.no_grad(), update_forward(model, autocast=config.train.autocast):
        known = pack_logprobs(model, pack, chat, banned_tokens(chat, model), sampling.temperature)
    found = Mismatch.of(pack.old_logprobs, known).figures()
    most_off = AGREED[config.precision]
    if found["mismatch_mean"] is not None and found["mismatch_mean"] <= most_off:
        return None
    return (
        f"engine.name: the log-probs of the {config.engine.name} engine and of the trainer differ by "
        f"{_number(found['mismatch_mean'])} on average and {_number(found['mismatch_max'])} at most over "
        f"{len(written)} tokens that were generated after a tool's result, more than {most_off:g}. They do not compute "
        "the same model: the engine's weights, images or positions are others (with vllm: is its version a supported "
        "one, do its servers serve this model?). Compare with engine.name=local"
    )


def _number(value: float | None) -> str:
    return "nothing that is known" if value is None else f"{value:.3g}"


# Tools ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Probe:
    """A harmless call of a built-in tool, what a good result is, and the key to look at where there is none."""

    arguments: Callable[[], Mapping[str, Any]]
    good: Callable[[ToolResult], bool]
    key: str


def _today() -> dict[str, str]:
    # Answers are kept on disk: another question each day asks the provider again, and only then.
    return {"query": f"news of {datetime.date.today()}"}


_PROBES = {
    "axpo.tools.python": _Probe(lambda: {"code": "print(1 + 1)"}, lambda r: r.text.strip() == "2", "tools.sandbox"),
    "axpo.tools.zoom": _Probe(
        lambda: {"bbox_2d": [0, 0, 500, 500], "label": "it", "img_idx": 0},
        lambda r: len(r.images) == 1,
        "tools.zoom_pixels",
    ),
    "axpo.tools.search": _Probe(_today, lambda r: bool(r.text), "tools.search"),
    "axpo.tools.image_search": _Probe(lambda: {"img_idx": 0}, lambda r: bool(r.text), "tools.image_search"),
}


async def answering_tools(toolbox: Toolbox, image: bytes) -> list[str | None]:
    """Calls each built-in tool once, as the policy would.

    What a call of a user's tool, or of an MCP server's, costs or changes is not known: they are only listed in the log.
    """
    known = [(offer, _PROBES.get(offer.function.__module__)) for offer in toolbox.offers]
    async with Conversation([image]) as conversation:
        found = [await _answer(toolbox, offer.name, probe, conversation) for offer, probe in known if probe]
    if unknown := [offer.name for offer, probe in known if not probe]:
        logger.info("preflight does not call these tools: %s", ", ".join(unknown))
    return found


async def _answer(toolbox: Toolbox, name: str, probe: _Probe, conversation: Conversation) -> str | None:
    try:
        async with asyncio.timeout(TOOL_SECONDS):
            result = await toolbox.call(name, probe.arguments(), conversation)
    except SystemFault as fault:
        said = f"does not answer: {fault}"
    except TimeoutError:
        said = f"has not answered after {TOOL_SECONDS:g} s"
    else:
        if result.fault is None and probe.good(result):
            return None
        said = f"answers {result.text[:200]!r} and {len(result.images)} images to {dict(probe.arguments())}"
    return f"{probe.key}: the tool {name!r} {said}. Look at the address, key or network; axpo tools check shows more"


# Disk -----------------------------------------------------------------------------------------------------------------


def disk_space(config: Config, model: PreTrainedModel, folder: Path, tuning: bool = False) -> str | None:
    """Whether the checkpoints fit, which hold weights alone in `tuning`: a new one is written before the one that it
    replaces goes."""
    options = config.sft if tuning else config.train
    copies = 2 if 0 < options.save_every < options.steps else 1
    held = sum(file.stat().st_size for file in (folder / "checkpoint").rglob("*") if file.is_file())
    size = checkpoint_bytes(model, tuning)
    free, needed = shutil.disk_usage(folder).free, copies * size - held
    if free >= needed:
        return None
    gib = 2**30
    return (
        f"output: {folder} has {free / gib:.1f} GiB of free disk space, but {copies} checkpoint{'s' * (copies > 1)} of "
        f"{size / gib:.1f} GiB must fit beside what is there; make room, or choose another folder"
    )


def checkpoint_bytes(model: PreTrainedModel, tuning: bool = False) -> int:
    """What a checkpoint takes: the weights and, but in `tuning`, of those that are trained AdamW's two moments and,
    where they are not float32, a copy that is."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = [] if tuning else [p for p in model.parameters() if p.requires_grad]
    return weights + sum(p.numel() * (8 if p.dtype == torch.float32 else 12) for p in trained)
