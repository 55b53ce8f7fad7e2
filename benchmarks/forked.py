"""Forked trees of random tokens, and the rows that a trainer without trees would make of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from axpo.credit import credit_axpo
from axpo.logprobs import target_logprobs
from axpo.policy import output_head
from axpo.positions import mrope_positions
from axpo.tree import Image, Kind, Outcome, RolloutTree, Segment, StopReason

ROLLOUTS, CONTINUATIONS = 8, 4

Pixels = Callable[[Sequence[Image]], tuple[Tensor, Tensor]]  # as Chat.pixels


def make_tree(
    prompt: int, length: int, depth: float, rollouts: int = ROLLOUTS, seed: int = 0, placeholders: Sequence[int] = ()
) -> RolloutTree:
    """`rollouts` of one prompt, the first of which failed and is forked `depth` of its way into 4 continuations.

    Its prefix and the continuations learn, its failed end does not. Random tokens of the ordinary vocabulary;
    `placeholders` take the middle of the prompt, whose images the caller adds to the root.
    """
    rng = np.random.default_rng([seed, prompt])

    def add(parent: Segment, count: int, reward: float, resampled: int = 0) -> Segment:
        ids = rng.integers(20, 500, count)
        segment = tree.append(parent, Kind.POLICY, ids, [-1.0] * count, resampled=resampled)
        segment.outcome = Outcome(StopReason.ANSWER, reward)
        return segment

    words = rng.integers(20, 500, prompt - len(placeholders))
    tree = RolloutTree(f"q{seed}", np.insert(words, len(words) // 2, placeholders))
    source, *_ = [add(tree.root, length, float(i % 2)) for i in range(rollouts)]
    at = int(depth * length)
    prefix = tree.fork(source, at)
    for i in range(CONTINUATIONS):
        add(prefix, length - at, float(i % 2), resampled=1)
    credit_axpo(tree)
    return tree


def trained_paths(tree: RolloutTree) -> list[list[Segment]]:
    """The path of each leaf that learns."""
    return [leaf.path() for leaf in tree.leaves() if leaf.credits]


@dataclass(frozen=True)
class Rows:
    """Equally long rows without a tree: no token is trained twice, and what trains nothing has no row."""

    ids: Tensor  # (R, W)
    positions: Tensor  # (3, R, W)
    sources: list[Tensor]  # for each row, the places that predict what it trains
    images: list[Sequence[Image]]  # for each row

    @staticmethod
    def of(trees: Sequence[RolloutTree], image_token: int | None, merge: int) -> "Rows":
        ids, positions, sources, images = [], [], [], []
        trained: set[Segment] = set()
        for path in (path for tree in trees for path in trained_paths(tree)):
            places, start = [], 0
            for segment in path:
                if segment.credits and segment not in trained:
                    trained.add(segment)
                    places.append(torch.arange(start - 1, start + len(segment) - 1))
                start += len(segment)
            ids.append(np.concatenate([s.ids for s in path]))
            images.append(path[0].images)
            positions.append(mrope_positions(ids[-1], images[-1], -1 if image_token is None else image_token, merge)[0])
            sources.append(torch.cat(places))
        return Rows(torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(positions, 1)), sources, images)

    def step(self, model: PreTrainedModel, banned: Tensor, batch: int, pixels: Pixels) -> float:
        """Forward and backward, `batch` rows at once; the sum of the trained tokens' log-probs.

        No mask is given, so that SDPA takes its causal kernel: nothing here is padding.
        """
        total = 0.0
        for first in range(0, len(self.ids), batch):
            chosen = slice(first, first + batch)
            sources = self.sources[chosen]
            rows = torch.cat([torch.full_like(s, row) for row, s in enumerate(sources)])
            columns = torch.cat(sources)
            ids = self.ids[chosen].to(model.device)
            inputs = {}
            if seen := [image for images in self.images[chosen] for image in images]:
                patches, grids = pixels(seen)
                inputs = {"pixel_values": patches.to(model.device), "image_grid_thw": grids.to(model.device)}
            positions = self.positions[:, chosen].to(model.device)
            hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False, **inputs).last_hidden_state
            weight = output_head(model).weight
            loss = -target_logprobs(hidden[rows, columns], weight, ids[rows, columns + 1], banned, 1.0).sum()
            loss.backward()
            total -= loss.item()
        model.zero_grad()
        return total
