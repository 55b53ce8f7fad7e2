"""Multimodal rotary positions (M-RoPE) along a path of the tree.

The model object remembers `rope_deltas` of its last call, which is state shared by everything in flight.
Here a position depends on nothing but the tokens before it, so packed trees, cached prefixes and fresh
forwards agree.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from axpo.tree import Ids, Image


def mrope_positions(
    ids: Sequence[int] | Ids, images: Sequence[Image], image_token: int, merge: int, start: int = 0
) -> tuple[npt.NDArray[np.int64], int]:
    """Positions of one segment that begins at position `start`.

    Text counts up by one on all three axes (t, h, w). An image of h × w merged tokens spreads them over
    a grid at the current position and moves it on by max(h, w) (`get_rope_index` of Qwen3-VL).

    Returns the positions (3, T) and the next free position. Raises ValueError where placeholders and
    images do not match.
    """
    ids = np.asarray(ids, dtype=np.int64)
    positions = np.empty((3, len(ids)), dtype=np.int64)
    placeholders = np.flatnonzero(ids == image_token)
    expected = sum(image.tokens for image in images)
    if len(placeholders) != expected:
        raise ValueError(f"{len(placeholders)} image placeholders in the ids, but the images take {expected}")
    done, used, position = 0, 0, start
    for image in images:
        first = int(placeholders[used])
        text = first - done
        positions[:, done:first] = position + np.arange(text)
        position += text
        frames, height, width = image.grid[0], image.grid[1] // merge, image.grid[2] // merge
        grid = np.indices((frames, height, width)).reshape(3, -1)
        positions[:, first : first + image.tokens] = position + grid
        position += max(height, width)
        done, used = first + image.tokens, used + image.tokens
    positions[:, done:] = position + np.arange(len(ids) - done)
    return positions, position + len(ids) - done
