"""Attention over packed trees that costs what their paths cost, not the square of the pack.

Trees are laid out depth first, so "key k is an ancestor of query q, or q itself" is k ≤ q < until[k], where `until`
is the end of the subtree of k's segment. On the CPU, neighbours with the same `until` form a run, which attends to
itself causally, and to which whatever lies between its end and its `until` attends whole: two calls of SDPA's kernel
over slices, without a mask, and the shares of a query are put together by their log-sum-exps. On CUDA it is flex
attention with a block mask, elsewhere SDPA with a dense mask.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "axpo_tree"
BLOCK = 128  # queries and keys of a block of flex attention
# SDPA's kernel on the CPU: unlike SDPA itself it returns the log-sum-exps, and takes them for the backward pass.
_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class TreeMask:
    """Which of L packed tokens attends to which. What attention makes of it is made once, for all layers and models."""

    until: Tensor  # (L,) one past the subtree of the token's segment, on the device of the attention

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Where each run of neighbours with the same `until` starts and ends, and that `until`."""
        until = self.until.cpu()
        starts = [0, *((until[1:] != until[:-1]).nonzero()[:, 0] + 1).tolist()]
        ends = [*starts[1:], len(until)]
        return tuple(zip(starts, ends, until[starts].tolist(), strict=True))

    @cached_property
    def blocks(self) -> BlockMask:
        """For flex attention, which skips the blocks in which nobody sees anybody.

        It follows from the least and greatest `until` of each block of keys: torch's `create_block_mask` would make a
        mask of L² for it.
        """
        until, total = self.until, len(self.until)

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (query < until[key])

        count = -(-total // BLOCK)
        rows = torch.nn.functional.pad(until, (0, count * BLOCK - total)).view(count, BLOCK)  # of nobody: sees nothing
        number = torch.arange(count, device=until.device)
        start, end = (number * BLOCK)[:, None], ((number + 1) * BLOCK)[:, None]  # of the queries
        below = number < number[:, None]
        full = below & (rows.amin(1) >= end) & (end <= total)
        partial = (below & (rows.amax(1) > start) & ~full) | (number == number[:, None])
        return BlockMask.from_kv_blocks(
            *_ordered(partial), *_ordered(full), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(total, total)
        )

    @cached_property
    def dense(self) -> Tensor:
        """(L, L), True where the query of the row sees the key of the column."""
        order = torch.arange(len(self.until), device=self.until.device)
        return (order <= order[:, None]) & (order[:, None] < self.until)


def tree_attention(query: Tensor, key: Tensor, value: Tensor, mask: TreeMask, scaling: float | None) -> Tensor:
    """Attention of one pack: query (H, L, D), key and value (G, L, D) of G ≤ H heads; returns (H, L, D)."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves what was normalised in float32
    if query.device.type == "cpu":
        result: Tensor = _RunAttention.apply(query, key, value, mask.runs, scaling)  # type: ignore[no-untyped-call]
        return result
    batched = query[None], key[None], value[None]
    if query.device.type == "cuda":
        return _compiled_flex()(*batched, block_mask=mask.blocks, scale=scaling, enable_gqa=True)[0]  # type: ignore[no-any-return]
    return scaled_dot_product_attention(*batched, attn_mask=mask.dense, scale=scaling, enable_gqa=True)[0]


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the blocks (rows, columns) a row has: (1, 1, rows), and which, these first: (1, 1, rows, columns)."""
    which = torch.argsort(blocks.int(), dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], which.to(torch.int32)[None, None]


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)  # packs differ in length; uncompiled it makes all scores


class _RunAttention(torch.autograd.Function):
    """The query heads that share a key head are kept apart from the others: (G, H / G, L, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        runs: tuple[tuple[int, int, int], ...],
        scaling: float | None,
    ) -> Tensor:
        query = query.view(len(key), -1, *query.shape[1:])
        key, value = (x[:, None].expand_as(query) for x in (key, value))
        wide = torch.promote_types(query.dtype, torch.float32)
        out, sums = torch.empty_like(query, dtype=wide), query.new_empty(query.shape[:-1], dtype=wide)
        # A run's end and those below it come after it, so a query's own run has written before its ancestors add.
        for start, end, until in reversed(runs):
            own, below = slice(start, end), slice(end, until)
            seen = key[:, :, own], value[:, :, own]
            out[:, :, own], sums[:, :, own] = _kernel(query[:, :, own], *seen, 0.0, True, scale=scaling)
            if end < until:
                added, sum_added = _kernel(query[:, :, below], *seen, 0.0, False, scale=scaling)
                share = torch.sigmoid(sum_added - sums[:, :, below])
                out[:, :, below].lerp_(added.to(wide), share[..., None])
                sums[:, :, below] = torch.logaddexp(sums[:, :, below], sum_added)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.runs, ctx.scaling = runs, scaling
        return out.flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, sums = ctx.saved_tensors
        grad = grad.reshape(query.shape)
        wide = sums.dtype
        into_query = torch.zeros_like(query, dtype=wide)
        into_key, into_value = (query.new_zeros(query.shape[0], *query.shape[2:], dtype=wide) for _ in range(2))
        for start, end, until in ctx.runs:
            own = slice(start, end)
            for asking, causal in ((own, True), (slice(end, until), False)):
                if asking.start == asking.stop:
                    continue
                # With the whole output and log-sum-exp of a query, the kernel gives this share of the gradient.
                of_query, of_key, of_value = _kernel_backward(
                    *(grad[:, :, asking], query[:, :, asking], key[:, :, own], value[:, :, own]),
                    *(out[:, :, asking], sums[:, :, asking], 0.0, causal),
                    scale=ctx.scaling,
                )
                into_query[:, :, asking] += of_query
                into_key[:, own] += of_key.sum(1)
                into_value[:, own] += of_value.sum(1)
        return into_query.to(query.dtype).flatten(0, 1), into_key.to(key.dtype), into_value.to(value.dtype), None, None


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    tree: TreeMask | None = None,
    paths: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer. With `paths` the engine's cache attends, over what it holds. Without that
    and without `tree` it is the library's own SDPA, which needs a 4-D mask.

    Raises ValueError where a model asks a tree for more than plain attention (soft caps, sinks, windows).
    """
    if paths is not None:
        return paths.attend(module, query, scaling), None
    if tree is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return out, None
    unknown = [name for name in ("softcap", "s_aux", "position_bias", "sliding_window") if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(f"{type(module).__name__} attends with {', '.join(unknown)}, which packed trees do not know")
    out = tree_attention(query[0], key[0], value[0], tree, scaling)
    return out.transpose(0, 1)[None], None


AttentionInterface.register(NAME, _attend)
