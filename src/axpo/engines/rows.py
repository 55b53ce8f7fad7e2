"""Rows of keys and values, and the tokens that they were computed from."""

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn.functional import pad

Keys = npt.NDArray[np.int64]


class Rows:
    """Buffers (rows, heads, columns, head_dim) of keys and of values for each layer.

    Rows `0 .. busy-1` are in use and lie side by side, so that a step reads them as one slice without copying. The rows
    behind them are idle: what they hold can be continued or copied, until they are overwritten.

    `lengths` (rows,) counts the tokens that a row holds, `paths` (rows, columns) are their keys, `used_at` (rows,)
    tells which was used last, and `base` (rows,) is another row that a row stands on: it goes with it when it moves.
    """

    def __init__(self) -> None:
        self.busy = 0
        self.lengths = np.zeros(0, dtype=np.int64)
        self.used_at = np.zeros(0, dtype=np.int64)
        self.base = np.zeros(0, dtype=np.int64)
        self.paths: Keys = np.zeros((0, 0), dtype=np.int64)
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}  # by layer

    @property
    def count(self) -> int:
        return len(self.paths)

    @property
    def columns(self) -> int:
        return int(self.paths.shape[1])

    def empty(self) -> list[int]:
        """The idle rows that hold nothing."""
        return [row for row in range(self.busy, self.count) if not self.lengths[row]]

    def held(self) -> int:
        """How many rows are in use or hold something."""
        return self.busy + int(np.count_nonzero(self.lengths[self.busy :]))

    def shared(self, path: Keys) -> Keys:
        """How many first tokens each row (rows,) shares with the path."""
        width = min(len(path), self.columns)
        if not width:
            return np.zeros(self.count, dtype=np.int64)
        same = self.paths[:, :width] == path[:width]
        same &= np.arange(width) < self.lengths[:, None]
        return np.where(same.all(1), width, same.argmin(1))

    def swap(self, a: int, b: int) -> None:
        """Exchange two rows."""
        if a == b:
            return
        tokens = int(max(self.lengths[a], self.lengths[b]))
        for pair in self._buffers.values():
            for buffer in pair:
                kept = buffer[a, :, :tokens].clone()
                buffer[a, :, :tokens] = buffer[b, :, :tokens]
                buffer[b, :, :tokens] = kept
        for array in (self.lengths, self.used_at, self.base, self.paths):
            array[[a, b]] = array[[b, a]]

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Let the target begin with the first tokens of the source, and hold nothing else."""
        if source != target:
            for pair in self._buffers.values():
                for buffer in pair:
                    buffer[target, :, :tokens] = buffer[source, :, :tokens]
            self.paths[target, :tokens] = self.paths[source, :tokens]
        self.lengths[target] = tokens

    def resize(self, rows: int, columns: int) -> None:
        """Make room for more rows and columns, or give them back from the end."""
        if (rows, columns) == self.paths.shape:
            return
        kept, wider = min(rows, self.count), columns - self.columns
        more = rows - kept
        self.lengths, self.used_at, self.base = (
            np.pad(array[:kept], (0, more)) for array in (self.lengths, self.used_at, self.base)
        )
        self.paths = np.pad(self.paths[:kept, :columns], ((0, more), (0, max(0, wider))))
        for layer, pair in self._buffers.items():
            # Zeros, not uninitialised memory, behind the old content: a masked NaN would still be a NaN.
            keys, values = (pad(buffer[:kept], (0, 0, 0, wider, 0, 0, 0, more)) for buffer in pair)
            self._buffers[layer] = (keys, values)

    def grow(self, rows: Keys, paths: Keys) -> Keys:
        """Let rows take one more token each, with these keys; a row that stands here several times takes several.

        `rows` (k,), rising, and `paths` (k,). Returns the columns (k,) of the tokens.
        """
        turns = np.arange(len(rows)) - np.searchsorted(rows, rows)
        columns = self.lengths[rows] + turns
        self.paths[rows, columns] = paths
        np.add.at(self.lengths, rows, 1)
        return columns

    def write(self, layer: int, rows: Tensor, columns: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store new keys and values (k, heads, head_dim) at these rows and columns (k,)."""
        if layer not in self._buffers:
            shape = (self.count, keys.shape[1], self.columns, keys.shape[2])
            self._buffers[layer] = (keys.new_zeros(shape), values.new_zeros(shape))
        for buffer, new in zip(self._buffers[layer], (keys, values), strict=True):
            buffer[rows, :, columns] = new

    def read(self, layer: int, rows: slice, span: int) -> tuple[Tensor, Tensor]:
        """The first `span` keys and values (b, heads, span, head_dim) of these rows, without copying."""
        keys, values = self._buffers[layer]
        return keys[rows, :, :span], values[rows, :, :span]

    def take(self, layer: int, rows: Tensor, span: int) -> tuple[Tensor, Tensor]:
        """The same for any rows (b,), copied."""
        keys, values = self._buffers[layer]
        return keys[:, :, :span][rows], values[:, :, :span][rows]
