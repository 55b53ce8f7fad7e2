"""Attention along the runs of a pack, and flex attention, attend as a dense mask over the whole pack does."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from axpo.attention import TreeMask, tree_attention


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


@settings(max_examples=30)
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
    mask = TreeMask(until)
    assert torch.equal(mask.dense, seen)
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


@given(parents=st.lists(st.integers(0, 5), max_size=9), sizes=st.lists(st.integers(1, 9), min_size=10, max_size=10))
def test_no_score_is_computed_in_vain(parents: list[int], sizes: list[int]) -> None:
    until, seen = random_trees(parents, sizes)
    causal = sum((end - start) * (end - start + 1) // 2 for start, end, _ in TreeMask(until).runs)
    below = sum((end - start) * (until - end) for start, end, until in TreeMask(until).runs)
    assert causal + below == int(seen.sum())


@settings(max_examples=20, deadline=None)
@given(parents=st.lists(st.integers(0, 5), max_size=9), sizes=st.lists(st.integers(1, 400), min_size=10, max_size=10))
def test_flex_attention_gets_the_blocks_that_torch_finds(parents: list[int], sizes: list[int]) -> None:
    mask = TreeMask(random_trees(parents, sizes)[0])
    ours, total = mask.blocks, len(mask.until)
    whole = create_block_mask(ours.mask_mod, None, None, total, total, device="cpu")
    assert ours.shape == whole.shape
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, indices = (getattr(ours, f"{name}_{kind}") for kind in ("num_blocks", "indices"))
        assert torch.equal(counts, getattr(whole, f"{name}_num_blocks"))
        told = torch.arange(indices.shape[-1]) < counts[..., None]  # what comes after those is never read
        assert torch.equal(indices[told], getattr(whole, f"{name}_indices")[told])


def test_runs_by_hand() -> None:
    # [0, 2) has the branches [2, 3) and [3, 5); what [3, 4) continues as in [4, 5) is the same run. Then another tree.
    assert TreeMask(torch.tensor([5, 5, 3, 5, 5, 6])).runs == ((0, 2, 5), (2, 3, 3), (3, 5, 5), (5, 6, 6))


def test_bfloat16_is_close_to_float32() -> None:
    until, _ = random_trees([1, 1, 2, 0, 1], [40, 30, 20, 90, 7, 60])
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(count, len(until), 8, generator=generator).requires_grad_() for count in (4, 2, 2)]
    narrow = [x.detach().bfloat16().requires_grad_() for x in wide]
    ours, exact = (tree_attention(*given, TreeMask(until), None) for given in (narrow, wide))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), exact, atol=0.03, rtol=0)
    slopes = (torch.autograd.grad(out.float().square().sum(), given) for out, given in ((ours, narrow), (exact, wide)))
    for one, other in zip(*slopes, strict=True):
        assert (one.float() - other).norm() < 0.02 * other.norm()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_as_the_dense_mask() -> None:
    until, seen = random_trees([1, 1, 2, 0, 1], [90, 130, 20, 90, 7, 60])
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, len(until), 16, generator=generator) for _ in range(3))
    flex = flex_attention(query, key, value, block_mask=TreeMask(until).blocks, scale=0.3)
    dense = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.3)
    torch.testing.assert_close(flex, dense, atol=1e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention has gradients on CUDA only")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_flex_attention_on_cuda_as_the_dense_mask_in_output_and_gradients(kind: torch.dtype) -> None:
    for sizes in ([90, 130, 20, 90, 7, 60], [200, 30, 300, 1, 64, 65]):  # two lengths, neither a multiple of a block
        until, seen = (x.cuda() for x in random_trees([1, 1, 2, 0, 1], sizes))
        shapes = [(4, len(until), 32), (2, len(until), 32), (2, len(until), 32)]
        given = [torch.randn(shape, device="cuda").to(kind).requires_grad_() for shape in shapes]
        exact = [x.detach().double().requires_grad_() for x in given]
        ours = tree_attention(*given, TreeMask(until), 0.3)
        repeated = [exact[0], *(x.repeat_interleave(2, 0) for x in exact[1:])]
        dense = scaled_dot_product_attention(*repeated, attn_mask=seen, scale=0.3)
        torch.testing.assert_close(ours.double(), dense, atol=0.03, rtol=0)
        slope = torch.randn_like(dense)
        near = torch.autograd.grad((ours.double() * slope).sum(), given)
        for one, other in zip(near, torch.autograd.grad((dense * slope).sum(), exact), strict=True):
            assert (one.double() - other).norm() < 0.02 * other.norm()
