"""Trees to packs: every token is computed once, forward and backward, but for what a cut repeats.

A tree is laid out depth first, several trees one after another, and attention follows the tree (attention.py). What
all prompts begin with (the system's words, the tools) is laid out once a pack, as if its trees were one. A tree that is
too large for a pack is cut between rollouts, and each part repeats what leads to it.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from axpo.attention import TreeMask
from axpo.chat import Chat
from axpo.logprobs import target_logprobs
from axpo.policy import forward_hidden, output_head
from axpo.positions import mrope_positions
from axpo.tree import Image, RolloutTree, Segment


@dataclass(frozen=True)
class Pack:
    """L tokens of some trees, and the n trained tokens among them: a token that several streams hold counts in each."""

    ids: Tensor  # (L,)
    positions: Tensor  # (3, L)
    until: Tensor  # (L,) one past the subtree of the token's segment
    images: tuple[Image, ...]  # in order
    keep: Tensor  # (m,) the tokens whose next-token distribution is needed
    sources: Tensor  # (n,) which of the m kept distributions predicts the trained token
    targets: Tensor  # (n,) the trained tokens
    old_logprobs: Tensor  # (n,) under the sampling distribution, NaN where that is not known
    advantages: Tensor  # (n,)
    stream_tokens: Tensor  # (n,) length of the stream that the token is averaged in


@dataclass(frozen=True)
class _Flat:
    """One tree, or a part of one, laid flat; indices are relative to its first token."""

    ids: npt.NDArray[np.int64]
    # So many first tokens are the prompt's text before its first image. Never its last token, which predicts what
    # follows: so every source and every trained token lies behind what is shared.
    shareable: int
    positions: npt.NDArray[np.int64]
    until: npt.NDArray[np.int64]
    images: tuple[Image, ...]
    sources: npt.NDArray[np.int64]
    trained: npt.NDArray[np.int64]
    old_logprobs: npt.NDArray[np.float32]
    advantages: npt.NDArray[np.float64]
    stream_tokens: npt.NDArray[np.float64]


def pack_trees(trees: Sequence[RolloutTree], chat: Chat, token_limit: int) -> list[Pack]:
    """Pack the credited part of the trees, largest first, each where it adds least, into packs of `token_limit` tokens.

    Segments with no credit in or below them (a source's failed continuation, void rollouts) are left out. A tree larger
    than the limit is cut into parts of whole rollouts, in one of which each segment is trained; a rollout longer than
    the limit makes a pack of its own.
    """
    flat = [part for tree in trees for part in _flatten(tree, chat, token_limit)]
    bins: list[_Bin] = []
    for item in sorted(flat, key=lambda f: -len(f.ids)):
        sizes = [(part.size, part.size_with(item)) for part in bins]
        fitting = [(new - old, rank) for rank, (old, new) in enumerate(sizes) if new <= token_limit]
        if fitting:
            bins[min(fitting)[1]].add(item)
        else:
            bins.append(_Bin([item], item.shareable, len(item.ids)))
    return [_join(part) for part in bins]


def idle_pack(chat: Chat) -> Pack:
    """A pack that teaches nothing: with it a process whose share is done takes part in what the others compute."""
    indices, numbers = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.float64)
    return Pack(
        ids=torch.full((2,), chat.pad_id),
        positions=torch.arange(2).expand(3, 2),
        until=torch.full((2,), 2),
        images=(),
        keep=torch.zeros(1, dtype=torch.long),
        sources=indices,
        targets=indices,
        old_logprobs=numbers,
        advantages=numbers,
        stream_tokens=numbers,
    )


@dataclass
class _Bin:
    """Trees that make one pack; what they have in common is kept up to date, so that a trial costs one comparison."""

    items: list[_Flat]
    shared: int  # so many first tokens are the same in all
    tokens: int  # of all items, what is shared counted in each

    @property
    def size(self) -> int:
        """Tokens of the pack."""
        return self.tokens - (len(self.items) - 1) * self.shared

    def shared_with(self, item: _Flat) -> int:
        """How many first tokens would be shared with the item in it."""
        width = min(self.shared, item.shareable)
        same = self.items[0].ids[:width] == item.ids[:width]
        return width if same.all() else int(same.argmin())

    def size_with(self, item: _Flat) -> int:
        """Tokens of the pack with the item in it."""
        return self.tokens + len(item.ids) - len(self.items) * self.shared_with(item)

    def add(self, item: _Flat) -> None:
        self.shared = self.shared_with(item)
        self.tokens += len(item.ids)
        self.items.append(item)


def _flatten(tree: RolloutTree, chat: Chat, token_limit: int) -> Iterator[_Flat]:
    trained: set[Segment] = set()
    for part in _parts(tree, token_limit):
        yield _flatten_part(part, trained, chat)
        trained.update(part)


def _parts(tree: RolloutTree, token_limit: int) -> list[list[Segment]]:
    """The needed segments, depth first, in parts of at most so many tokens, or of one longer rollout."""
    needed = [s for s in tree.segments() if _needed(s)]
    inner = {s.parent for s in needed}
    parts: list[dict[Segment, None]] = []
    size = 0
    for path in (s.path() for s in needed if s not in inner):
        new = [s for s in path if not parts or s not in parts[-1]]
        size += sum(map(len, new))
        if not parts or size > token_limit:
            parts.append({})
            new, size = path, sum(map(len, path))
        parts[-1].update(dict.fromkeys(new))
    return [list(part) for part in parts]


def _flatten_part(order: Sequence[Segment], trained: Collection[Segment], chat: Chat) -> _Flat:
    """Lay out segments, all that leads to them included; nothing is learnt from those that are `trained` elsewhere."""
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
    learns = [(s, credit) for s in order if s not in trained for credit in s.credits]
    sources, targets = [], []
    for segment, _ in learns:
        assert segment.parent is not None
        inside = np.arange(starts[segment], starts[segment] + len(segment))
        before = inside - 1
        before[0] = starts[segment.parent] + len(segment.parent) - 1
        targets.append(inside)
        sources.append(before)
    root = order[0].ids
    places = np.flatnonzero(root[:-1] == chat.image_token_id)
    return _Flat(
        ids=np.concatenate([s.ids for s in order]),
        shareable=int(places[0]) if len(places) else len(root) - 1,
        positions=np.concatenate(positions, axis=1),
        until=np.concatenate([np.full(len(s), ends[s]) for s in order]),
        images=tuple(image for s in order for image in s.images),
        sources=np.concatenate(sources),
        trained=np.concatenate(targets),
        old_logprobs=np.concatenate([s.logprobs for s, _ in learns if s.logprobs is not None]),
        advantages=np.concatenate([np.full(len(s), credit.advantage) for s, credit in learns]),
        stream_tokens=np.concatenate([np.full(len(s), float(credit.stream_tokens)) for s, credit in learns]),
    )


def _needed(segment: Segment) -> bool:
    return bool(segment.credits) or any(_needed(child) for child in segment.children)


def _join(part: _Bin) -> Pack:
    items, shared = part.items, part.shared
    own = [len(flat.ids) - shared for flat in items]
    offsets = np.cumsum([0, *own])[:-1]

    def moved(values: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
        return np.concatenate([value + offset for value, offset in zip(values, offsets, strict=True)])

    def laid_out(values: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
        return np.concatenate([values[0][..., :shared], *(value[..., shared:] for value in values)], axis=-1)

    def joined(values: Sequence[npt.NDArray[np.floating]]) -> Tensor:
        return torch.from_numpy(np.concatenate(values).astype(np.float64))

    ids = laid_out([flat.ids for flat in items])
    until = moved([flat.until[shared:] for flat in items])
    kept, sources = np.unique(moved([flat.sources for flat in items]), return_inverse=True)
    return Pack(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(laid_out([flat.positions for flat in items])),
        until=torch.from_numpy(np.concatenate([np.full(shared, len(ids)), until])),
        images=tuple(image for flat in items for image in flat.images),
        keep=torch.from_numpy(kept),
        sources=torch.from_numpy(sources),
        targets=torch.from_numpy(ids[moved([flat.trained for flat in items])]),
        old_logprobs=joined([flat.old_logprobs for flat in items]),
        advantages=joined([flat.advantages for flat in items]),
        stream_tokens=joined([flat.stream_tokens for flat in items]),
    )


@dataclass(frozen=True)
class PackInputs:
    """A pack on a device, with what is computed once for all forwards over it: the policy's and its reference's."""

    pack: Pack
    mask: TreeMask
    images: tuple[Tensor, Tensor] | None  # patches and grids

    @staticmethod
    def of(pack: Pack, chat: Chat, device: torch.device) -> "PackInputs":
        """Moves what a forward needs, and prepares the images."""
        moved = {
            name: getattr(pack, name).to(device) for name in ("ids", "positions", "until", "keep", "sources", "targets")
        }
        images = chat.pixels(pack.images) if pack.images else None
        return PackInputs(replace(pack, **moved), TreeMask(moved["until"]), images)


def pack_logprobs(model: PreTrainedModel, pack: Pack, chat: Chat, banned: Tensor, temperature: float = 1.0) -> Tensor:
    """The log-prob (n,) of each trained token under the policy, in the order of `pack.targets`.

    Each image is encoded once. Gradients flow where they are enabled.
    """
    return forward_logprobs(model, PackInputs.of(pack, chat, model.device), banned, temperature)


def forward_logprobs(model: PreTrainedModel, inputs: PackInputs, banned: Tensor, temperature: float = 1.0) -> Tensor:
    """`pack_logprobs` of a pack that is on the model's device already."""
    pack = inputs.pack
    hidden = forward_hidden(model, pack.ids[None], pack.positions[:, None], inputs.mask, inputs.images, pack.keep)[0]
    rows = hidden.index_select(0, pack.sources)
    return target_logprobs(rows, output_head(model).weight, pack.targets, banned, temperature)
