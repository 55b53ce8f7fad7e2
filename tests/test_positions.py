from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from axpo.positions import mrope_positions
from axpo.tree import Image

PAD = 99


def picture(height: int, width: int) -> Image:
    """An image of height × width merged tokens."""
    return Image(b"", (1, 2 * height, 2 * width), height * width)


def laid_out(runs: list[int | Image]) -> tuple[list[int], list[Image]]:
    """Ids and images of a path: a number is so many text tokens."""
    ids: list[int] = []
    for run in runs:
        ids += [1] * run if isinstance(run, int) else [PAD] * run.tokens
    return ids, [run for run in runs if isinstance(run, Image)]


def test_golden() -> None:
    """Two text tokens, an image of 2 rows and 3 columns, one text token."""
    positions, following = mrope_positions([1, 2, *[PAD] * 6, 3], [picture(2, 3)], PAD, 2)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert following == 6


paths = st.lists(
    st.integers(1, 5) | st.builds(picture, st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=6
).map(lambda runs: [part for run in runs for part in (run, 1)])  # images never touch: tags stand between them


@given(paths)
def test_equal_to_the_model(any_model: Any, runs: list[int | Image]) -> None:
    ids, images = laid_out(runs)
    positions, following = mrope_positions(ids, images, PAD, 2)
    expected, delta = any_model.model.get_rope_index(
        torch.tensor([ids]),
        mm_token_type_ids=torch.tensor([[int(i == PAD) for i in ids]]),
        image_grid_thw=torch.tensor([image.grid for image in images]) if images else None,
    )
    assert positions.tolist() == expected[:, 0].tolist()
    assert following == len(ids) + delta.item()


@given(paths, paths)
def test_segment_by_segment_equals_the_whole(first: list[int | Image], second: list[int | Image]) -> None:
    whole, end = mrope_positions(*laid_out(first + second), PAD, 2)
    head, middle = mrope_positions(*laid_out(first), PAD, 2)
    tail, last = mrope_positions(*laid_out(second), PAD, 2, start=middle)
    np.testing.assert_array_equal(whole, np.concatenate([head, tail], axis=1))
    assert last == end


@pytest.mark.parametrize("placeholders", [0, 5, 7])
def test_placeholders_must_match_the_images(placeholders: int) -> None:
    with pytest.raises(ValueError, match=f"{placeholders} image placeholders in the ids, but the images take 6"):
        mrope_positions([1, *[PAD] * placeholders], [picture(2, 3)], PAD, 2)


@pytest.fixture(scope="module")
def any_model(make_model: Any) -> Any:
    return make_model()
