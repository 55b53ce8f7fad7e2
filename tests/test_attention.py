"""Blocks of queries with gathered keys attend as a dense mask over the whole pack does."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from axpo.attention import BLOCK, TreeMask, tree_attention


def random_trees(parents: list[int], sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Segments in depth-first order: `until` (L,), and who sees whom (L, L), found by walking up from each token."""
    chosen = [0]
    for number, pick in enumerate(parents, 1):  # 0: a new tree; else a child of a segment on the path just left
        path = [number - 1]
        while chosen[path[-1]]:
            path.append(chosen[path[-1]] - 1)
        chosen.append(0 if pick == 0 else path[pick % len(path)] + 1)
    owner = np.repeat(np.arange(len(chosen)), sizes[: len(chosen)])
    ancestors: list[set[int]] = []
    for number, parent in enumerate(chosen):
        ancestors.append({number} | (ancestors[parent - 1] if parent else set()))
    seen = torch.tensor([[k in ancestors[q] for k in owner] for q in owner]).tril()
    until = [max(i for i, o in enumerate(owner) if segment in ancestors[o]) + 1 for segment in owner]
    return torch.tensor(until), seen


@settings(max_examples=30, deadline=None)
@given(
    parents=st.lists(st.integers(0, 5), max_size=9),
    sizes=st.lists(st.integers(1, 90), min_size=10, max_size=10),
    heads=st.sampled_from([(2, 2), (4, 2), (6, 1)]),
)
def test_as_a_dense_mask_in_output_and_gradients(parents: list[int], sizes: list[int], heads: tuple[int, int]) -> None:
    until, seen = random_trees(parents, sizes)
    total = len(until)
    generator = torch.Generator().manual_seed(total)
    query, key, value = (
        torch.randn(count, total, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for count in (heads[0], heads[1], heads[1])
    )
    mask = TreeMask.of(until, torch.float64)
    ours = tree_attention(query, key, value, mask, 0.3)
    repeated = [x.repeat_interleave(heads[0] // heads[1], 0) for x in (key, value)]
    dense = scaled_dot_product_attention(query, *repeated, attn_mask=seen, scale=0.3)
    torch.testing.assert_close(ours, dense, atol=1e-12, rtol=0)
    weight = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((ours * weight).sum(), [query, key, value]),
        torch.autograd.grad((dense * weight).sum(), [query, key, value]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_keys_are_gathered_only_where_a_block_sees_them() -> None:
    # One root of 2 blocks; 6 branches of a block each: a branch sees the root and itself.
    until = torch.tensor([8 * BLOCK] * (2 * BLOCK) + [end * BLOCK for end in range(3, 9) for _ in range(BLOCK)])
    mask = TreeMask.of(until)
    assert mask.keys.shape == (8, 3 * BLOCK)
    assert mask.keys[5].tolist() == [*range(2 * BLOCK), *range(5 * BLOCK, 6 * BLOCK)]
    visible = (mask.bias == 0).sum((1, 2, 3)).tolist()
    triangle = BLOCK * (BLOCK + 1) // 2
    assert visible == pytest.approx([triangle, BLOCK**2 + triangle] + [2 * BLOCK**2 + triangle] * 6)
