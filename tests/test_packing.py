"""A packed tree must equal its rows computed one by one: log-probs, loss and gradients."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage
from transformers import Qwen3VLForConditionalGeneration

from axpo.chat import Chat
from axpo.credit import credit_axpo
from axpo.loss import policy_loss, token_weights
from axpo.packing import pack_logprobs, pack_trees
from axpo.policy import banned_tokens, update_forward
from axpo.tree import Credit, Kind, Outcome, RolloutTree, Segment, StopReason


def picture(seed: int, width: int = 64, height: int = 64) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    PilImage.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def words(rng: np.random.Generator, count: int) -> list[int]:
    return [int(i) for i in rng.integers(0, 256, count)]


def policy(tree: RolloutTree, parent: Segment, rng: np.random.Generator, count: int, resampled: int = 0) -> Segment:
    return tree.append(parent, Kind.POLICY, words(rng, count), rng.normal(-1, 0.3, count), resampled=resampled)


def forked_tree(chat: Chat, seed: int) -> RolloutTree:
    """A prompt with an image, a plain rollout, one with a tool image, and one forked with two continuations."""
    rng = np.random.default_rng(seed)
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    tree = RolloutTree("q", *chat.prompt([{"role": "user", "content": content}], [picture(seed, 96, 64)], []))
    plain = policy(tree, tree.root, rng, 7)
    plain.outcome = Outcome(StopReason.ANSWER, 1.0)
    looked = policy(tree, tree.root, rng, 5)
    seen = tree.append(looked, Kind.OBSERVATION, *observation(chat, "here", seed + 1))
    policy(tree, seen, rng, 4).outcome = Outcome(StopReason.ANSWER, 0.0)
    source = policy(tree, tree.root, rng, 9)
    source.outcome = Outcome(StopReason.ANSWER, 0.0)
    prefix = tree.fork(source, 4)
    for reward in (1.0, 0.0):
        first = policy(tree, prefix, rng, 3, resampled=1)
        shown = tree.append(first, Kind.OBSERVATION, *observation(chat, "look", seed + 2 + int(reward)))
        policy(tree, shown, rng, 6).outcome = Outcome(StopReason.ANSWER, reward)
    return tree


def observation(chat: Chat, text: str, seed: int) -> tuple[list[int], None, tuple]:
    ids, images = chat.observation([(text, [picture(seed)])])
    return ids, None, images


def row_logprobs(
    model: Qwen3VLForConditionalGeneration, chat: Chat, leaf: Segment, banned: torch.Tensor
) -> torch.Tensor:
    """The independent way: one rollout as a plain sequence, positions from the model's own `get_rope_index`."""
    path = leaf.path()
    ids = torch.tensor(np.concatenate([s.ids for s in path]))[None]
    images = [image for s in path for image in s.images]
    pixels, grids = chat.pixels(images)
    kinds = (ids == chat.image_token_id).int()
    positions, _ = model.model.get_rope_index(ids, kinds, image_grid_thw=grids)
    logits = model(
        input_ids=ids, position_ids=positions, pixel_values=pixels.to(model.dtype), image_grid_thw=grids
    ).logits[0]
    logits[:, banned] = float("-inf")
    return logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]


@pytest.mark.parametrize(("limit", "count"), [(10_000, 1), (110, 4), (1, 8)])
def test_packed_tree_equals_rows_in_loss_and_gradients(
    chat: Chat, make_model: Callable, limit: int, count: int
) -> None:
    """Whole, and cut between rollouts."""
    model = make_model().double()
    banned = banned_tokens(chat, model)
    trees = [forked_tree(chat, seed) for seed in (0, 10)]
    for tree in trees:
        credit_axpo(tree)
    packs = pack_trees(trees, chat, limit)
    assert len(packs) == count

    loss = torch.zeros((), dtype=torch.float64)
    for pack in packs:
        logprobs = pack_logprobs(model, pack, chat, banned)
        weights = token_weights(pack.stream_tokens, rollouts=6, total_tokens=0)
        loss += policy_loss(logprobs, pack.old_logprobs, None, pack.advantages, weights)
    loss.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    counted: set[Segment] = set()
    for tree in trees:
        for leaf in tree.leaves():
            logprobs_of_row = row_logprobs(model, chat, leaf, banned)
            start = 0
            for segment in leaf.path():
                if segment.credits and segment not in counted:
                    counted.add(segment)
                    new = logprobs_of_row[start - 1 : start - 1 + len(segment)]
                    ratio = (new - torch.tensor(segment.logprobs, dtype=torch.float64)).exp()
                    advantage = segment.credits[0].advantage
                    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.4) * advantage)
                    total = total - surrogate.sum() / segment.credits[0].stream_tokens / 6
                start += len(segment)
    total.backward()
    torch.testing.assert_close(loss, total, atol=1e-9, rtol=0)
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(packed[name], parameter.grad, atol=1e-9, rtol=0)
            compared += int(parameter.grad.abs().sum() > 0)
    assert compared > 40  # vision tower and language model both took part


def test_checkpointing_and_autocast_of_a_packed_tree(chat: Chat, make_model: Callable) -> None:
    tree = forked_tree(chat, 0)
    credit_axpo(tree)
    (pack,) = pack_trees([tree], chat, 10_000)

    def run(dtype: torch.dtype, **how: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = make_model().to(dtype)
        with update_forward(model, **how):
            logprobs = pack_logprobs(model, pack, chat, banned_tokens(chat, model))
        (logprobs * pack.advantages).sum().backward()
        return logprobs.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    logprobs, exact = run(torch.float64)
    again, checkpointed = run(torch.float64, checkpointing=True)
    torch.testing.assert_close(again, logprobs, atol=1e-9, rtol=0)
    for name, gradient in exact.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-9, rtol=0)
    near, rounded = run(torch.float32, autocast=True, checkpointing=True)
    assert near.dtype == torch.float32
    assert 1e-4 < (near - logprobs).abs().max() < 0.3
    whole, part = (torch.cat([g[name].double().flatten() for name in exact]) for g in (exact, rounded))
    assert (part - whole).norm() < 0.1 * whole.norm()


def test_what_nobody_learns_from_is_not_computed(chat: Chat) -> None:
    tree = forked_tree(chat, 0)
    credit_axpo(tree)
    old = tree.root.children[2].children[0]  # the failed continuation of the source
    assert not old.credits
    pack = pack_trees([tree], chat, 10_000)[0]
    assert len(pack.ids) == sum(len(s) for s in tree.segments()) - len(old)
    assert len(pack.images) == sum(len(s.images) for s in tree.segments())


def test_neighbours_in_a_pack_do_not_change_logprobs(chat: Chat, make_model: Callable) -> None:
    model = make_model()
    banned = banned_tokens(chat, model)
    trees = [forked_tree(chat, seed) for seed in range(4)]
    for tree in trees:
        credit_axpo(tree)
    small = {s for tree in trees[2:] for s in tree.segments() if s.kind is Kind.POLICY}
    for segment in list(small)[::2]:
        segment.credits = ()  # trees of different sizes
    with torch.no_grad():
        alone = [pack_logprobs(model, p, chat, banned) for t in trees for p in pack_trees([t], chat, 1)]
        together = [pack_logprobs(model, p, chat, banned) for p in pack_trees(trees, chat, 10_000)]
    assert len(together) == 1
    one, other = (torch.cat(part).sort().values for part in (alone, together))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_a_large_tree_is_cut_between_rollouts_and_each_token_trained_once(chat: Chat) -> None:
    tree = forked_tree(chat, 0)
    credit_axpo(tree)
    lengths = [sum(map(len, leaf.path())) for leaf in tree.leaves() if leaf.credits]
    assert sorted(len(pack.ids) for pack in pack_trees([tree], chat, 1)) == sorted(lengths)
    trained = sum(len(segment) * len(segment.credits) for segment in tree.segments())
    for limit in range(max(lengths), 2 * sum(lengths), 10):
        packs = pack_trees([tree], chat, limit)
        assert max(len(pack.ids) for pack in packs) <= limit
        assert sum(len(pack.targets) for pack in packs) == trained


def test_no_pack_passes_the_limit_but_for_a_rollout_that_does_alone(chat: Chat) -> None:
    rng = np.random.default_rng(0)
    trees = []
    for size in (97, 37, 47, 20):
        tree = RolloutTree(str(size), words(rng, 3))
        policy(tree, tree.root, rng, size).credits = (Credit(1.0, size),)
        trees.append(tree)
    assert [len(pack.ids) for pack in pack_trees(trees, chat, token_limit=75)] == [100, 73, 40]


def test_what_all_prompts_begin_with_is_packed_once(chat: Chat) -> None:
    trees = []
    for prompt in ([1, 2, 3, 4], [1, 2, 5], [1, 2, 3]):
        tree = RolloutTree("q", prompt)
        policy(tree, tree.root, np.random.default_rng(len(trees)), 2).credits = (Credit(1.0, 2),)
        trees.append(tree)
    (pack,) = pack_trees(trees, chat, token_limit=12)
    assert pack.ids[[0, 1, 2, 3, 6, 9]].tolist() == [1, 2, 3, 4, 5, 3]
    assert pack.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 2, 3, 4]
    assert pack.until.tolist() == [12, 12, 6, 6, 6, 6, 9, 9, 9, 12, 12, 12]
    assert pack.keep[pack.sources].tolist() == [3, 4, 6, 7, 9, 10]
    assert [len(p.ids) for p in pack_trees(trees, chat, token_limit=11)] == [9, 5]


def test_a_prompt_of_another_kind_does_not_keep_the_others_from_sharing(chat: Chat) -> None:
    trees = []
    for prompt in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [9, 8, 7]):
        tree = RolloutTree("q", prompt)
        policy(tree, tree.root, np.random.default_rng(len(trees)), 2).credits = (Credit(1.0, 2),)
        trees.append(tree)
    assert [len(pack.ids) for pack in pack_trees(trees, chat, token_limit=12)] == [10, 5]


@settings(max_examples=30)
@given(
    prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), min_size=1, max_size=8),
    limit=st.integers(1, 40),
)
def test_every_tree_is_packed_once_and_within_the_limit(chat: Chat, prompts: list[list[int]], limit: int) -> None:
    trees = []
    for number, prompt in enumerate(prompts):
        tree = RolloutTree("q", prompt)
        policy(tree, tree.root, np.random.default_rng(number), 3).credits = (Credit(1.0, 3),)
        trees.append(tree)
    packs = pack_trees(trees, chat, limit)
    assert sum(len(pack.targets) for pack in packs) == 3 * len(trees)
    for pack in packs:
        assert len(pack.ids) <= limit or len(pack.targets) == 3


def test_the_last_token_of_a_prompt_is_never_shared(chat: Chat) -> None:
    trees = []
    for seed in range(2):
        tree = RolloutTree("q", [1, 2, 3])
        policy(tree, tree.root, np.random.default_rng(seed), 2).credits = (Credit(1.0, 2),)
        trees.append(tree)
    (pack,) = pack_trees(trees, chat, token_limit=100)
    assert pack.ids.tolist()[:3] + pack.ids.tolist()[5:6] == [1, 2, 3, 3]


def test_nothing_credited_gives_no_packs(chat: Chat) -> None:
    assert pack_trees([forked_tree(chat, 0)], chat, 1000) == []


def test_targets_are_predicted_by_the_token_before_them_on_the_path(chat: Chat) -> None:
    tree = RolloutTree("q", [1, 2])
    first = tree.append(tree.root, Kind.POLICY, [3, 4], [-0.5, -0.6])
    second = tree.append(tree.root, Kind.POLICY, [5], [-0.7])
    first.credits, second.credits = (Credit(0.25, 2),), (Credit(-1.0, 1),)
    pack = pack_trees([tree], chat, 100)[0]
    assert pack.targets.tolist() == [3, 4, 5]
    assert pack.keep[pack.sources].tolist() == [1, 2, 1]
    assert pack.until.tolist() == [5, 5, 4, 4, 5]
    assert pack.ids.tolist() == [1, 2, 3, 4, 5]
    assert pack.positions[0].tolist() == [0, 1, 2, 3, 2]
    assert pack.advantages.tolist() == [0.25, 0.25, -1.0]
    assert pack.stream_tokens.tolist() == [2, 2, 1]
    assert pack.old_logprobs.tolist() == pytest.approx([-0.5, -0.6, -0.7])
