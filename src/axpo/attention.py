"""Attention over packed trees that costs what their paths cost, not the square of the pack.

Trees are laid out depth first, so "key k is an ancestor of query q, or q itself" is k ≤ q < until[k], where `until`
is the end of the subtree of k's segment. Queries are taken in blocks of neighbours, which share most of their
ancestors; each block attends to the keys that any of its queries sees, all blocks in one batched call, as wide as the
widest of them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

BLOCK = 128  # queries; larger ones see more keys in vain, smaller ones gather keys more often
NAME = "axpo_tree"


@dataclass(frozen=True)
class TreeMask:
    """Which of L packed tokens attends to which, for n blocks of BLOCK queries with at most K keys each."""

    keys: Tensor  # (n, K) the tokens that the block's queries see, the last one repeated to fill up
    bias: Tensor  # (n, 1, BLOCK, K) added to the scores: 0, or minus infinity

    @staticmethod
    def of(until: Tensor, dtype: torch.dtype = torch.float32) -> "TreeMask":
        """The mask of a pack from its `until` (L,), on the same device."""
        total = len(until)
        order = torch.arange(total, device=until.device)
        asking = torch.arange(-(-total // BLOCK) * BLOCK, device=until.device).clamp(max=total - 1).view(-1, BLOCK)
        seen = (order <= asking[:, -1:]) & (asking[:, :1] < until)
        count = seen.sum(1)
        places = torch.arange(int(count.max()), device=until.device)
        first = count.cumsum(0) - count
        keys = seen.nonzero()[:, 1][first[:, None] + places.minimum(count[:, None] - 1)]
        visible = (keys[:, None] <= asking[..., None]) & (asking[..., None] < until[keys][:, None])
        visible &= (places < count[:, None])[:, None]
        bias = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))
        return TreeMask(keys, bias[:, None])


def tree_attention(query: Tensor, key: Tensor, value: Tensor, mask: TreeMask, scaling: float | None) -> Tensor:
    """Attention of one pack: query (H, L, D), key and value (G, L, D) of G ≤ H heads; returns (H, L, D)."""
    blocks, width = mask.keys.shape
    heads, total, size = query.shape
    groups, chosen = len(key), mask.keys.flatten()
    queries = pad(query, (0, 0, 0, blocks * BLOCK - total)).view(heads, blocks, BLOCK, size).transpose(0, 1)
    keys, values = (
        x.index_select(1, chosen).view(groups, blocks, width, -1).transpose(0, 1).repeat_interleave(heads // groups, 1)
        for x in (key, value)
    )
    out = scaled_dot_product_attention(queries, keys, values, attn_mask=mask.bias, scale=scaling)
    return out.transpose(0, 1).reshape(heads, blocks * BLOCK, -1)[:, :total]


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
    # The gathered keys and values would be kept for the backward pass, many times the size of what they are made of.
    out = checkpoint(tree_attention, query[0], key[0], value[0], tree, scaling, use_reentrant=False)
    return out.transpose(0, 1)[None], None


AttentionInterface.register(NAME, _attend)
