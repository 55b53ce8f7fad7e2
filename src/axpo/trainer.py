"""Training by reinforcement: roll out, fork, credit, pack, step."""

import copy
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from axpo.agent import Agent
from axpo.config import Config
from axpo.credit import one_outcome
from axpo.diagnostics.gap import Figures, measure
from axpo.drawing import Drawing
from axpo.loss import kl_k3, policy_loss, token_weights
from axpo.methods import METHODS
from axpo.optimizer import Optimizer
from axpo.packing import Pack, PackInputs, forward_logprobs, pack_logprobs, pack_trees
from axpo.policy import PolicyError, banned_tokens, update_forward
from axpo.questions import Question
from axpo.tree import RolloutTree

TRAINING = 0  # keeps its random numbers apart from those of evaluation


class Trainer:
    """Holds what lasts from step to step: the policy, its frozen reference, the optimizer.

    The agent's engine generates with `model` itself, or with weights that it takes from it. The
    reference is the policy as it is given (the SFT checkpoint).
    """

    def __init__(self, config: Config, agent: Agent, model: PreTrainedModel, questions: Sequence[Question]) -> None:
        self.config = config
        self.agent = agent
        self.questions = questions
        self.method = METHODS[config.method.name]
        self.kept = 0  # rollouts that an adaptive budget has left over
        self.done: int | None = 0  # the steps that made the weights; None while an update moves them
        self.model = model
        self.reference = copy.deepcopy(self.model).requires_grad_(False) if config.method.kl > 0 else None
        # Enough to tell weights apart: the sum of each parameter of the policy that training starts from.
        self.start = torch.stack([p.detach().sum(dtype=torch.float64) for p in model.parameters()]).cpu()
        self.banned = banned_tokens(agent.chat, self.model)
        train = config.train
        self.optimizer = Optimizer(
            self.model, train.learning_rate, train.warmup_steps, train.weight_decay, train.grad_clip
        )

    async def step(self, number: int) -> tuple[list[RolloutTree], Figures]:
        """One training step (AXPO.md, section 3); `number` counts from 0. Returns its trees and its figures."""
        started, before = time.perf_counter(), copy.copy(self.agent.engine.counters)
        drawing = await self.roll_out(number)
        trees = drawing.trees
        self.agent.engine.sleep()
        rolled_out = time.perf_counter()
        for tree in trees:
            self.method.credit(tree, self.config.method)
        self.done = None
        figures = self.update(trees)
        self.kept, self.done = drawing.kept, number + 1
        self.agent.engine.update_weights()
        ended = time.perf_counter()
        figures["prefix_hit_rate"] = self.agent.engine.counters.hit_rate(before)
        seconds = {"rollout_seconds": rolled_out - started, "update_seconds": ended - rolled_out}
        return trees, {"step": number + 1, **measure(trees, self.config.method.threshold), **figures, **seconds}

    async def roll_out(self, number: int) -> Drawing:
        """What a step draws: N rollouts of every question, and what the method makes of them."""
        spare = self.spare(number) if self.config.method.dynamic_sampling else []
        seed = (TRAINING, self.config.seed, number)
        drawing = Drawing(self.agent, self.batch(number), self.config.group_size, seed, spare, self.kept)
        self.method.explore(drawing, self.config.method)
        await drawing.ended()
        return drawing

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on besides the weights, for `restore`. Not while an update moves these.

        The question order and the seeds of rollouts follow from the step's number.
        """
        return {
            "steps": self.done,
            "kept": self.kept,
            "optimizer": self.optimizer.state(),
            "start": self.start,
            "random": random_state(),
        }

    def restore(self, state: Mapping[str, Any], weights: PreTrainedModel) -> None:
        """Go on from what `state` returned, with the weights of then.

        Raises PolicyError where the policy that this trainer was made with is not the one that training started from.
        """
        if state["start"].shape != self.start.shape or not torch.allclose(state["start"], self.start, rtol=1e-6):
            raise PolicyError("model: holds other weights than those that the run started from, which it still needs")
        self.model.load_state_dict(weights.state_dict())
        self.done, self.kept = state["steps"], state["kept"]
        self.optimizer.restore(state["optimizer"])
        restore_random_state(state["random"])

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

    def update(self, trees: Sequence[RolloutTree]) -> Figures:
        """One optimizer step for each minibatch of questions (eq. 5)."""
        if self.config.method.dynamic_sampling:
            trees = [tree for tree in trees if not one_outcome(tree)]
        size = -(-len(trees) // self.config.train.minibatches)
        parts = [trees[start : start + size] for start in range(0, len(trees), max(1, size))]
        packs = [pack_trees(part, self.agent.chat, self.config.train.pack_tokens) for part in parts]
        # Of the first minibatch they are found with its own forward; the others' before any weight moves.
        known = [[self.old_logprobs(pack, moved=index > 0) for pack in part] for index, part in enumerate(packs)]
        losses, norms, divergences = [], [], []
        for questions, part, fixed in zip(parts, packs, known, strict=True):
            if not part:
                continue
            rollouts = len(questions) * self.config.group_size
            total = sum(len(pack.targets) for pack in part)
            for pack, old in zip(part, fixed, strict=True):
                loss, divergence = self.loss(pack, old, rollouts, total)
                loss.backward()  # type: ignore[no-untyped-call]
                losses.append(loss.item())
                divergences.append((divergence, len(pack.targets)))
            norms.append(self.optimizer.step())
        trained = sum(count for _, count in divergences)
        return {
            "loss": sum(losses),
            "kl": sum(kl * count for kl, count in divergences) / trained if trained else None,
            "grad_norm": max(norms, default=None),
            "trained_tokens": trained,
            "packed_tokens": sum(len(pack.ids) for part in packs for pack in part),
        }

    def old_logprobs(self, pack: Pack, moved: bool) -> Tensor | None:
        """The log-probs (n,) of the policy that sampled: its own, or computed anew (`train.old_logprobs`).

        None where the policy has not `moved` before the pack is trained, so that the forward of the loss gives them.
        """
        if self.config.train.old_logprobs == "auto" and self.config.sampling_is_exact:
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

    def loss(self, pack: Pack, old: Tensor | None, rollouts: int, total_tokens: int) -> tuple[Tensor, float]:
        """The pack's share of the loss, and its mean KL to the reference (0 without one)."""
        options, train, temperature = self.config.method, self.config.train, self.config.rollout.temperature
        inputs = PackInputs.of(pack, self.agent.chat, self.model.device)
        reference = None
        if self.reference is not None:
            with torch.no_grad(), update_forward(self.reference, autocast=train.autocast):
                reference = forward_logprobs(self.reference, inputs, self.banned, temperature)
        with update_forward(self.model, train.gradient_checkpointing, train.autocast):
            logprobs = forward_logprobs(self.model, inputs, self.banned, temperature)
        old, advantages = (logprobs.detach() if old is None else old.to(logprobs)), pack.advantages.to(logprobs)
        weights = token_weights(pack.stream_tokens.to(logprobs), rollouts, total_tokens, options.aggregation)
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
        )
        divergence = 0.0 if reference is None else kl_k3(logprobs.detach(), reference).mean().item()
        return loss, divergence


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
