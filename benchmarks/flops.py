"""What a step must compute, whoever computes it: the floating-point operations of a model's forward and backward.

Counted as for model FLOP utilisation: two for each multiply-add of every matrix product, the backward pass as twice
the forward; nothing for what is computed again under gradient checkpointing, for masked scores, or elementwise.
"""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel

from axpo.tree import Segment


def attended(paths: Iterable[Sequence[Segment]]) -> int:
    """Query-key pairs of causal attention, each segment of the paths counted once."""
    begun = {path[-1]: sum(map(len, path[:-1])) for leaf in paths for path in _prefixes(leaf)}
    return sum(len(s) * start + causal(len(s)) for s, start in begun.items())


def causal(tokens: int) -> int:
    """Query-key pairs of a sequence by itself."""
    return tokens * (tokens + 1) // 2


def _prefixes(path: Sequence[Segment]) -> Iterable[Sequence[Segment]]:
    return (path[: end + 1] for end in range(len(path)))


def text_flops(model: PreTrainedModel, tokens: int, pairs: int, predicted: int) -> float:
    """Of the language model: so many tokens, so many query-key pairs, logits at so many places."""
    config = model.config.get_text_config()
    layers = sum(p.numel() for n, p in model.named_parameters() if "language_model.layers" in n and p.ndim == 2)
    scores = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 6.0 * (layers * tokens + scores * pairs + config.hidden_size * config.vocab_size * predicted)


def vision_flops(model: PreTrainedModel, patches: Sequence[int]) -> float:
    """Of the vision encoder: one image for each number of patches."""
    config = model.config.vision_config
    named = [(n, p.numel()) for n, p in model.named_parameters() if "visual" in n and p.ndim >= 2]
    merging = sum(size for name, size in named if "merger" in name) / config.spatial_merge_size**2
    embedding = sum(size for name, size in named if "patch_embed" in name)
    layers = sum(size for name, size in named if "blocks" in name)
    scores = 2 * config.depth * config.hidden_size
    pixels = 4 * embedding  # nothing flows back into them
    return sum((pixels + 6.0 * (layers + merging)) * count + 6.0 * scores * count**2 for count in patches)
