import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from axpo.engines.kv import PathCache


def feed(cache: PathCache, row: int, path: list[int]) -> None:
    """One forward of a row's new tokens in two layers; a token's key holds the sum of the path up to it."""
    start = int(cache.lengths[row])
    cache.window(row, row + 1, np.array([path[start:]]), np.array([len(path) - start]), torch.device("cpu"))
    for layer in (0, 1):
        keys = expected(path, layer)[start:].view(1, 1, -1, 1).expand(1, 2, -1, 3)
        cache.update(keys, -keys, layer)


def expected(path: list[int], layer: int) -> torch.Tensor:
    return torch.tensor(path, dtype=torch.float32).cumsum(0) + 1000 * layer


def check(cache: PathCache, paths: list[list[int]]) -> None:
    for row, path in enumerate(paths):
        assert cache.lengths[row] == len(path)
        for layer, (keys, values) in cache._buffers.items():
            assert keys[row, 1, : len(path), 2].tolist() == expected(path, layer).tolist()
            assert values[row, 0, : len(path), 0].tolist() == (-expected(path, layer)).tolist()


paths = st.lists(st.integers(0, 1), min_size=1, max_size=200).map(lambda tail: [7] * (200 - len(tail)) + tail)


@given(st.integers(1, 3), st.lists(paths.map(tuple) | st.integers(0, 9), max_size=40))
@settings(max_examples=60, deadline=None)
def test_rows_hold_their_paths_whatever_is_placed_and_released(
    max_busy: int, actions: list[tuple[int, ...] | int]
) -> None:
    cache = PathCache(max_busy)
    busy: list[list[int]] = []
    for action in actions:
        if isinstance(action, int) or len(busy) == max_busy:
            if busy:
                row = (action if isinstance(action, int) else 0) % len(busy)
                cache.release(row)
                busy[row] = busy[-1]
                busy.pop()
        else:
            path = list(action)
            source, shared = cache.match(np.array(path))
            if shared:
                held = cache._paths[source, : cache.lengths[source]].tolist()
                assert held[:shared] == path[:shared]
            row = cache.place(np.array(path), source, min(shared, len(path) - 1))
            assert row == len(busy)
            feed(cache, row, path)
            busy.append(path)
        assert len(cache.lengths) <= 2 * max_busy
        check(cache, busy)


def test_match_finds_the_longest_prefix() -> None:
    cache = PathCache(2)
    assert cache.match(np.array([1, 2])) == (0, 0)
    for path in ([1, 2, 3], [1, 2, 4, 5]):
        feed(cache, cache.place(np.array(path), 0, 0), path)
    assert cache.match(np.array([1, 2, 4, 9])) == (1, 3)
    assert cache.match(np.array([1, 2, 4, 5, 6])) == (1, 4)
    assert cache.match(np.array([9]))[1] == 0
    cache.reset()
    assert cache.match(np.array([1, 2, 3]))[1] == 0


def test_the_least_recently_used_idle_row_goes_first() -> None:
    cache = PathCache(1)  # one row in flight and one idle
    for start in (10, 20, 30):
        feed(cache, cache.place(np.array([start, 1]), 0, 0), [start, 1])
        cache.release(0)
    assert [cache.match(np.array([start, 1]))[1] for start in (10, 20, 30)] == [0, 2, 2]


def test_what_others_may_still_need_is_copied_not_taken() -> None:
    cache = PathCache(2)
    feed(cache, cache.place(np.array([1, 2, 3]), 0, 0), [1, 2, 3])
    cache.release(0)
    source, shared = cache.match(np.array([1, 2, 9]))
    feed(cache, cache.place(np.array([1, 2, 9]), source, shared), [1, 2, 9])
    assert cache.match(np.array([1, 2, 3]))[1] == 3


def test_mask_of_rows_of_different_length() -> None:
    cache = PathCache(2)
    feed(cache, cache.place(np.array([1, 2]), 0, 0), [1, 2])
    cache.place(np.array([5]), 0, 0)
    mask = cache.window(0, 2, np.array([[3, 4], [5, 0]]), np.array([2, 1]), torch.device("cpu"))
    assert mask.int().tolist() == [[[[1, 1, 1, 0], [1, 1, 1, 1]]], [[[1, 0, 0, 0], [1, 1, 0, 0]]]]
    assert cache.lengths[:2].tolist() == [4, 1]
