"""Packed trees against padded rows: forward and backward of one update over the same trained tokens.

    python benchmarks/packing.py          (about 8 minutes on two cores)

A tree holds N rollouts of one prompt, one of which failed and is forked into K continuations: its prefix and the
continuations learn, its failed end does not (AXPO's credit).

**Rows** are the best that a trainer without trees can do with it. The source needs no row, since one continuation's
row trains the prefix too: N - 1 + K rows. All are equally long here, so nothing is padding. They run under plain causal
SDPA (`is_causal`, no mask, which lets the kernel skip half of the scores), with the same log-prob code at the trained
tokens only, as many rows at once as is fastest; of more than 2,048 tokens, where one row fills the cores, one by one.
Both must find the same log-prob in sum.

**The bound** is the rows' time times unique tokens / row tokens: every token costs what one in a row costs, but once.
It is exact where time goes with tokens, as in a large model. Attention does not: a rollout's token sees the whole
prompt, a prompt's token half of it on average, so what packing drops is cheaper than what stays. This model is so
narrow that attention costs most of a long row. There the bound that can be reached is `flop_bound`, the same with
counted operations in place of tokens, which lies higher.

**Growth** holds the prompt and the fork, and takes more rollouts: every token then attends to as much as before, and
the time should be a line over the unique tokens. `exponent` is the slope of log seconds over log tokens.

Memory is the peak above what the process held before, in a process for each; of rows also one at a time.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from flops import attended, causal, text_flops
from forked import CONTINUATIONS, ROLLOUTS, Rows, make_tree, trained_paths
from timing import alone, alternate, machine, options, peak_memory, ratio, shown, spread, table, write
from transformers import AutoModelForImageTextToText

from axpo.chat import Chat
from axpo.miniature.base import BASE
from axpo.packing import pack_logprobs, pack_trees
from axpo.policy import banned_tokens, load_policy
from axpo.tree import RolloutTree

LENGTH = 96  # tokens of a rollout
CASES = ((128, 0.5), (512, 0.1), (512, 0.5), (512, 0.9), (2048, 0.5), (8192, 0.5))  # prompt, where the fork lies
GROWTH = (512, (4, 8, 16, 32))  # prompt, rollouts
LONG = 2048  # tokens of a row that go one by one


class Contenders:
    """Both sides, each with a model of its own: the rows' never hears of trees."""

    def __init__(self) -> None:
        self.chat = Chat.from_pretrained(BASE)
        self.model = load_policy(BASE)
        self.banned = banned_tokens(self.chat, self.model)
        self.rows_model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32).eval()

    def packed(self, tree: RolloutTree) -> Callable[[], float]:
        """Pack, forward and backward; the sum of the log-probs."""

        def step() -> float:
            total = 0.0
            for pack in pack_trees([tree], self.chat, 100_000):
                loss = -pack_logprobs(self.model, pack, self.chat, self.banned).sum()
                loss.backward()
                total -= loss.item()
            self.model.zero_grad()
            return total

        return step

    def rows(self, tree: RolloutTree, batch: int) -> Callable[[], float]:
        """Forward and backward of so many rows at once; the sum of the log-probs."""
        rows = self.rows_of(tree)
        return partial(rows.step, self.rows_model, self.banned, batch, self.chat.pixels)

    def rows_of(self, tree: RolloutTree) -> Rows:
        return Rows.of([tree], self.chat.image_token_id, self.chat.merge_size)

    def fastest_batch(self, tree: RolloutTree, width: int) -> int:
        """How many rows at once take the least time."""
        count = len(self.rows_of(tree).ids)
        if width > LONG + LENGTH:
            return 1
        sizes = sorted({1, -(-count // 3), count})
        seconds = alternate({str(size): self.rows(tree, size) for size in sizes}, 1)
        return min(sizes, key=lambda size: min(seconds[str(size)]))


def one_case(sides: Contenders, prompt: int, depth: float, runs: int, memory: Sequence[str]) -> dict[str, object]:
    """Everything about one tree."""
    tree = make_tree(prompt, LENGTH, depth)
    paths = trained_paths(tree)
    lengths = [sum(map(len, path)) for path in paths]
    needed = {segment for path in paths for segment in path}
    unique, row_tokens = sum(map(len, needed)), sum(lengths)
    trained = sum(len(s) for s in needed if s.credits)
    batch = sides.fastest_batch(tree, max(lengths))
    steps = {"packed": sides.packed(tree), "rows": sides.rows(tree, batch)}
    found: dict[str, float] = {}
    seconds = alternate({name: partial(lambda n: found.update({n: steps[n]()}), name) for name in steps}, runs)
    if not np.isclose(found["packed"], found["rows"], rtol=1e-4):
        raise RuntimeError(f"packed and rows do not compute the same: {found}")
    over = ratio(seconds["packed"], seconds["rows"])
    bound = unique / row_tokens
    work = {
        "packed": text_flops(sides.model, unique, attended(paths), trained),
        "rows": text_flops(sides.model, row_tokens, sum(map(causal, lengths)), trained),
    }
    flop_bound = work["packed"] / work["rows"]
    case = {"prompt": prompt, "fork_at": depth}
    return case | {
        "unique_tokens": unique,
        "row_tokens": row_tokens,
        "trained_tokens": trained,
        "rows": len(paths),
        "rows_at_once": batch,
        "packed_seconds": spread(seconds["packed"]),
        "rows_seconds": spread(seconds["rows"]),
        "packed_over_rows": over,
        "bound": bound,
        "flop_bound": flop_bound,
        "time_over_bound": over["median"] / bound,
        "time_over_bound_spread": {key: value / bound for key, value in over.items()},
        "time_over_flop_bound": over["median"] / flop_bound,
        "seconds_per_unique_token": spread([s / unique for s in seconds["packed"]]),
        "memory_mb": measured_memory(prompt, depth, batch, memory),
    }


def measured_memory(prompt: int, depth: float, batch: int, arguments: Sequence[str]) -> dict[str, float]:
    """MB of the packed tree, of the rows as they are timed, and of one row at a time."""

    def of(name: str, size: int) -> float:
        case = ("--memory-of", name, "--case", prompt, depth, "--rows-at-once", size)
        return float(alone(__file__, *case, *arguments))

    one = of("rows", 1)
    return {"packed": of("packed", 1), "rows": one if batch == 1 else of("rows", batch), "one_row": one}


def growth(sides: Contenders, prompt: int, rollouts: Sequence[int], runs: int) -> dict[str, object]:
    """The seconds of packed trees of more and more rollouts, and how straight a line they make."""
    trees = {count: make_tree(prompt, LENGTH, 0.5, count) for count in rollouts}
    tokens = {n: sum(len(p.ids) for p in pack_trees([t], sides.chat, 100_000)) for n, t in trees.items()}
    seconds = alternate({str(n): sides.packed(tree) for n, tree in trees.items()}, runs)
    points = [
        {"rollouts": n, "unique_tokens": tokens[n], "packed_seconds": spread(seconds[str(n)])}
        | {"seconds_per_unique_token": spread([s / tokens[n] for s in seconds[str(n)]])}
        for n in rollouts
    ]
    x, y = np.array(list(tokens.values())), np.array([np.median(s) for s in seconds.values()])
    slope, start = np.polyfit(x, y, 1)
    return {
        "prompt": prompt,
        "points": points,
        "seconds_per_token": float(slope),
        "seconds_at_zero": float(start),
        "r_squared": float(1 - ((y - slope * x - start) ** 2).sum() / ((y - y.mean()) ** 2).sum()),
        "exponent": float(np.polyfit(np.log(x), np.log(y), 1)[0]),
    }


def memory_of(name: str, prompt: int, depth: float, batch: int) -> float:
    """The peak of one step, after a small one that loads what the first step loads."""
    sides = Contenders()

    def step(tree: RolloutTree) -> Callable[[], float]:
        return sides.packed(tree) if name == "packed" else sides.rows(tree, batch)

    step(make_tree(16, 4, 0.5))()
    return peak_memory(step(make_tree(prompt, LENGTH, depth)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--prompts", type=int, nargs="*", help="only these prompt lengths")
    parser.add_argument("--growth", type=int, nargs="*", default=GROWTH[1], help="rollouts of the trees that grow")
    parser.add_argument("--memory-of", choices=("packed", "rows"), help="print its MB for one case")
    parser.add_argument("--case", type=float, nargs=2, metavar=("PROMPT", "DEPTH"))
    parser.add_argument("--rows-at-once", type=int, default=1)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    if chosen.memory_of:
        prompt, depth = chosen.case
        print(json.dumps(memory_of(chosen.memory_of, int(prompt), depth, chosen.rows_at_once)))
        return
    sides, cases = Contenders(), []
    for prompt, depth in CASES:
        if chosen.prompts is None or prompt in chosen.prompts:
            cases.append(one_case(sides, prompt, depth, chosen.runs, ["--threads", str(chosen.threads)]))
            print(json.dumps(cases[-1]), flush=True)
    sizes = {"rollouts": ROLLOUTS, "continuations": CONTINUATIONS, "rollout_tokens": LENGTH, "runs": chosen.runs}
    growing = growth(sides, GROWTH[0], chosen.growth, chosen.runs)
    write("packing", {"machine": machine(), "sizes": sizes, "cases": cases, "growth": growing}, chosen.out)
    columns = ("prompt", "fork_at", "unique_tokens", "row_tokens", "bound", "flop_bound")
    print(
        table(
            [
                {key: case[key] for key in columns}
                | {f"{name} s": shown(case[f"{name}_seconds"]) for name in ("packed", "rows")}
                | {"time / bound": case["time_over_bound"], "time / flop bound": case["time_over_flop_bound"]}
                | {f"MB {name}": round(mb) for name, mb in case["memory_mb"].items()}
                for case in cases
            ]
        )
    )
    print({key: growing[key] for key in ("r_squared", "exponent")})


if __name__ == "__main__":
    main()
