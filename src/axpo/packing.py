"""Trees to packed batches: every token is computed once, forward and backward.

A tree is laid out depth first. Then the tokens below a segment follow it in one run, and "key k is an ancestor
of query q, or q itself" is two comparisons: k ≤ q < until[k], where `until` is the end of k's subtree.
Several trees may share a row, as their runs do not overlap, and several rows make a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from axpo.chat import Chat
from axpo.policy import forward_logits, policy_logprobs
from axpo.positions import mrope_positions
from axpo.tree import Image, RolloutTree, Segment


@dataclass(frozen=True)
class Pack:
    """R rows of L tokens, and the n trained tokens among them."""

    ids: Tensor  # (R, L)
    positions: Tensor  # (3, R, L)
    until: Tensor  # (R, L) one past the subtree of the token's segment
    images: tuple[Image, ...]  # row by row, in order
    keep: Tensor  # (R, L) bool: tokens whose next-token distribution is needed, m of them
    sources: Tensor  # (n,) which of the m kept distributions predicts the trained token
    targets: Tensor  # (n,) the trained tokens
    old_logprobs: Tensor  # (n,) under the sampling distribution
    advantages: Tensor  # (n,)
    stream_tokens: Tensor  # (n,) length of the stream that the token is averaged in
    tokens: int  # without padding

    def mask(self) -> Tensor:
        """(R, 1, L, L), True where a query may attend to a key. (On CUDA, the same rule is a flex-attention mask.)"""
        order = torch.arange(self.ids.shape[1])
        visible = (order[None, None, :] <= order[None, :, None]) & (order[None, :, None] < self.until[:, None, :])
        return visible[:, None]


@dataclass(frozen=True)
class _Flat:
    """One tree laid flat; indices are relative to its first token."""

    ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    until: npt.NDArray[np.int64]
    images: tuple[Image, ...]
    sources: npt.NDArray[np.int64]
    trained: npt.NDArray[np.int64]
    old_logprobs: npt.NDArray[np.float32]
    advantages: npt.NDArray[np.float64]
    stream_tokens: npt.NDArray[np.float64]


def pack_trees(trees: Sequence[RolloutTree], chat: Chat, token_limit: int) -> list[Pack]:
    """Pack the credited part of the trees into batches of at most `token_limit` tokens, padding included.

    Segments with no credit in or below them (a source's failed continuation, void rollouts) are left out. A
    tree larger than the limit makes a batch of its own.
    """
    flat = [_flatten(tree, chat) for tree in trees if any(s.credit for s in tree.segments())]
    rows: list[list[_Flat]] = []
    width = min(token_limit, max((len(f.ids) for f in flat), default=0))
    for item in sorted(flat, key=lambda f: -len(f.ids)):
        fitting = (row for row in rows if _width(row) + len(item.ids) <= width)
        row = next(fitting, None)
        if row is None:
            rows.append([item])
        else:
            row.append(item)
    batches: list[list[list[_Flat]]] = []
    for row in sorted(rows, key=_width, reverse=True):  # so the first row of a batch is its widest
        if batches and (len(batches[-1]) + 1) * _width(batches[-1][0]) <= token_limit:
            batches[-1].append(row)
        else:
            batches.append([row])
    return [_pack(batch) for batch in batches]


def _width(row: Sequence[_Flat]) -> int:
    return sum(len(flat.ids) for flat in row)


def _flatten(tree: RolloutTree, chat: Chat) -> _Flat:
    order = [s for s in tree.segments() if _needed(s)]
    starts: dict[Segment, int] = {}
    ends: dict[Segment, int] = {}  # of the subtree
    next_position: dict[Segment, int] = {}
    positions, total = [], 0
    for segment in order:
        starts[segment] = total
        total += len(segment)
        parent = segment.parent
        image_token = -1 if chat.image_token_id is None else chat.image_token_id
        spread, next_position[segment] = mrope_positions(
            segment.ids, segment.images, image_token, chat.merge_size, next_position[parent] if parent else 0
        )
        positions.append(spread)
    for segment in reversed(order):
        ends[segment] = max([starts[segment] + len(segment), *(ends[c] for c in segment.children if c in ends)])
    trained = [s for s in order if s.credit is not None]
    sources, targets = [], []
    for segment in trained:
        assert segment.parent is not None
        inside = np.arange(starts[segment], starts[segment] + len(segment))
        before = inside - 1
        before[0] = starts[segment.parent] + len(segment.parent) - 1
        targets.append(inside)
        sources.append(before)
    return _Flat(
        ids=np.concatenate([s.ids for s in order]),
        positions=np.concatenate(positions, axis=1),
        until=np.concatenate([np.full(len(s), ends[s]) for s in order]),
        images=tuple(image for s in order for image in s.images),
        sources=np.concatenate(sources),
        trained=np.concatenate(targets),
        old_logprobs=np.concatenate([s.logprobs for s in trained if s.logprobs is not None]),
        advantages=np.concatenate([np.full(len(s), s.credit.advantage) for s in trained if s.credit]),
        stream_tokens=np.concatenate([np.full(len(s), float(s.credit.stream_tokens)) for s in trained if s.credit]),
    )


def _needed(segment: Segment) -> bool:
    return segment.credit is not None or any(_needed(child) for child in segment.children)


def _pack(rows: Sequence[Sequence[_Flat]]) -> Pack:
    width = max(map(_width, rows))
    ids = np.zeros((len(rows), width), np.int64)
    positions = np.zeros((3, len(rows), width), np.int64)
    until = np.tile(np.arange(1, width + 1), (len(rows), 1))  # padding is seen by nothing but itself
    sources, targets = [], []
    for index, row in enumerate(rows):
        start = 0
        for flat in row:
            here = slice(start, start + len(flat.ids))
            ids[index, here], until[index, here] = flat.ids, flat.until + start
            positions[:, index, here] = flat.positions
            sources.append(flat.sources + index * width + start)
            targets.append(flat.trained + index * width + start)
            start += len(flat.ids)
    items = [flat for row in rows for flat in row]
    kept, source_index = np.unique(np.concatenate(sources), return_inverse=True)
    keep = np.zeros(ids.size, np.bool_)
    keep[kept] = True

    def joined(values: list[npt.NDArray[np.float64]]) -> Tensor:
        return torch.from_numpy(np.concatenate(values).astype(np.float64))

    return Pack(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        until=torch.from_numpy(until),
        images=tuple(image for flat in items for image in flat.images),
        keep=torch.from_numpy(keep.reshape(ids.shape)),
        sources=torch.from_numpy(source_index),
        targets=torch.from_numpy(ids.reshape(-1)[np.concatenate(targets)]),
        old_logprobs=joined([flat.old_logprobs.astype(np.float64) for flat in items]),
        advantages=joined([flat.advantages for flat in items]),
        stream_tokens=joined([flat.stream_tokens for flat in items]),
        tokens=sum(len(flat.ids) for flat in items),
    )


def pack_logprobs(model: PreTrainedModel, pack: Pack, chat: Chat, banned: Tensor, temperature: float = 1.0) -> Tensor:
    """The log-prob (n,) of each trained token under the policy, in the order of `pack.targets`.

    Each image is encoded once. Gradients flow where they are enabled.
    """
    device = model.device
    images = chat.pixels(pack.images) if pack.images else None
    logits = forward_logits(
        model, pack.ids.to(device), pack.positions.to(device), pack.mask().to(device), images, pack.keep.to(device)
    )
    logprobs = policy_logprobs(logits, banned, temperature)
    return logprobs[pack.sources.to(device), pack.targets.to(device)]
