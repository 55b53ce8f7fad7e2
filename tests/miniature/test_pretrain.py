"""Pre-training: sharing what exchanges have in common changes what is computed, not what is learned."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
import torch

from axpo.chat import Chat
from axpo.miniature import pretrain
from axpo.miniature.base import BASE
from axpo.miniature.pretrain import Task, learning_rate, look, make_tree, read, recite, tool_schemas
from axpo.packing import pack_logprobs, pack_trees
from axpo.policy import banned_tokens, load_policy
from axpo.tree import Kind, RolloutTree


def likelihoods(trees: list[RolloutTree], chat: Chat) -> list[float]:
    """The log-probs of the credited tokens, sorted, as packing lays trees out in an order of its own."""
    model = load_policy(BASE).double()
    packs = pack_trees(trees, chat, 4000)
    with torch.no_grad():
        found = [pack_logprobs(model, pack, chat, banned_tokens(chat, model)) for pack in packs]
    return sorted(torch.cat(found).tolist())


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat.from_pretrained(BASE)


@pytest.mark.parametrize("task", [look, read, recite])
def test_exchanges_in_one_tree_are_as_likely_as_each_alone(
    chat: Chat, task: Callable[[np.random.Generator], Task]
) -> None:
    shared, exchanges = task(np.random.default_rng(0))
    together = make_tree(chat, shared, exchanges, tool_schemas())
    alone = [make_tree(chat, shared, [exchange], tool_schemas()) for exchange in exchanges]
    assert likelihoods([together], chat) == pytest.approx(likelihoods(alone, chat), abs=1e-9)


def test_told_exchanges_are_whole_rollouts(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "TOLD_PROBLEMS", 12)
    monkeypatch.setattr(pretrain, "TOLD_PICTURES", 2)
    trees = asyncio.run(pretrain.told(chat, 1))
    assert len(trees) == 12 + 2
    for tree in trees:
        (leaf,) = tree.leaves()
        kinds = [segment.kind for segment in leaf.path()]
        assert kinds == [Kind.PROMPT, Kind.POLICY, Kind.OBSERVATION, Kind.POLICY]
        assert "<answer>" in chat.tokenizer.decode(leaf.ids)


def test_the_learning_rate_warms_up_stays_and_falls_to_nothing() -> None:
    stage = pretrain.Stage(500, 2.0, {}, {})
    rates = [learning_rate(step, stage) for step in (0, 24, 49, 100, 349, 425, 499)]
    assert rates == pytest.approx([0.04, 1.0, 2.0, 2.0, 2.0, 1.0, 2 / 150])
