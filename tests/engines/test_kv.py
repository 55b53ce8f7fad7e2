from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from axpo.engines.kv import PathCache
from axpo.engines.rows import Rows

CPU = torch.device("cpu")
HEADS, GROUPS, WIDTH = 4, 2, 6
Path = list[int]


def states(path: Path, layer: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values (G, T, D) that tell what path led to a token: (1, G, T, D) from `start` on."""
    sums = torch.tensor(path, dtype=torch.float64).cumsum(0)[:, None] + 100 * layer
    keys = torch.sin(sums * torch.arange(1, WIDTH + 1))[None].repeat(GROUPS, 1, 1)
    keys[1] *= -1
    return keys[:, start:], (keys + 0.5)[:, start:]


class Driver:
    """Feeds a cache as the engine does, and compares every attention with one over the whole path."""

    def __init__(self, limit: int) -> None:
        self.cache = PathCache(limit)
        self.busy: list[Path] = []
        self.computed = 0

    def add(self, path: Path) -> None:
        keys = np.array(path)
        length = self.cache.trunk_under(keys)
        trunk = keys[:-1] if length is None else keys[:length]
        if not self.cache.use_trunk(trunk):
            self.cache.reserve(trunks=1, trunk_tokens=len(trunk))
            shared = self.cache.shared_trunk(trunk)
            self.cache.add_trunk(trunk, shared)
            self.forward([path[: len(trunk)]], [shared], self.cache.extend_trunks, self.cache.trunks.busy - 1)
        self.cache.reserve(tails=1, tail_tokens=len(path) - len(trunk))
        shared = self.cache.shared_tail(keys[:-1], trunk)
        self.cache.add_tail(keys, trunk, shared)
        self.busy.append(path[:-1])
        self.forward([path[:-1]], [shared], self.cache.extend_tails, len(self.busy) - 1)

    def decode(self, tokens: Path) -> None:
        """Every path takes a token."""
        for path, token in zip(self.busy, tokens, strict=True):
            path.append(token)
        self.cache.reserve(tail_tokens=int(self.cache.tails.lengths[: len(self.busy)].max()) + 1)
        self.cache.decode(np.array(tokens), CPU)
        self.compare(self.busy, [len(path) - 1 for path in self.busy])

    def release(self, row: int) -> None:
        self.cache.release(row)
        self.busy[row] = self.busy[-1]
        self.busy.pop()

    def forward(self, paths: list[Path], starts: list[int], extend: Any, first: int) -> None:
        """Rows from `first` on take what their paths hold beyond `starts`, padded to the longest."""
        counts = np.array([len(path) - start for path, start in zip(paths, starts, strict=True)])
        if not counts.any():
            return
        self.computed += int(counts.sum())
        new = np.zeros((len(paths), counts.max()), dtype=np.int64)
        for row, (path, start) in enumerate(zip(paths, starts, strict=True)):
            new[row, : counts[row]] = path[start:]
        extend(first, new, counts, CPU)
        self.compare(paths, starts)

    def compare(self, paths: list[Path], starts: list[int]) -> None:
        width = max(len(path) - start for path, start in zip(paths, starts, strict=True))
        query = torch.randn(len(paths), HEADS, width, WIDTH, dtype=torch.float64)
        for layer in (0, 1):
            new = torch.zeros(2, len(paths), GROUPS, width, WIDTH, dtype=torch.float64)
            for row, (path, start) in enumerate(zip(paths, starts, strict=True)):
                new[0, row, :, : len(path) - start], new[1, row, :, : len(path) - start] = states(path, layer, start)
            self.cache.update(new[0], new[1], layer)
            module = SimpleNamespace(layer_idx=layer, num_key_value_groups=HEADS // GROUPS, is_causal=True)
            out = self.cache.attend(module, query, 0.3)  # type: ignore[arg-type]
            for row, (path, start) in enumerate(zip(paths, starts, strict=True)):
                keys, values = (x.repeat_interleave(HEADS // GROUPS, 0) for x in states(path, layer))
                asking = torch.arange(start, len(path))[:, None]
                whole = scaled_dot_product_attention(
                    query[row, :, : len(asking)], keys, values, torch.arange(len(path)) <= asking, scale=0.3
                )
                torch.testing.assert_close(out[row, : len(asking)].transpose(0, 1), whole, atol=1e-6, rtol=0)


def both(cache: PathCache) -> list[tuple[str, Rows]]:
    return [("trunks", cache.trunks), ("tails", cache.tails)]


words = st.lists(st.integers(0, 1), min_size=1, max_size=100)
prompts = st.sampled_from([[7] * 70, [7] * 60 + [8] * 20, [9] * 3, []])
actions = st.tuples(prompts, words) | st.integers(0, 9) | st.just("decode")


@given(st.sampled_from([64, 400, 1000, 10**6]), st.lists(actions, max_size=30))
@settings(max_examples=100)
def test_attention_is_over_the_whole_path_whatever_came_before(limit: int, done: list[Any]) -> None:
    driver = Driver(limit)
    for action in done:
        if isinstance(action, tuple):
            driver.add([*action[0], *action[1]])
        elif action == "decode" and driver.busy:
            driver.decode([len(path) % 3 for path in driver.busy])
        elif isinstance(action, int) and driver.busy:
            driver.release(action % len(driver.busy))
        cache = driver.cache
        # One more than they hold: each tail has room for the token that is decoded next.
        most = {f"{name[:-1]}_tokens": int(rows.lengths[: rows.busy].max(initial=0)) + 1 for name, rows in both(cache)}
        counts = {name: rows.busy for name, rows in both(cache)}
        if isinstance(action, tuple) and cache.fits(**counts, **most):
            # What is in flight fits: what is idle, or was wide once, does not stand in the way.
            assert sum(rows.count * rows.columns for _, rows in both(cache)) <= limit


def test_what_is_shared_is_computed_once() -> None:
    driver = Driver(10**6)
    prompt, turn = [5] * 40, [6] * 20
    for _ in range(3):
        driver.add(prompt)
    assert driver.computed == 39
    driver.decode([5, 5, 5])
    driver.decode([1, 2, 3])
    driver.release(0)
    driver.add([*prompt, 1, *turn])  # the next turn of a rollout that ended its last one
    assert driver.computed == 39 + 19  # the last one is decoded
    driver.decode([1, 2, 3])
    driver.add([*prompt, 1, *turn[:10], 9])  # a fork of it
    assert driver.computed == 39 + 19


def test_another_prompt_copies_what_it_shares() -> None:
    driver = Driver(10**6)
    driver.add([5] * 40)
    driver.add([5] * 30 + [6] * 10)
    assert driver.computed == 39 + 9
    assert driver.cache.trunks.busy == 2


def test_over_the_limit_the_least_recently_used_goes() -> None:
    driver = Driver(8 * 64)
    for first in (10, 20, 30, 40):
        driver.add([first] * 20)
        driver.decode([1])
        driver.release(0)
    held = [first for first in (10, 20, 30, 40) if driver.cache.trunk_under(np.array([first] * 20))]
    assert held == [20, 30, 40]
    driver.add([10] * 20)  # computed again
    assert driver.computed == 5 * 19


def test_a_full_cache_is_seldom_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for 20 trunks and tails; 100 more come one after another, and each time that it is full a quarter goes."""
    resizes: list[tuple[int, int]] = []
    resize = Rows.resize

    def counting(rows: Rows, count: int, columns: int) -> None:
        if (count, columns) != rows.paths.shape:
            resizes.append((count, columns))
        resize(rows, count, columns)

    monkeypatch.setattr(Rows, "resize", counting)
    driver = Driver(40 * 64)
    for first in range(10, 120):
        driver.add([first] * 20)
        driver.decode([1])
        driver.release(0)
        assert sum(rows.count * rows.columns for _, rows in both(driver.cache)) <= 40 * 64
    assert len(resizes) < 80


def test_paths_in_flight_are_never_dropped() -> None:
    driver = Driver(64)
    for first in (10, 20, 30):
        driver.add([first] * 20)
    driver.decode([1, 2, 3])  # compares with the whole paths
    assert not driver.cache.fits(trunks=1, trunk_tokens=20, tails=1, tail_tokens=20)
    assert driver.cache.fits(trunks=0, trunk_tokens=0, tails=1, tail_tokens=64)


def test_reset_gives_the_memory_back() -> None:
    driver = Driver(10**6)
    driver.add([5] * 40)
    driver.cache.reset()
    assert driver.cache.trunk_under(np.array([5] * 40)) is None
    assert driver.cache.trunks.count == driver.cache.tails.count == 0


def test_half_precision_adds_up_in_float32() -> None:
    """1000 keys that are alike: their shares add up to one, which bfloat16 alone would miss by a percent."""
    cache = PathCache(10**6)
    path = np.array([5] * 1000)
    cache.reserve(trunks=1, trunk_tokens=999, tails=1, tail_tokens=2)
    cache.add_trunk(path[:-1], 0)
    cache.extend_trunks(0, path[None, :-1], np.array([999]), CPU)
    cache.update(*torch.ones(2, 1, GROUPS, 999, WIDTH, dtype=torch.bfloat16), 0)
    cache.add_tail(path, path[:-1], 999)
    cache.decode(path[-1:], CPU)
    cache.update(*torch.ones(2, 1, GROUPS, 1, WIDTH, dtype=torch.bfloat16), 0)
    query = torch.ones(1, HEADS, 1, WIDTH, dtype=torch.bfloat16)
    out = cache.attend(SimpleNamespace(layer_idx=0), query, None)  # type: ignore[arg-type]
    assert out.float().mean().item() == pytest.approx(1, abs=4e-3)
