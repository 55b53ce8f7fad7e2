"""The keys and values of many tree paths, one row each, so that what two paths share is computed once.

Rows `0 .. busy-1` are in flight and lie side by side, so that a step reads them as one slice without copying.
The rows behind them are idle: what they hold can be continued or copied, and the least recently used goes first.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Keys = npt.NDArray[np.int64]
_COLUMNS = 128  # the buffers grow by multiples of this many tokens


class PathCache:
    """Row buffers (rows, heads, columns, head_dim) for each layer, passed to the model as `past_key_values`.

    A path is known by its keys: its ids, where the placeholders of an image are replaced by a number that
    stands for the image. `lengths` (rows,) counts the tokens whose keys and values a row holds.
    """

    def __init__(self, max_busy: int) -> None:
        self.busy = 0
        self.lengths = np.zeros(0, dtype=np.int64)
        self._max_rows = 2 * max_busy  # as many idle as in flight
        self._paths: Keys = np.zeros((0, 0), dtype=np.int64)
        self._used_at = np.zeros(0, dtype=np.int64)
        self._uses = 0
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}  # by layer
        self._first = 0
        self._last = 0
        self._span = 0
        self._columns_written: Tensor | None = None

    # Rows

    def match(self, path: Keys) -> tuple[int, int]:
        """The row that shares the longest prefix with this path, and how many tokens they share (0: none)."""
        width = min(len(path), self._paths.shape[1])
        if not width:
            return 0, 0
        same = self._paths[:, :width] == path[:width]
        same &= np.arange(width) < self.lengths[:, None]
        shared = np.where(same.all(1), width, same.argmin(1))
        row = int(shared.argmax())
        return row, int(shared[row])

    def place(self, path: Keys, source: int, shared: int) -> int:
        """Take the next busy row for this path, with the first `shared` tokens of row `source`. Returns the row.

        An idle source that loses nothing is continued where it is; any other is copied.
        """
        row = self.busy
        if shared and source >= self.busy and self.lengths[source] == shared:
            self._swap(source, row)
        else:
            spare = self._spare(source if shared else -1)
            self._swap(spare, row)
            if shared:
                self._copy(spare if source == row else source, row, shared)
        self.lengths[row] = shared
        self._paths[row, :shared] = path[:shared]
        self.busy += 1
        return row

    def release(self, row: int) -> None:
        """End what is in flight in this row; the last busy row takes its number."""
        self.busy -= 1
        self._swap(row, self.busy)
        self._uses += 1
        self._used_at[self.busy] = self._uses

    def reset(self) -> None:
        """Forget all that the rows hold."""
        self.busy = 0
        self.lengths[:] = 0
        self._used_at[:] = 0

    def _spare(self, keep: int) -> int:
        """An idle row to overwrite: a new one while there may be more, else the least recently used but `keep`."""
        empty = [row for row in range(self.busy, len(self.lengths)) if not self.lengths[row] and row != keep]
        if empty:
            return empty[0]
        if len(self.lengths) < self._max_rows:
            row = len(self.lengths)
            self._grow(min(self._max_rows, max(4, 2 * row)), self._paths.shape[1])
            return row
        idle = [row for row in range(self.busy, len(self.lengths)) if row != keep]
        return min(idle, key=lambda row: int(self._used_at[row]))

    def _copy(self, source: int, target: int, tokens: int) -> None:
        for pair in self._buffers.values():
            for buffer in pair:
                buffer[target, :, :tokens] = buffer[source, :, :tokens]

    def _swap(self, a: int, b: int) -> None:
        if a == b:
            return
        tokens = int(max(self.lengths[a], self.lengths[b]))
        for pair in self._buffers.values():
            for buffer in pair:
                kept = buffer[a, :, :tokens].clone()
                buffer[a, :, :tokens] = buffer[b, :, :tokens]
                buffer[b, :, :tokens] = kept
        for array in (self.lengths, self._used_at, self._paths):
            array[[a, b]] = array[[b, a]]

    def _grow(self, rows: int, columns: int) -> None:
        old_rows, old_columns = self._paths.shape
        self.lengths = np.pad(self.lengths, (0, rows - old_rows))
        self._used_at = np.pad(self._used_at, (0, rows - old_rows))
        self._paths = np.pad(self._paths, ((0, rows - old_rows), (0, columns - old_columns)))
        for layer, (keys, values) in self._buffers.items():
            self._buffers[layer] = (_grown(keys, rows, columns), _grown(values, rows, columns))

    # One forward

    def window(self, first: int, last: int, paths: Keys, counts: npt.NDArray[np.int64], device: torch.device) -> Tensor:
        """Prepare a forward in which rows `first .. last-1` take new tokens, and return its mask.

        `paths` (b, T) are the keys of the new tokens, `counts` (b,) how many of each row are real: the rest pads
        it on the right. The mask (b, 1, T, S) is True where a new token may attend.
        """
        width = paths.shape[1]
        starts = self.lengths[first:last]
        needed = int(starts.max()) + width
        if needed > self._paths.shape[1]:
            grown = max(needed, self._paths.shape[1] * 3 // 2)
            self._grow(len(self.lengths), -(-grown // _COLUMNS) * _COLUMNS)
        starts = self.lengths[first:last].copy()
        columns = starts[:, None] + np.arange(width)
        self._paths[np.arange(first, last)[:, None], columns] = paths
        self.lengths[first:last] = starts + counts
        self._first, self._last, self._span = first, last, int((starts + counts).max())
        self._columns_written = torch.from_numpy(columns).to(device)
        reach = torch.arange(self._span, device=device)
        return reach <= self._columns_written[:, None, :, None]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by each attention layer: store the new keys and values (b, heads, T, head_dim), return all of them."""
        if layer not in self._buffers:
            shape = (len(self.lengths), keys.shape[1], self._paths.shape[1], keys.shape[3])
            self._buffers[layer] = (keys.new_zeros(shape), values.new_zeros(shape))
        assert self._columns_written is not None
        rows = torch.arange(self._first, self._last, device=keys.device)[:, None]
        stored = []
        for buffer, new in zip(self._buffers[layer], (keys, values), strict=True):
            buffer[rows, :, self._columns_written] = new.transpose(1, 2)
            stored.append(buffer[self._first : self._last, :, : self._span])
        return stored[0], stored[1]


def _grown(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros, not uninitialised memory, behind the old content: a masked NaN would still be a NaN."""
    grown = buffer.new_zeros((rows, buffer.shape[1], columns, buffer.shape[3]))
    grown[: buffer.shape[0], :, : buffer.shape[2]] = buffer
    return grown
