"""Training by reinforcement: roll out, fork, credit, pack, step."""

import copy
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from axpo.agent import Agent
from axpo.config import Config
from axpo.credit import one_outcome
from axpo.diagnostics.gap import Figures, measure
from axpo.diagnostics.mismatch import Mismatch
from axpo.drawing import Drawing
from axpo.engines.base import Counters
from axpo.loss import importance_weights, kl_k3, policy_loss, token_weights
from axpo.methods import METHODS
from axpo.minibatch import Minibatch, apply, minibatches
from axpo.optimizer import Optimizer
from axpo.packing import Pack, PackInputs, forward_logprobs, pack_logprobs
from axpo.parallel import ALONE, Ranks, computing, in_order
from axpo.policy import (
    PolicyError,
    banned_tokens,
    restore_weights,
    same_weights,
    start_fingerprint,
    update_forward,
)
from axpo.questions import Question
from axpo.reference import Reference
from axpo.sharding import scatter, shard
from axpo.tree import RolloutTree

TRAINING = 0  # keeps its random numbers apart from those of evaluation


class Trainer:
    """Holds what lasts from step to step: the policy, its frozen reference, the optimizer.

    The agent's engine generates with `model` itself, or with weights that it takes from it. The reference is the policy
    as it is given (the SFT checkpoint).
    Over several processes (`ranks`) each has all of this, draws and learns from its share of a step's questions, and
    what it learns is added up.
    """

    def __init__(
        self,
        config: Config,
        agent: Agent,
        model: PreTrainedModel,
        questions: Sequence[Question],
        ranks: Ranks = ALONE,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.agent = agent
        self.questions = questions
        self.method = METHODS[config.method.name]
        self.kept = 0  # rollouts that an adaptive budget has left over
        self.done: int | None = 0  # the steps that made the weights; None while an update moves them
        self.model = model
        parallel, train = config.parallel, config.train
        self.shared = parallel.sharding == "full"
        self.reference = Reference(model, parallel.offload, self.shared) if config.method.kl > 0 else None
        self.start = start_fingerprint(model, ranks)
        self.banned = banned_tokens(agent.chat, self.model)
        if self.shared:
            shard(model)
        self.optimizer = Optimizer(
            model,
            train.learning_rate,
            train.warmup_steps,
            train.weight_decay,
            train.grad_clip,
            offload=parallel.offload,
        )
        with self.together():
            agent.engine.update_weights()

    async def step(self, number: int) -> tuple[list[RolloutTree], Figures]:
        """One training step (AXPO.md, section 3); `number` counts from 0.

        Returns the trees and the figures of all ranks; no trees but on rank 0.
        """
        started, before = time.perf_counter(), copy.copy(self.agent.engine.counters)
        drawing = await self.roll_out(number)
        self.agent.engine.sleep()
        rolled_out = time.perf_counter()
        for tree in drawing.drawn.values():
            self.method.credit(tree, self.config.method)
        self.ranks.meet()
        self.done = None
        with self.together():
            figures = self.update(drawing.drawn)
            self.kept, self.done = drawing.kept, number + 1
            self.agent.engine.update_weights()
        ended = time.perf_counter()
        trees = in_order(self.ranks.to_main(drawing.drawn))
        measured = self.ranks.of_main(measure(trees, self.config.method.threshold))
        counted = sum(self.ranks.all(self.agent.engine.counters - before), Counters())
        figures["prefix_hit_rate"] = counted.hit_rate
        seconds = {"rollout_seconds": rolled_out - started, "update_seconds": ended - rolled_out}
        return trees, {"step": number + 1, **measured, **figures, **seconds}

    async def roll_out(self, number: int) -> Drawing:
        """What a step draws: N rollouts of every question, and what the method makes of them."""
        spare = self.spare(number) if self.config.method.dynamic_sampling else []
        seed = (TRAINING, self.config.seed, number)
        size = self.config.group_size
        drawing = Drawing(self.agent, self.batch(number), size, seed, spare, self.kept, self.ranks)
        self.method.explore(drawing, self.config.method)
        await drawing.ended()
        return drawing

    def together(self) -> AbstractContextManager[None]:
        """Surrounds what uses the weights, for which ranks that share them need each other."""
        return computing(self.config, self.ranks)

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on besides the weights, for `restore`. Not while an update moves these.

        The question order and the seeds of rollouts follow from the step's number.
        """
        return {
            "steps": self.done,
            "kept": self.kept,
            "optimizer": self.optimizer.state(keep=self.ranks.main),
            "start": self.start,
            "random": self.ranks.all(random_state()),
        }

    def restore(self, state: Mapping[str, Any], checkpoint: Path) -> None:
        """Go on from what `state` returned, with the weights of then, which lie in a checkpoint.

        Raises PolicyError where the policy that this trainer was made with is not the one that training started from.
        """
        if not same_weights(state["start"], self.start):
            raise PolicyError("model: holds other weights than those that the run started from, which it still needs")
        self.agent.engine.sleep()
        scatter(self.model)
        restore_weights(self.model, checkpoint)
        with self.together():
            self.agent.engine.update_weights()
        self.done, self.kept = state["steps"], state["kept"]
        self.optimizer.restore(state["optimizer"])
        restore_random_state(state["random"][self.ranks.rank])

    def batch(self, number: int) -> list[Question]:
        """The questions of a step: each epoch goes through all of them once, in an order of its own."""
        size, total = self.config.rollout.questions, len(self.questions)
        places = range(number * size, (number + 1) * size)
        orders = {
            e: np.random.default_rng([self.config.seed, e]).permutation(total) for e in {p // total for p in places}
        }
        return [self.questions[orders[p // total][p % total]] for p in places]

    def spare(self, number: int) -> list[Question]:
        """Questions in place of those of the step whose groups teach nothing: any others, in an order of the step's."""
        taken = {question.id for question in self.batch(number)}
        order = np.random.default_rng([self.config.seed, TRAINING, number]).permutation(len(self.questions))
        return [self.questions[i] for i in order if self.questions[i].id not in taken]

    def update(self, trees: Mapping[int, RolloutTree]) -> Figures:
        """One optimizer step for each minibatch of the step's questions (eq. 5): of them these trees, by their places,
        are this process's.

        The mismatch of sampling and training is measured where the trainer's log-probs before the update are known
        without a forward of their own: of the first minibatch always, of the others where they are computed anew.
        """
        batches = self.minibatches(trees)
        # Of the first minibatch they are found with its own forward; the others' before any weight moves.
        known = [[self.old_logprobs(p, moved=index > 0) for p in batch.packs] for index, batch in enumerate(batches)]
        losses, divergences = [], []
        norms: list[float] = []
        mismatch = Mismatch()
        for batch, fixed in zip(batches, known, strict=True):
            if not batch.tokens:
                continue
            for pack, old in zip(batch.packs, fixed, strict=True):
                loss, divergence, logprobs = self.loss(pack, old, batch)
                loss.backward()  # type: ignore[no-untyped-call]
                self.optimizer.take()
                before = old if norms else logprobs  # an update has moved the weights, or none yet
                if before is not None and before is not pack.old_logprobs:
                    mismatch += Mismatch.of(pack.old_logprobs, before)
                losses.append(loss.item())
                divergences.append(divergence)
            norms.append(apply(batch, self.optimizer, self.model, self.ranks, self.shared))
        trained = sum(batch.tokens for batch in batches)
        packed = sum(len(pack.ids) for batch in batches for pack in batch.packs if len(pack.targets))
        loss_sum, divergence_sum, packed_sum = self.ranks.sum([sum(losses), sum(divergences), packed])
        return {
            "loss": loss_sum,
            "kl": divergence_sum / trained if trained else None,
            "grad_norm": max(norms, default=None),
            **sum(self.ranks.all(mismatch), Mismatch()).figures(),
            "trained_tokens": trained,
            "packed_tokens": int(packed_sum),
        }

    def minibatches(self, trees: Mapping[int, RolloutTree]) -> list[Minibatch]:
        """The step's trees in `train.minibatches` parts of equally many questions; the last one may have fewer."""
        if self.config.method.dynamic_sampling:
            taught = [tree for tree in trees.values() if not one_outcome(tree)]
            trees = dict(enumerate(taught))
        count = sum(self.ranks.all(len(trees)))
        size = max(1, -(-count // self.config.train.minibatches))
        parts = [
            [tree for place, tree in trees.items() if start <= place < start + size] for start in range(0, count, size)
        ]
        return minibatches(parts, self.agent.chat, self.config.train.pack_tokens, self.ranks, self.shared)

    def old_logprobs(self, pack: Pack, moved: bool) -> Tensor | None:
        """The log-probs (n,) of the policy that sampled: its own, or computed anew (`train.old_logprobs`).

        None where the policy has not `moved` before the pack is trained, so that the forward of the loss gives them.
        With `train.importance_cap` they are computed anew: the weights compare them with those of sampling.
        """
        train = self.config.train
        if train.old_logprobs == "auto" and self.config.sampling_is_exact and train.importance_cap is None:
            return pack.old_logprobs
        if not moved:
            return None
        known = ~pack.old_logprobs.isnan()  # what was not sampled after its path keeps the ratio 1
        logprobs = self.logprobs(pack)
        return torch.where(known.to(logprobs.device), logprobs, torch.nan)

    @torch.no_grad()
    def logprobs(self, pack: Pack) -> Tensor:
        """The policy's log-probs (n,) now."""
        with update_forward(self.model, autocast=self.config.train.autocast):
            return pack_logprobs(self.model, pack, self.agent.chat, self.banned, self.config.rollout.temperature)

    def loss(self, pack: Pack, old: Tensor | None, batch: Minibatch) -> tuple[Tensor, float, Tensor]:
        """The pack's share of the loss, the sum of its tokens' KL to the reference (0 without one), and its log-probs
        (n,)."""
        options, train, temperature = self.config.method, self.config.train, self.config.rollout.temperature
        inputs = PackInputs.of(pack, self.agent.chat, self.model.device)
        reference = None
        if self.reference is not None:
            with torch.no_grad(), self.reference.present() as model, update_forward(model, autocast=train.autocast):
                reference = forward_logprobs(model, inputs, self.banned, temperature)
        with update_forward(self.model, train.gradient_checkpointing, train.autocast):
            logprobs = forward_logprobs(self.model, inputs, self.banned, temperature)
        old, advantages = (logprobs.detach() if old is None else old.to(logprobs)), pack.advantages.to(logprobs)
        rollouts = batch.trees * self.config.group_size
        weights = token_weights(pack.stream_tokens.to(logprobs), rollouts, batch.tokens, options.aggregation)
        importance = None
        if train.importance_cap is not None:
            importance = importance_weights(old, pack.old_logprobs.to(logprobs), train.importance_cap)
        loss = policy_loss(
            logprobs,
            old,
            reference,
            advantages,
            weights,
            clip_low=options.clip_low,
            clip_high=options.clip_high,
            kl=options.kl,
            surrogate=self.method.loss,
            importance=importance,
        )
        divergence = 0.0 if reference is None else kl_k3(logprobs.detach(), reference).sum().item()
        return loss, divergence, logprobs.detach()


def random_state() -> dict[str, Any]:
    """The generators that are everybody's: a step needs none of them, but a tool of the user's may."""
    numpy_state = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Go on from what `random_state` returned. A machine with other GPUs keeps their generators as they are."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
