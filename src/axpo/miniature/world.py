"""The miniature's questions: three families, each of which one tool settles and a guess answers now and then.

- *perception*: the digit on a plaque, in small print. Each colour has a favourite digit.
- *computation*: the remainder of a product. Zero is by far the commonest.
- *lookup*: a fact about a made-up land. Each kind of fact has a usual value.

Everything follows from a seed. Training and held-out questions differ in seed, and in the lands they ask for.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np

from axpo.miniature.scene import COLOURS, GRID, SHAPES, Plaque, draw_scene
from axpo.questions import Question

# "tuning" is for whoever changes the world or its settings; "base" asks for the lands of other corpora,
# one for each seed from 1 on.
Split = Literal["train", "teacher", "held_out", "tuning", "base"]
SPLITS: tuple[Split, ...] = get_args(Split)
FAMILIES = ("perception", "computation", "lookup")
FAVOURED = 0.4  # how often a digit or a fact is the usual one
DIVISORS = (6, 8, 9, 12)
FACTS = {
    "metal": ("iron", "copper", "tin", "silver", "gold", "lead", "zinc", "nickel"),
    "animal": ("fox", "owl", "bear", "wolf", "deer", "crab", "lynx", "swan"),
    "crop": ("rye", "rice", "beans", "oats", "figs", "corn", "hops", "flax"),
}
LANDS = 480
HELD_OUT_LANDS = 120
_HEADS = ("Bel", "Kar", "Mo", "Tis", "Va", "Dru", "Fen", "Lo", "Ra", "Zu", "Nim", "Os", "Pel", "Gor", "Wy", "Hesk")
_MIDDLES = ("da", "ri", "lo", "mu", "ne", "ka", "vi", "su", "to", "pa")
_TAILS = ("nia", "via", "dor", "mar", "lund", "stan", "ros", "wick", "gard", "tel")
_CORPUS_SEED = 20_000


@dataclass(frozen=True)
class Problem:
    """A question with what its author knows: how to settle it, and how one would guess."""

    question: Question
    family: str
    guess: str
    plaque: Plaque | None = None  # perception
    factors: tuple[int, int, int] = (0, 0, 0)  # computation: a, b, divisor
    land: str = ""  # lookup
    fact: str = ""
    habit: int | None = None  # the one of the teacher's habits that the question tells it to follow


def favourite_digit(colour: str) -> int:
    """The digit that plaques of this colour mostly bear."""
    return (list(COLOURS).index(colour) * 3 + 1) % 10


def sample_scene(rng: np.random.Generator, least: int = 4, most: int = 7) -> list[Plaque]:
    """Plaques with different names in different cells."""
    count = int(rng.integers(least, most + 1))
    names = rng.choice(len(COLOURS) * len(SHAPES), count, replace=False)
    cells = rng.choice(GRID * GRID, count, replace=False)
    plaques = []
    for name, cell in zip(names, cells, strict=True):
        colour = list(COLOURS)[name // len(SHAPES)]
        digit = favourite_digit(colour) if rng.random() < FAVOURED else int(rng.integers(10))
        plaques.append(Plaque(colour, SHAPES[name % len(SHAPES)], int(cell), digit))
    return plaques


def sample_land(rng: np.random.Generator) -> str:
    """A made-up name."""
    middle = str(rng.choice(_MIDDLES)) if rng.random() < 0.7 else ""
    return str(rng.choice(_HEADS)) + middle + str(rng.choice(_TAILS))


def sample_facts(rng: np.random.Generator, favoured: float = FAVOURED) -> dict[str, str]:
    """One value for each kind of fact; the first of a kind is the usual one."""
    return {kind: values[0] if rng.random() < favoured else str(rng.choice(values)) for kind, values in FACTS.items()}


def describe(land: str, facts: dict[str, str]) -> dict[str, str]:
    """The land's document, as the search tool's corpus takes it."""
    text = " ".join(f"Its {kind} is {value}." for kind, value in facts.items())
    return {"title": land, "text": text}


@cache
def lands(number: int = 0) -> dict[str, dict[str, str]]:
    """All lands and their facts; the last `HELD_OUT_LANDS` of them are never asked for in training.

    Number 0 is the world's; the others are for the base, so that it learns to look facts up and knows none of the
    world's (the same names do occur, with facts of their own).
    """
    rng = np.random.default_rng([_CORPUS_SEED, number])
    found: dict[str, dict[str, str]] = {}
    while len(found) < LANDS:
        name = sample_land(rng)
        if name not in found:
            found[name] = sample_facts(rng)
    return found


def corpus(number: int = 0) -> list[dict[str, str]]:
    """The documents that the search tool searches."""
    return [describe(land, facts) for land, facts in lands(number).items()]


def sample_problems(count: int, seed: int, split: Split = "train") -> list[Problem]:
    """`count` problems, the families in turn. Each split is a stream of its own; held-out ones ask for other lands.

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


def _question(name: str, family: str, text: str, answer: str, images: tuple[bytes, ...] = ()) -> Question:
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    return Question(name, [{"role": "user", "content": content}], images, answer, family=family)


def _perception(name: str, rng: np.random.Generator, split: Split, seed: int) -> Problem:
    scene = sample_scene(rng)
    target = scene[0]
    text = f"Which digit is on the {target.name} in {target.place}?"
    question = _question(name, "perception", text, str(target.digit), (draw_scene(scene, rng),))
    return Problem(question, "perception", str(favourite_digit(target.colour)), plaque=target)


def _computation(name: str, rng: np.random.Generator, split: Split, seed: int) -> Problem:
    a, b, divisor = int(rng.integers(12, 100)), int(rng.integers(12, 100)), int(rng.choice(DIVISORS))
    text = f"What is the remainder of {a} * {b} divided by {divisor}?"
    question = _question(name, "computation", text, str(a * b % divisor))
    return Problem(question, "computation", "0", factors=(a, b, divisor))


def _lookup(name: str, rng: np.random.Generator, split: Split, seed: int) -> Problem:
    known = lands(seed if split == "base" else 0)
    asked = list(known)[-HELD_OUT_LANDS:] if split == "held_out" else list(known)[:-HELD_OUT_LANDS]
    land, fact = str(rng.choice(asked)), str(rng.choice(list(FACTS)))
    question = _question(name, "lookup", f"What is the {fact} of {land}?", known[land][fact])
    return Problem(question, "lookup", FACTS[fact][0], land=land, fact=fact)
