"""The miniature's questions: three families, each of which one tool settles and a guess answers now and then.

- *perception*: the digit on a plaque, in small print.
- *computation*: a remainder, of a product or of a sum.
- *lookup*: a fact about a made-up land, or about its capital.

Every family has two kinds of question, which different calls settle. The answers are skewed, one value being usual and
a second one common, so that guessing tempts. Everything follows from a seed. Held-out questions are about
other places, numbers and lands than those of training; far ones about smaller plaques, longer numbers and longer
names. Questions for a tool that training never offers are in `unseen.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np

from axpo.miniature.scene import COLOURS, GRID, SHAPES, Plaque, draw_scene
from axpo.questions import Question

# "tuning" is for whoever changes the world or its settings; "far" is out of distribution; "base" asks for the lands of
# other corpora, one for each seed from 1 on.
Split = Literal["train", "teacher", "held_out", "tuning", "base", "far"]
SPLITS: tuple[Split, ...] = get_args(Split)
FAMILIES = ("perception", "computation", "lookup")
USUAL = (0.5, 0.3)  # how often the answer is the usual one, and the next common one
GUESSED = (0.6, 0.4)  # how often a guess is the one, and the other
DIVISORS = (6, 7, 8, 9)
FACTS = {
    "metal": ("iron", "copper", "tin", "silver", "gold", "lead", "zinc", "nickel"),
    "animal": ("fox", "owl", "bear", "wolf", "deer", "crab", "lynx", "swan"),
    "crop": ("rye", "rice", "beans", "oats", "figs", "corn", "hops", "flax"),
}
LANDS = 400
HELD_OUT_LANDS = 100  # of these
FAR_LANDS = 50
HELD_OUT_CELLS = (2, 4, 8, 13)  # of plaques that lie in one
HELD_OUT_BETWEEN = (1, 6, 12)  # of plaques that lie half in the next
HEADS = (
    *("Bel", "Kar", "Mot", "Tis", "Vas", "Dru", "Fen", "Lom", "Ras", "Zud", "Nim", "Osk", "Pel", "Gor", "Wyt", "Hesk"),
    *(
        "Ald",
        "Bry",
        "Cul",
        "Dax",
        "Erl",
        "Fyr",
        "Gam",
        "Hul",
        "Ith",
        "Jor",
        "Keld",
        "Lurn",
        "Mask",
        "Nok",
        "Ord",
        "Pim",
    ),
)
TAILS = (
    *("nia", "via", "dor", "mar", "lund", "stan", "ros", "wick", "gard", "tel", "bury", "holm", "ford", "mere", "cot"),
    *("dale", "fell", "gate", "hurst", "lea", "moor", "ness", "thorp", "wold"),
)
EVEN = 100
_CORPUS_SEED = 20_000


@dataclass(frozen=True)
class Problem:
    """A question with what its author knows: how to settle it, and how one would guess."""

    question: Question
    family: str
    kind: int  # 0 or 1: which of the first two calls of its family settles it
    guesses: tuple[str, str]
    scene: tuple[Plaque, ...] = ()  # perception: the plaque in question, then the others
    numbers: tuple[int, int, int] = (0, 0, 0)  # computation: a, b, divisor
    land: str = ""  # lookup
    fact: str = ""
    habit: int | None = None  # the one of the teacher's habits that the question tells it to follow


def sample_value(rng: np.random.Generator, values: Sequence[str], usual: int) -> str:
    """One of the values: mostly the one with the index `usual`, then the next, else any of the others."""
    drawn = rng.random()
    if drawn < sum(USUAL):
        return values[(usual + (drawn >= USUAL[0])) % len(values)]
    return values[(usual + 2 + int(rng.integers(len(values) - 2))) % len(values)]


def common_values(values: Sequence[str], usual: int) -> tuple[str, str]:
    """The usual value and the next common one."""
    return values[usual % len(values)], values[(usual + 1) % len(values)]


DIGITS = tuple(map(str, range(10)))


def usual_digit(colour: str) -> int:
    """The digit that plaques of this colour mostly bear."""
    return (list(COLOURS).index(colour) * 3 + 1) % 10


def sample_scene(
    rng: np.random.Generator,
    least: int = 4,
    most: int = 6,
    at: tuple[int, bool] | None = None,
    scale: float = 1.0,
) -> list[Plaque]:
    """Plaques with different names in different cells, about half of them between two.

    `at` says which cell the first one lies in, and whether half in the next.
    """
    names = rng.choice(len(COLOURS) * len(SHAPES), int(rng.integers(least, most + 1)), replace=False)
    taken: set[int] = set()
    plaques: list[Plaque] = []
    for name in names:
        colour, shape = list(COLOURS)[name // len(SHAPES)], SHAPES[name % len(SHAPES)]
        digit = int(sample_value(rng, DIGITS, usual_digit(colour)))
        cell, between = at if at and not plaques else _free_place(rng, taken)
        plaques.append(Plaque(colour, shape, cell, digit, between, scale))
        taken |= plaques[-1].cells
    return plaques


def _free_place(rng: np.random.Generator, taken: set[int]) -> tuple[int, bool]:
    for between in (True, False) if rng.random() < 0.5 else (False,):
        if free := [cell for cell in places(between) if not taken & Plaque("", "", cell, 0, between).cells]:
            return int(rng.choice(free)), between
    raise ValueError("no cell is free")


def places(between: bool) -> list[int]:
    """The cells that a plaque may lie in, or half in."""
    return [cell for cell in range(GRID * GRID) if not between or cell % GRID < GRID - 1]


def sample_land(rng: np.random.Generator, tails: int = 1) -> str:
    """A made-up name."""
    return "-".join((str(rng.choice(HEADS)), *map(str, rng.choice(TAILS, tails, replace=False))))


def usual_fact(capital: bool) -> int:
    """The index of the usual value of a fact: lands and their capitals differ."""
    return 4 * capital


def sample_facts(rng: np.random.Generator, capital: bool) -> dict[str, str]:
    """One value for each kind of fact."""
    return {kind: sample_value(rng, values, usual_fact(capital)) for kind, values in FACTS.items()}


def sample_even_facts(rng: np.random.Generator) -> dict[str, str]:
    """The same where no value is usual, so that whoever wants to know has to read."""
    return {kind: str(rng.choice(values)) for kind, values in FACTS.items()}


def capital_of(land: str) -> str:
    """What the documents call it."""
    return f"{land} capital"


def describe(name: str, facts: dict[str, str]) -> dict[str, str]:
    """The document of a land or a capital, as the search tool's corpus takes it."""
    text = " ".join(f"Its {kind} is {value}." for kind, value in facts.items())
    return {"title": name, "text": text}


@cache
def lands(number: int = 0) -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """All lands: the facts of each and those of its capital.

    Of the first `LANDS`, training never asks for the last `HELD_OUT_LANDS`; `FAR_LANDS` with longer names follow.

    Number 0 is the world's; the others are for the base, so that it learns to look facts up and knows none of the
    world's (the same names do occur, with facts of their own). From number EVEN on, no value is usual.
    """
    rng = np.random.default_rng([_CORPUS_SEED, number])
    found: dict[str, tuple[dict[str, str], dict[str, str]]] = {}
    while len(found) < LANDS + FAR_LANDS:
        name = sample_land(rng, 1 if len(found) < LANDS else 2)
        if name not in found and number < EVEN:
            found[name] = sample_facts(rng, capital=False), sample_facts(rng, capital=True)
        elif name not in found:
            found[name] = sample_even_facts(rng), sample_even_facts(rng)
    return found


def corpus(number: int = 0) -> list[dict[str, str]]:
    """The documents that the search tool searches."""
    documents = []
    for land, (own, capital) in lands(number).items():
        documents += [describe(land, own), describe(capital_of(land), capital)]
    return documents


def sample_problems(count: int, seed: int, split: Split = "train") -> list[Problem]:
    """`count` problems, the families in turn, of either kind. Each split is a stream of its own.

    Raises ValueError for seed 0 of the split "base": number 0 is the world's corpus.
    """
    if split == "base" and seed == 0:
        raise ValueError("the split base has seeds from 1 on")
    makers = {"perception": _perception, "computation": _computation, "lookup": _lookup}
    problems = []
    for index in range(count):
        family = FAMILIES[index % len(FAMILIES)]
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        problems.append(makers[family](f"{split}-{seed}-{index}", rng, split, seed))
    return problems


def make_question(name: str, family: str, text: str, answer: str, images: tuple[bytes, ...] = ()) -> Question:
    """A question of one message, its images first."""
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    return Question(name, [{"role": "user", "content": content}], images, answer, family=family)


def _perception(name: str, rng: np.random.Generator, split: Split, seed: int) -> Problem:
    kind = int(rng.integers(2))
    held_out = (HELD_OUT_CELLS, HELD_OUT_BETWEEN)[kind]
    # The base has seen plaques everywhere; what training never asks for is left for the held-out questions.
    cells = [c for c in places(kind == 1) if split == "base" or (c in held_out) == (split in ("held_out", "far"))]
    scene = sample_scene(rng, at=(int(rng.choice(cells)), kind == 1), scale=0.7 if split == "far" else 1.0)
    target = scene[0]
    text = f"Which digit is on the {target.name} in {target.place}?"
    question = make_question(name, "perception", text, str(target.digit), (draw_scene(scene, rng),))
    return Problem(question, "perception", kind, common_values(DIGITS, usual_digit(target.colour)), tuple(scene))


def _computation(name: str, rng: np.random.Generator, split: Split, seed: int) -> Problem:
    kind, divisor = int(rng.integers(2)), int(rng.choice(DIVISORS))
    remainders = DIGITS[:divisor]
    usual = divisor + 2 * kind  # of which the remainder counts
    wanted = int(sample_value(rng, remainders, usual))
    while True:
        a, b = map(int, rng.integers(100, 1000, 2) if split == "far" else rng.integers(12, 100, 2))
        held_out = (a + b) % 5 == 0
        fits = split in ("base", "far") or held_out == (split == "held_out")
        if fits and (a + b if kind else a * b) % divisor == wanted:
            break
    text = f"What is the remainder of {a} {'+' if kind else '*'} {b} divided by {divisor}?"
    question = make_question(name, "computation", text, str(wanted))
    return Problem(question, "computation", kind, common_values(remainders, usual), numbers=(a, b, divisor))


def _lookup(name: str, rng: np.random.Generator, split: Split, seed: int) -> Problem:
    known = lands(seed if split == "base" else 0)
    names = list(known)
    asked = {"far": names[LANDS:], "held_out": names[LANDS - HELD_OUT_LANDS : LANDS]}
    kind = int(rng.integers(2))
    land, fact = str(rng.choice(asked.get(split, names[: LANDS - HELD_OUT_LANDS]))), str(rng.choice(list(FACTS)))
    text = f'What is the {fact} of {"the capital of " if kind else ""}"{land}"?'
    question = make_question(name, "lookup", text, known[land][kind][fact])
    guesses = common_values(FACTS[fact], usual_fact(capital=bool(kind)))
    return Problem(question, "lookup", kind, guesses, land=land, fact=fact)
