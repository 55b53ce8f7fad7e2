"""The keys and values of many tree paths: what paths share is computed once, and what a group shares is kept once.

A path is a *trunk*, which many rollouts share (a prompt), and a *tail*, which is one rollout's own. A decoding step
reads each trunk once for all the rollouts on it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from axpo.engines.rows import Keys, Rows

_COLUMNS = 64  # rows are wide by multiples of this many tokens


class PathCache:
    """Trunks and tails, passed to the model as `past_key_values`; it also does the attending (attention.py).

    A path is known by its keys: its ids, where the placeholders of an image are replaced by a number that stands for
    the image. `tails.base` is the trunk of each tail. `limit` tokens may be held; over it, the least recently used idle
    paths are dropped. What is in flight is never dropped: ask `fits` before adding to it.
    """

    def __init__(self, limit: int) -> None:
        self.trunks = Rows()
        self.tails = Rows()
        self._limit = limit
        self._uses = 0
        self._forward: _Extend | _Decode | None = None

    def reset(self) -> None:
        """Forget everything, and give the memory back."""
        self.trunks, self.tails = Rows(), Rows()

    # Finding

    def trunk_under(self, path: Keys) -> int | None:
        """The length of the longest trunk that the path begins with and goes beyond."""
        shared = self.trunks.shared(path[:-1])
        shared[shared < self.trunks.lengths] = 0
        return int(shared.max()) if shared.any() else None

    def shared_trunk(self, path: Keys) -> int:
        """How many first tokens of the path some trunk holds."""
        return _longest(self.trunks.shared(path))[1]

    def shared_tail(self, path: Keys, trunk: Keys) -> int:
        """How many first tokens of the path this trunk and some tail on it hold."""
        return len(trunk) + _longest(self._on(path, trunk))[1]

    def _on(self, path: Keys, trunk: Keys) -> Keys:
        """How many tokens each tail (rows,) shares with the path beyond this trunk; -1 for those on another."""
        shared = self.tails.shared(path[len(trunk) :])
        return np.where(self.tails.base == self._number(trunk), shared, -1)

    def _number(self, trunk: Keys) -> int:
        """The row of the trunk with exactly this path; -1 where there is none."""
        same = (self.trunks.shared(trunk) == len(trunk)) & (self.trunks.lengths == len(trunk))
        same[self.trunks.busy :] &= len(trunk) > 0  # an idle row that holds nothing is no empty trunk
        return int(same.argmax()) if same.any() else -1

    # Adding and releasing

    def fits(self, *, trunks: int, trunk_tokens: int, tails: int, tail_tokens: int) -> bool:
        """Whether so many trunks and tails of at most so many tokens can be in flight at the same time."""
        return trunks * _rounded(trunk_tokens) + tails * _rounded(tail_tokens) <= self._limit

    def reserve(self, *, trunks: int = 0, trunk_tokens: int = 0, tails: int = 0, tail_tokens: int = 0) -> None:
        """Make room for so many more trunks and tails, and for this many tokens in each.

        Where the limit is in the way, idle paths go, the least recently used first, until a quarter of it is free: each
        time costs a copy of all that stays. Rows become as narrow as what is left in them allows. The numbers of trunks
        and idle tails may change.
        """
        shapes = [(self.trunks, trunks, trunk_tokens), (self.tails, tails, tail_tokens)]
        small = sum(rows.count * rows.columns for rows, _, _ in shapes) <= self._limit
        if small and all(tokens <= rows.columns and more <= len(rows.empty()) for rows, more, tokens in shapes):
            return
        sizes = [
            (max(rows.count, 2 * (rows.held() + more)), max(rows.columns, _rounded(tokens)))
            for rows, more, tokens in shapes
        ]
        if _size(sizes) > self._limit:
            sizes = self._least(shapes)
            while _size(sizes) > 0.75 * self._limit and self._drop_oldest():
                sizes = self._least(shapes)
            free = max(0, self._limit - _size(sizes))
            sizes = [(count + (free // (2 * columns) if columns else 0), columns) for count, columns in sizes]
        self._close_gaps()
        self.trunks.resize(*sizes[0])
        self.tails.resize(*sizes[1])

    def _least(self, shapes: Sequence[tuple[Rows, int, int]]) -> list[tuple[int, int]]:
        return [
            (rows.held() + more, _rounded(max(tokens, rows.lengths.max(initial=0)))) for rows, more, tokens in shapes
        ]

    def use_trunk(self, trunk: Keys) -> bool:
        """Put the trunk of this path in flight; False where there is none."""
        number = self._number(trunk)
        if number >= self.trunks.busy:
            self._swap_trunks(number, self.trunks.busy)
            self.trunks.busy += 1
        return number >= 0

    def add_trunk(self, path: Keys, shared: int) -> None:
        """Put a new trunk for this path in flight, with the first `shared` tokens of what another one holds."""
        spare = self.trunks.empty()[0]
        self.tails.lengths[self.tails.base == spare] = 0  # what stood on a trunk of this number before
        self.trunks.copy(_longest(self.trunks.shared(path))[0], spare, shared)
        self._swap_trunks(spare, self.trunks.busy)
        self.trunks.busy += 1

    def add_tail(self, path: Keys, trunk: Keys, shared: int) -> None:
        """Put a path on this trunk in flight, with its first `shared` tokens (the trunk's too) from what tails hold.

        An idle tail that loses nothing is continued where it is; any other is copied.
        """
        source, _ = _longest(self._on(path, trunk))
        row, kept = self.tails.busy, shared - len(trunk)
        if not kept or source < row or self.tails.lengths[source] > kept:
            spare = self.tails.empty()[0]
            self.tails.copy(source, spare, kept)
            source = spare
        self.tails.swap(source, row)
        self.tails.base[row] = self._number(trunk)
        self.tails.busy += 1

    def release(self, row: int) -> None:
        """End what is in flight in this row; the last busy row takes its number."""
        tails, trunk = self.tails, int(self.tails.base[row])
        self._uses += 1
        tails.used_at[row] = self.trunks.used_at[trunk] = self._uses
        tails.busy -= 1
        tails.swap(row, tails.busy)
        if not (tails.base[: tails.busy] == trunk).any():
            self.trunks.busy -= 1
            self._swap_trunks(trunk, self.trunks.busy)

    def _swap_trunks(self, a: int, b: int) -> None:
        self.trunks.swap(a, b)
        on_a, on_b = self.tails.base == a, self.tails.base == b
        self.tails.base[on_a], self.tails.base[on_b] = b, a

    def _drop_oldest(self) -> bool:
        """Drop the idle path that was used longest ago. A trunk is as young as the youngest tail on it."""
        idle = [
            (int(rows.used_at[row]), kind, rows, row)
            for kind, rows in enumerate((self.tails, self.trunks))
            for row in range(rows.busy, rows.count)
            if rows.lengths[row]
        ]
        if idle:
            _, _, rows, row = min(idle, key=lambda entry: entry[:2])
            rows.lengths[row] = 0
        return bool(idle)

    def _close_gaps(self) -> None:
        """Move what idle rows hold up against the busy ones."""
        for rows, swap in ((self.trunks, self._swap_trunks), (self.tails, self.tails.swap)):
            for row in range(rows.busy, rows.held()):
                if not rows.lengths[row]:
                    swap(row, int(np.flatnonzero(rows.lengths)[-1]))

    # One forward

    def extend_trunks(self, first: int, paths: Keys, counts: npt.NDArray[np.int64], device: torch.device) -> None:
        """Prepare a forward in which the trunks from `first` on take new tokens.

        `paths` (b, T) are the keys of the new tokens, `counts` (b,) how many of each row are real: the rest pads it on
        the right.
        """
        self._forward = _Extend(self.trunks, None, first, paths, counts, device)

    def extend_tails(self, first: int, paths: Keys, counts: npt.NDArray[np.int64], device: torch.device) -> None:
        """The same for tails."""
        self._forward = _Extend(self.tails, self.trunks, first, paths, counts, device)

    def decode(self, paths: Keys, device: torch.device) -> None:
        """Prepare a forward in which every row in flight takes one token, with these keys (b,)."""
        self._forward = _Decode(self.tails, self.trunks, paths, device)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by each attention layer: store the new keys and values (b, heads, T, head_dim)."""
        assert self._forward is not None
        self._forward.store(layer, keys, values)
        return keys, values

    def attend(self, module: torch.nn.Module, query: Tensor, scaling: float | None) -> Tensor:
        """The new tokens' attention to all of their paths: query (b, H, T, head_dim) to (b, T, H, head_dim)."""
        assert self._forward is not None
        return self._forward.attend(module, query, scaling)


class _Extend:
    """A forward in which rows that lie side by side take several tokens each. `below` are the trunks of tails."""

    def __init__(
        self,
        target: Rows,
        below: Rows | None,
        first: int,
        paths: Keys,
        counts: npt.NDArray[np.int64],
        device: torch.device,
    ) -> None:
        self.target, self.below = target, below
        self.rows = slice(first, first + len(paths))
        base, starts = target.base[self.rows], target.lengths[self.rows].copy()
        real = np.arange(paths.shape[1]) < counts[:, None]
        row = first + np.nonzero(real)[0]
        column = target.grow(row, paths[real])
        under = np.zeros(len(base), dtype=np.int64) if below is None else below.lengths[base]
        self.span, self.trunk_span = int((starts + counts).max()), int(under.max())
        self.real, self.row, self.column, self.base = (
            torch.from_numpy(array).to(device) for array in (real, row, column, base)
        )
        self.visible: Tensor | None = None  # (b, 1, T, keys); None: all that comes before
        if starts.any() or self.trunk_span:
            seen = np.arange(self.span) <= (starts[:, None] + np.arange(paths.shape[1]))[..., None]
            held = np.broadcast_to(np.arange(self.trunk_span) < under[:, None, None], (*paths.shape, self.trunk_span))
            self.visible = torch.from_numpy(np.concatenate([held, seen], axis=2)[:, None]).to(device)

    def store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        new = (x.transpose(1, 2)[self.real] for x in (keys, values))
        self.target.write(layer, self.row, self.column, *new)

    def attend(self, module: Any, query: Tensor, scaling: float | None) -> Tensor:
        keys, values = self.target.read(module.layer_idx, self.rows, self.span)
        if self.below is not None and self.trunk_span:
            under = self.below.take(module.layer_idx, self.base, self.trunk_span)
            keys, values = torch.cat([under[0], keys], 2), torch.cat([under[1], values], 2)
        causal = self.visible is None
        return sdpa_attention_forward(module, query, keys, values, self.visible, scaling=scaling, is_causal=causal)[0]


class _Decode:
    """A forward in which all b rows in flight take one token; n trunks have at most M of them each.

    The keys of a trunk are read once, by the queries of all rollouts on it; the softmax is over trunk and tail.
    """

    def __init__(self, tails: Rows, trunks: Rows, paths: Keys, device: torch.device) -> None:
        self.tails, self.trunks = tails, trunks
        rows = np.arange(tails.busy)
        columns = tails.grow(rows, paths)
        base = tails.base[rows]
        under = trunks.lengths[base]
        members = np.bincount(base, minlength=trunks.busy)
        order = np.argsort(base, kind="stable")
        turn = np.empty(len(base), dtype=np.int64)
        turn[order] = rows - (np.cumsum(members) - members)[base[order]]
        self.size = int(members.max())  # M
        self.span, self.trunk_span = int(columns.max()) + 1, int(under.max())
        seen = [np.arange(self.trunk_span) < under[:, None], np.arange(self.span) <= columns[:, None]]
        bias = np.where(np.concatenate(seen, axis=1), np.float32(0), np.float32("-inf"))
        self.bias = torch.from_numpy(bias[:, None, None]).to(device)  # (b, 1, 1, keys)
        places = base * self.size + turn
        inverse = np.zeros(trunks.busy * self.size, dtype=np.int64)  # what fills a trunk up to M is never read
        inverse[places] = rows
        self.rows, self.columns, self.places, self.members = (
            torch.from_numpy(array).to(device) for array in (rows, columns, places, inverse)
        )

    def store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.tails.write(layer, self.rows, self.columns, keys[:, :, 0], values[:, :, 0])

    def attend(self, module: Any, query: Tensor, scaling: float | None) -> Tensor:
        keys, values = self.tails.read(module.layer_idx, slice(0, len(self.rows)), self.span)
        rows, heads, _, width = query.shape
        queries = query.reshape(rows, keys.shape[1], -1, width) * (width**-0.5 if scaling is None else scaling)
        scores = torch.matmul(queries, keys.transpose(-1, -2))
        if self.trunk_span:
            below = self.trunks.read(module.layer_idx, slice(0, self.trunks.busy), self.trunk_span)
            under = torch.matmul(self._together(queries), below[0].transpose(-1, -2))
            scores = torch.cat([self._apart(under), scores], -1)
        exact = torch.promote_types(scores.dtype, torch.float32)
        shares = (scores.to(exact) + self.bias).softmax(-1).to(scores.dtype)
        out = torch.matmul(shares[..., self.trunk_span :], values)
        if self.trunk_span:
            out = out + self._apart(torch.matmul(self._together(shares[..., : self.trunk_span]), below[1]))
        return out.reshape(rows, 1, heads, width)

    def _together(self, x: Tensor) -> Tensor:
        """(b, G, R, ·) to (n, G, M·R, ·): the rows of each trunk side by side."""
        _, groups, repeats, last = x.shape
        gathered = x.index_select(0, self.members).view(-1, self.size, groups, repeats, last)
        return gathered.transpose(1, 2).reshape(-1, groups, self.size * repeats, last)

    def _apart(self, x: Tensor) -> Tensor:
        """The way back."""
        _, groups, _, last = x.shape
        rows = x.view(len(x), groups, self.size, -1, last).transpose(1, 2)
        return rows.reshape(len(x) * self.size, groups, -1, last).index_select(0, self.places)


def _longest(shared: Keys) -> tuple[int, int]:
    if not len(shared):
        return 0, 0
    best = int(shared.argmax())
    return best, max(0, int(shared[best]))


def _size(sizes: Sequence[tuple[int, int]]) -> int:
    return sum(count * columns for count, columns in sizes)


def _rounded(tokens: int) -> int:
    return -(-tokens // _COLUMNS) * _COLUMNS
