"""Training while one request in five to the provider of search fails: what is lost, and what stays as it was."""

import asyncio
import itertools
from typing import Any

import numpy as np
import pytest

from axpo import build
from axpo.config import load_config
from axpo.miniature.teacher import tell
from axpo.miniature.world import sample_problems
from axpo.tools.base import SystemFault, Toolbox
from axpo.tools.providers import Hit, Provider, endpoint
from axpo.tools.search import make_search
from axpo.tools.web import Limits
from axpo.trainer import Trainer
from axpo.tree import SYSTEM_FAULT, RolloutTree, Segment

FAULTS = ["hang", "drip", "429", "500", "503", "garbage", "truncated", "drop"]
STEPS = 2
OPTIONS = [
    "rollout={questions: 8, rollouts: 6, max_tokens: 96, max_context: 900}",
    "method.continuations=2",
    "train={steps: 2, learning_rate: 1e-4, pack_tokens: 8000}",
    "max_pixels=16384",
    "threads=1",
]


class Counting:
    """A provider that counts the searches which another one fails."""

    def __init__(self, provider: Provider) -> None:
        self.provider, self.longest, self.failed = provider, provider.longest, 0

    async def search(self, query: str, count: int) -> list[Hit]:
        try:
            return await self.provider.search(query, count)
        except SystemFault:
            self.failed += 1
            raise


def train(search_server: Any) -> tuple[list[list[RolloutTree]], list[dict[str, Any]], int]:
    """The trees and figures of each step, and how many searches failed."""
    faults = itertools.cycle(FAULTS)
    planned = [next(faults) if number % 5 == 0 else "" for number in range(5000)]
    search_server.faults = list(planned)
    search_server.answer = [{"title": "Velm", "text": "Its metal is iron."}]
    config = load_config(None, OPTIONS)
    # One attempt, and no breaker: what fails is lost, so that there is enough to see.
    limits = Limits(timeout=4, attempts=1, failures=None)
    provider = Counting(endpoint(f"{search_server.url}/any?q={{query}}", limits=limits))
    toolbox = Toolbox([make_search(provider)])
    chat, model = build.load_chat(config), build.load_model(config)
    agent = build.training_agent(config, build.make_engine(config, model, chat), chat, toolbox)
    rng = np.random.default_rng(0)  # the base searches where it is told to
    problems = [tell(p, rng) for p in sample_problems(60, 3, "tuning") if p.family == "lookup"]
    trainer = Trainer(config, agent, model, [problem.question for problem in problems])

    async def steps() -> list[tuple[list[RolloutTree], dict[str, Any]]]:
        return [await trainer.step(number) for number in range(STEPS)]

    done = asyncio.run(steps())
    injected = sum(fault != "" for fault in planned[: len(search_server.requests)])
    assert provider.failed >= injected  # equal queries at one time share a request
    return [trees for trees, _ in done], [figures for _, figures in done], provider.failed


def uses(trees: list[RolloutTree]) -> list[Any]:
    segments = [segment for tree in trees for segment in tree.segments()]
    return [use for s in segments for use in (*s.uses, *(s.outcome.uses if s.outcome else ()))]


def is_void(leaf: Segment) -> bool:
    return leaf.outcome is not None and leaf.outcome.void


def test_training_survives_a_provider_that_fails_for_one_request_in_five(search_server: Any) -> None:
    steps, figures, failed = train(search_server)
    everything = [tree for trees in steps for tree in trees]
    faults = [use.fault for use in uses(everything)]
    assert len(steps) == STEPS
    assert failed >= 3  # or the rest would prove little

    # Every call that the provider failed is one system fault and one void rollout, and the figures say so.
    assert faults.count(SYSTEM_FAULT) == failed
    voids = [leaf for tree in everything for leaf in tree.leaves() if is_void(leaf)]
    assert len(voids) == failed
    assert sum(f["void"] for f in figures) == failed
    assert sum(f.get("errors_search_system", 0) for f in figures) == failed

    # What the policy did wrong is counted apart: this base often writes broken calls.
    wrong = [fault for fault in faults if fault not in (None, SYSTEM_FAULT)]
    assert wrong
    assert sum(f["tool_errors"] for f in figures) == failed + len(wrong)
    assert sum(f["tool_calls"] for f in figures) == len(faults)

    # Nothing of it enters an advantage.
    for tree in everything:
        group = [leaf for leaf in tree.base_leaves() if not is_void(leaf)]
        rewards = np.array([leaf.outcome.reward for leaf in group if leaf.outcome], dtype=float)
        spread = rewards.std(ddof=1) if len(rewards) > 1 else 0.0
        for leaf in (leaf for leaf in tree.leaves() if is_void(leaf)):
            assert leaf.outcome is not None
            assert leaf.outcome.reward is None
            assert leaf.credits == ()
        for leaf, reward in zip(group, rewards, strict=True):
            if not any(segment.is_forked for segment in leaf.path()):  # AXPO credits those by their continuations
                expected = 0.0 if spread == 0 else (reward - rewards.mean()) / spread
                assert sum(credit.advantage for credit in leaf.credits) == pytest.approx(expected, abs=1e-5)
    assert all(np.isfinite(f["loss"]) for f in figures)
