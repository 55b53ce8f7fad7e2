"""Packed trees against padded rows: one update's forward and backward over the same rollouts.

    python benchmarks/packing.py

A tree holds N rollouts of one prompt, one of which is forked into K continuations. The rows are what a trainer
without trees computes: each rollout and each continuation with its whole path, padded to the longest, in one batch.
Both compute logits at the trained tokens only. The bound is the time of the rows times unique tokens / row tokens.
"""

import argparse

import numpy as np
import torch
from timing import alternate, machine, ratio, spread, table, write

from axpo.chat import Chat
from axpo.miniature.base import BASE
from axpo.packing import pack_logprobs, pack_trees
from axpo.policy import banned_tokens, load_policy, policy_logprobs
from axpo.tree import Credit, Kind, RolloutTree

ROLLOUTS, CONTINUATIONS, LENGTH = 8, 4, 96
PROMPTS = (128, 512, 2048, 8192)
DEPTHS = (0.25, 0.75)  # where in the source the fork lies


def make_tree(prompt: int, depth: float) -> RolloutTree:
    """Random tokens; every policy token is trained."""
    rng = np.random.default_rng(prompt)

    def words(count: int) -> list[int]:
        return rng.integers(20, 500, count).tolist()

    tree = RolloutTree("q", words(prompt))
    for _ in range(ROLLOUTS):
        source = tree.append(tree.root, Kind.POLICY, words(LENGTH), [-1.0] * LENGTH)
    at = int(depth * LENGTH)
    prefix = tree.fork(source, at)
    for _ in range(CONTINUATIONS):
        tree.append(prefix, Kind.POLICY, words(LENGTH - at), [-1.0] * (LENGTH - at))
    for segment in tree.segments():
        if segment.kind is Kind.POLICY:
            segment.credit = Credit(1.0, LENGTH)
    return tree


def rows_step(model: torch.nn.Module, tree: RolloutTree, banned: torch.Tensor) -> None:
    """Every leaf's path as a row of its own, under the model's own causal mask."""
    paths = [np.concatenate([s.ids for s in leaf.path()]) for leaf in tree.leaves()]
    ids = torch.from_numpy(np.stack(paths))  # equally long here, so nothing is padding
    count, width = ids.shape
    positions = torch.arange(width).expand(3, count, width)
    keep = torch.arange(width - LENGTH - 1, width - 1)
    model.config.get_text_config()._attn_implementation = "sdpa"
    logits = model(input_ids=ids, position_ids=positions, logits_to_keep=keep, use_cache=False).logits
    model.config.get_text_config()._attn_implementation = "axpo_tree"
    logprobs = policy_logprobs(logits.flatten(0, 1), banned)
    (-logprobs.gather(1, ids[:, -LENGTH:].reshape(-1, 1)).sum()).backward()
    model.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prompts", type=int, nargs="*", default=PROMPTS)
    options = parser.parse_args()
    chat, model = Chat.from_pretrained(BASE), load_policy(BASE)
    banned = banned_tokens(chat, model)
    cases = []
    for prompt in options.prompts:
        for depth in DEPTHS:
            tree = make_tree(prompt, depth)

            def packed(tree: RolloutTree = tree) -> None:
                for pack in pack_trees([tree], chat, 100_000):
                    (-pack_logprobs(model, pack, chat, banned).sum()).backward()
                model.zero_grad()

            seconds = alternate({"packed": packed, "rows": lambda t=tree: rows_step(model, t, banned)}, options.runs)
            unique = sum(len(s) for s in tree.segments())
            rows = sum(sum(map(len, leaf.path())) for leaf in tree.leaves())
            over = ratio(seconds["packed"], seconds["rows"])
            cases.append(
                {
                    "prompt": prompt,
                    "fork_at": depth,
                    "unique_tokens": unique,
                    "row_tokens": rows,
                    "packed_seconds": spread(seconds["packed"]),
                    "rows_seconds": spread(seconds["rows"]),
                    "packed_over_rows": over,
                    "bound": unique / rows,
                    "time_over_bound": over["median"] * rows / unique,
                }
            )
            print(cases[-1], flush=True)
    write("packing", {"machine": machine(), "cases": cases})
    shown = ("prompt", "fork_at", "unique_tokens", "row_tokens", "bound", "time_over_bound")
    print(
        table(
            [
                {key: case[key] for key in shown} | {"packed_over_rows": case["packed_over_rows"]["median"]}
                for case in cases
            ]
        )
    )


if __name__ == "__main__":
    main()
