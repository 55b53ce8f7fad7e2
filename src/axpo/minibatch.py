"""What one step of the optimizer learns from, when several processes learn together."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from axpo.chat import Chat
from axpo.optimizer import Optimizer
from axpo.packing import Pack, idle_pack, pack_trees
from axpo.parallel import Ranks
from axpo.policy import vision_tower
from axpo.tree import RolloutTree


@dataclass(frozen=True)
class Minibatch:
    """This process's packs; all else counts what all processes have."""

    packs: list[Pack]
    trees: int
    tokens: int  # trained ones: the loss is a mean over them
    images: bool  # whether there are any


def minibatches(
    parts: Sequence[Sequence[RolloutTree]], chat: Chat, token_limit: int, ranks: Ranks, shared: bool
) -> list[Minibatch]:
    """A minibatch of each of the parts, which are this process's trees and as many parts on every process.

    Where weights are `shared` a forward is of all processes, so each gets as many packs as the one that has most.
    """
    packs = [pack_trees(part, chat, token_limit) for part in parts]
    own = [
        (len(part), len(packed), sum(len(pack.targets) for pack in packed), any(pack.images for pack in packed))
        for part, packed in zip(parts, packs, strict=True)
    ]
    found = []
    for packed, each in zip(packs, zip(*ranks.all(own), strict=True), strict=True):
        trees, numbers, tokens, images = zip(*each, strict=True)
        idle = [idle_pack(chat)] * (max(numbers) - len(packed)) if shared else []
        found.append(Minibatch(packed + idle, sum(trees), sum(tokens), any(images)))
    return found


def apply(minibatch: Minibatch, optimizer: Optimizer, model: PreTrainedModel, ranks: Ranks, shared: bool) -> float:
    """Step by the gradients that all processes have taken from a minibatch; returns their norm before clipping."""
    if not shared:
        ranks.sum_gradients(optimizer.stepped, model.device)
    elif not minibatch.images and (tower := vision_tower(model)) is not None:
        # FSDP2 has made zeros, by which AdamW would go on with its momentum.
        optimizer.forget(tower.parameters())
    return optimizer.step()
