"""A training step end to end: real engine, real tools, and a policy that calls them."""

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from axpo import build
from axpo.chat import Chat
from axpo.config import load_config
from axpo.credit import credit_axpo, credit_grpo
from axpo.diagnostics.mismatch import Mismatch
from axpo.engines.base import Generation, Request
from axpo.fork import Allocation, Candidate, allocate
from axpo.miniature.scene import draw_scene
from axpo.miniature.tools import zoom_call
from axpo.miniature.world import sample_scene
from axpo.minibatch import Minibatch
from axpo.packing import Pack, PackInputs, pack_logprobs, pack_trees
from axpo.policy import banned_tokens
from axpo.questions import Question, Trajectory, Turn
from axpo.rewards.verify import Verdict
from axpo.sft import imitate, sft_steps, trajectory_tree
from axpo.trainer import Trainer
from axpo.tree import Kind, RolloutTree

Maker = Callable[..., tuple[Trainer, PreTrainedModel, Chat]]

OPTIONS = [
    "tools.names=[zoom]",
    "tools.zoom_pixels=16384",
    "rollout.questions=2",
    "rollout.rollouts=4",
    "rollout.max_tokens=72",
    "rollout.max_context=1500",
    "method.budget=1",
    "method.continuations=2",
    "train.learning_rate=1e-4",
    "train.pack_tokens=2000",
    "threads=1",
]


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    """The answer is one that the policy cannot give, so all its calls fail."""
    found = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng)
        content = [{"type": "image"}, {"type": "text", "text": f"Which digit is on the {scene[0].name}?"}]
        images = (draw_scene(scene, rng),)
        found.append(Question(f"q{seed}", [{"role": "user", "content": content}], images, "nothing"))
    return found


@pytest.fixture(scope="module")
def caller(questions: list[Question], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The base, taught in a few steps to zoom into these questions' images and then to answer."""
    config = load_config(
        None, [*OPTIONS, "sft.steps=25", "sft.batch=4", "sft.learning_rate=0.002", "sft.warmup_steps=2"]
    )
    chat, model = build.load_chat(config), build.load_model(config)
    toolbox = build.load_toolbox(config, chat)
    calling = "I zoom in.\n</think>\n\n" + zoom_call((0, 0, 500, 500), "it")
    turns = (Turn("assistant", calling), Turn("assistant", "It is 1.\n</think>\n\n<answer>1</answer>"))
    trees = []
    for question in questions:
        shown = Turn("tool", "", question.images)
        tree = trajectory_tree(Trajectory(question, (turns[0], shown, turns[1])), chat, toolbox.schemas)
        trees.append(imitate(tree, tree.leaves()))
    for _ in sft_steps(config, model, chat, trees):
        pass
    folder = tmp_path_factory.mktemp("caller")
    model.save_pretrained(folder)
    chat.save(folder)
    return str(folder)


@pytest.fixture
def make_trainer(caller: str, questions: list[Question]) -> Maker:
    def make(*overrides: str) -> tuple[Trainer, PreTrainedModel, Chat]:
        config = load_config(None, [*OPTIONS, f"model={caller}", *overrides])
        chat, model = build.load_chat(config), build.load_model(config)
        toolbox = build.load_toolbox(config, chat)
        agent = build.training_agent(config, build.make_engine(config, model, chat), chat, toolbox)
        return Trainer(config, agent, model, questions), model, chat

    return make


def policy_logprobs_of(trees: Sequence[RolloutTree]) -> list[float]:
    """The engine's log-probs of the credited tokens, in the order in which the trees are laid out."""
    return [float(p) for t in trees for s in t.segments() if s.credits and s.logprobs is not None for p in s.logprobs]


def praise(trees: Sequence[RolloutTree]) -> None:
    """Give all that is credited the same advantage, so that there is something to learn."""
    for segment in (segment for tree in trees for segment in tree.segments()):
        if segment.credits:
            segment.credits = tuple(replace(c, advantage=1.0) for c in segment.credits)


def test_sampling_logprobs_equal_a_fresh_forward_over_the_packed_tree(make_trainer: Maker) -> None:
    trainer, model, chat = make_trainer()

    trees = asyncio.run(trainer.roll_out(0)).trees
    segments = [s for tree in trees for s in tree.segments()]
    assert any(s.images for s in segments if s.kind is Kind.OBSERVATION)  # tool images
    assert any(s.is_forked for s in segments)
    banned = banned_tokens(chat, model)
    for tree in trees:
        credit_axpo(tree)
        (pack,) = pack_trees([tree], chat, 10_000)
        with torch.no_grad():
            fresh = pack_logprobs(model, pack, chat, banned)
        torch.testing.assert_close(pack.old_logprobs.float(), fresh, atol=1e-4, rtol=0)
        assert pack.old_logprobs.tolist() == policy_logprobs_of([tree])


def test_what_the_trees_share_is_prefilled_once(make_trainer: Maker) -> None:
    """Prompts, observations with images, and what follows a fork: no token is prefilled twice, but that each request
    feeds the last of its own again."""
    trainer, _, _ = make_trainer()
    asked = 0
    engine = trainer.agent.engine
    generate = engine.generate

    async def counting(request: Request) -> Generation:
        nonlocal asked
        asked += 1
        return await generate(request)

    engine.generate = counting  # type: ignore[method-assign]

    trees = asyncio.run(trainer.roll_out(0)).trees
    segments = [segment for tree in trees for segment in tree.segments()]
    assert any(s.is_forked for s in segments)
    given = sum(len(segment) for segment in segments if segment.kind is not Kind.POLICY)
    prefilled = engine.counters.prefilled_tokens  # type: ignore[attr-defined]
    assert prefilled <= given + asked
    assert prefilled <= 1.02 * sum(map(len, segments))


def rolled_out(trainer: Trainer) -> tuple[list[RolloutTree], list[tuple[int, ...]]]:
    """The trees of the first step, and the shapes of all forwards that made them."""
    shapes: list[tuple[int, ...]] = []
    hook = trainer.model.model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    trees = asyncio.run(trainer.roll_out(0)).trees
    hook.remove()
    return trees, shapes


def written(trees: Sequence[RolloutTree]) -> list[list[object]]:
    return [[(s.kind, s.resampled, s.ids.tolist()) for s in tree.segments()] for tree in trees]


def test_resampling_begins_beside_the_rollouts_and_is_repeated_exactly(make_trainer: Maker) -> None:
    """Scoring takes as long as it likes; groups end one after another, as there are few places."""
    runs = []
    for seed in range(3):
        trainer, *_ = make_trainer("engine.max_batch=3", "engine.overlap=2", "rollout.temperature=1.3")
        naps, keys = random.Random(seed), list[int]()
        score, generate = trainer.agent.score, trainer.agent.engine.generate

        def slowly(text: str, question: Question, naps: random.Random = naps, score: Any = score) -> Verdict:
            time.sleep(naps.choice([0, 0, 0.01, 0.1]))
            return score(text, question)

        async def noting(request: Request, keys: list[int] = keys, generate: Any = generate) -> Generation:
            keys.append(request.rollout.index)
            return await generate(request)

        trainer.agent.engine.generate = noting  # type: ignore[method-assign]
        trainer.agent = replace(trainer.agent, score=slowly)
        trees, shapes = rolled_out(trainer)
        logprobs = [s.logprobs.tolist() for tree in trees for s in tree.segments() if s.logprobs is not None]
        runs.append((written(trees), logprobs, shapes))
        begun = [place for place, key in enumerate(keys) if key >= 4]
        assert begun
        assert any(key < 4 for key in keys[begun[0] :])  # a rollout asks for its next turn after that
    assert runs[0] == runs[1] == runs[2]


def test_resampling_beside_the_rollouts_resamples_what_it_would_after_them(make_trainer: Maker) -> None:
    class Sequential(Allocation):
        """Picks nothing before every group has ended."""

        def __init__(self, trees: int, budget: int, most: int) -> None:
            self.waiting, self.budget = dict[int, Any](), budget
            self.trees = trees

        def ended(self, tree: int, ranked: Sequence[Candidate]) -> list[tuple[int, int, Candidate]]:
            self.waiting[tree] = ranked
            if len(self.waiting) < self.trees:
                return []
            picks, taken = [], [0] * self.trees
            for index, candidate in allocate([self.waiting[place] for place in range(self.trees)], self.budget):
                picks.append((index, taken[index], candidate))
                taken[index] += 1
            return picks

    runs = []
    for kind in (Allocation, Sequential):
        trainer, *_ = make_trainer("engine.max_batch=3", "engine.overlap=2", "rollout.temperature=1.3")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("axpo.explore.Allocation", kind)
            runs.append(written(rolled_out(trainer)[0]))
    assert runs[0] == runs[1]
    assert any(resampled for tree in runs[0] for _, resampled, _ in tree)  # type: ignore[misc]


def test_a_step_forks_within_its_budget_and_learns(make_trainer: Maker) -> None:
    trainer, model, _ = make_trainer("rollout.temperature=1.2")
    before = {name: p.clone() for name, p in model.named_parameters()}
    trees, figures = asyncio.run(trainer.step(0))
    assert figures["forked"] == 4  # floor(1 · 2 · 4 / 2)
    assert figures["rollouts"] == 2 * 4 + 4 * 2
    assert figures["all_wrong_tool"] == 1.0
    assert figures["trained_tokens"] == len(policy_logprobs_of(trees))
    assert all(leaf.outcome is not None for tree in trees for leaf in tree.leaves())
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == []  # every reward was 0 and the reference is the policy itself: nothing to learn yet


def test_a_reward_moves_the_policy_towards_what_earned_it(make_trainer: Maker) -> None:
    trainer, _, chat = make_trainer(
        "model=miniature", "method.name=grpo", "train.warmup_steps=0", "method.kl=0", "rollout.max_tokens=12"
    )
    trees, _ = asyncio.run(trainer.step(0))
    tree = trees[0]
    right = tree.base_leaves()[0]
    for leaf in tree.leaves():
        assert leaf.outcome is not None
        leaf.outcome = replace(leaf.outcome, reward=float(leaf is right))
    credit_grpo(tree)

    def likelihood() -> tuple[float, float]:
        (pack,) = pack_trees([tree], chat, 10_000)
        with torch.no_grad():
            logprobs = trainer.logprobs(pack)
        positive = pack.advantages > 0
        return logprobs[positive].mean().item(), logprobs[~positive].mean().item()

    good, bad = likelihood()
    trainer.update({0: tree, 1: trees[1]})
    better, worse = likelihood()
    assert better > good
    assert worse < bad


def test_the_same_seed_gives_the_same_figures(make_trainer: Maker) -> None:
    def figures(*overrides: str) -> list[str]:
        trainer, *_ = make_trainer(*overrides)

        async def steps() -> list[str]:
            lines = []
            for number in range(2):
                _, found = await trainer.step(number)
                lines.append(json.dumps({k: v for k, v in found.items() if not k.endswith("seconds")}))
            return lines

        return asyncio.run(steps())

    first = figures("rollout.temperature=1.5")  # hot enough that rollouts differ
    assert first == figures("rollout.temperature=1.5")
    assert first != figures("rollout.temperature=1.5", "seed=1")


def test_minibatches_take_a_step_each(make_trainer: Maker) -> None:
    trainer, *_ = make_trainer("train.minibatches=2")
    asyncio.run(trainer.step(0))
    assert trainer.optimizer.steps == 2


def test_every_epoch_asks_every_question_once(make_trainer: Maker) -> None:
    trainer, *_ = make_trainer()
    epochs = [[q.id for number in (2 * e, 2 * e + 1) for q in trainer.batch(number)] for e in range(4)]
    assert all(sorted(epoch) == ["q0", "q1", "q2", "q3"] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("override", ["rollout.top_k=2", "train.autocast=true", "train.old_logprobs=recompute"])
def test_old_logprobs_that_are_not_exact_are_recomputed(make_trainer: Maker, override: str) -> None:
    trainer, *_ = make_trainer(override, "method.kl=0", "method.name=grpo")
    trees, _ = asyncio.run(trainer.step(0))
    (pack, *_) = pack_trees(trees, trainer.agent.chat, 100_000)
    old = trainer.old_logprobs(pack, moved=True)
    assert old is not None
    assert torch.equal(old, trainer.logprobs(pack))
    exact = override == "train.old_logprobs=recompute"
    assert torch.allclose(old, pack.old_logprobs.float(), atol=1e-5, rtol=0) is exact
    # Where no weight has moved, the loss takes the policy's own: the same loss from one forward less.
    assert trainer.old_logprobs(pack, moved=False) is None
    loss, *_ = trainer.loss(pack, None, Minibatch([pack], 1, 1, images=False))
    assert loss.item() == trainer.loss(pack, old, Minibatch([pack], 1, 1, images=False))[0].item()


def test_old_logprobs_of_sampling_are_taken_where_they_are_exact(make_trainer: Maker) -> None:
    trainer, *_ = make_trainer("method.name=grpo")
    trees, _ = asyncio.run(trainer.step(0))
    (pack, *_) = pack_trees(trees, trainer.agent.chat, 100_000)
    assert trainer.old_logprobs(pack, moved=True) is pack.old_logprobs


def test_what_nobody_sampled_keeps_the_ratio_one_where_others_are_recomputed(make_trainer: Maker) -> None:
    trainer, *_ = make_trainer("method=rltf", "train.old_logprobs=recompute")
    trees, _ = asyncio.run(trainer.step(0))
    praise(trees)
    (pack, *_) = pack_trees(trees, trainer.agent.chat, 100_000)
    unknown = pack.old_logprobs.isnan()
    assert unknown.any()
    old = trainer.old_logprobs(pack, moved=True)
    assert old is not None
    assert torch.equal(old.isnan(), unknown)
    assert torch.equal(old[~unknown], trainer.logprobs(pack)[~unknown])


def test_minibatches_compare_with_the_policy_from_before_the_first(
    make_trainer: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, *_ = make_trainer("train.minibatches=2", "train.old_logprobs=recompute", "train.warmup_steps=0")
    trees, _ = asyncio.run(trainer.step(0))
    praise(trees)
    expected = [trainer.logprobs(p) for tree in trees for p in pack_trees([tree], trainer.agent.chat, 100_000)]
    given: list[torch.Tensor | None] = []
    loss = trainer.loss

    def seen(pack: Pack, old: torch.Tensor | None, *rest: int) -> tuple[torch.Tensor, float, torch.Tensor]:
        given.append(old)
        return loss(pack, old, *rest)

    monkeypatch.setattr(trainer, "loss", seen)
    trainer.update(dict(enumerate(trees)))
    assert given[0] is None
    assert given[1] is not None
    assert torch.equal(given[1], expected[1])


def shift_sampling(trees: Sequence[RolloutTree], by: float) -> None:
    """Let the engine have told other log-probs: alternately more and less by so much."""
    for segment in (segment for tree in trees for segment in tree.segments()):
        if segment.logprobs is not None:
            signs = np.where(np.arange(len(segment)) % 2, -1, 1)
            segment.logprobs = (segment.logprobs + by * signs).astype(np.float32)


def test_the_engine_samples_what_the_trainer_computes(make_trainer: Maker) -> None:
    trainer, *_ = make_trainer()
    _, figures = asyncio.run(trainer.step(0))
    assert 0 < figures["mismatch_mean"] < figures["mismatch_max"] < 1e-4
    assert 0 <= figures["mismatch_kl"] < 1e-8


@pytest.mark.parametrize(
    ("override", "counted"),
    [("train.old_logprobs=auto", 1), ("train.old_logprobs=recompute", 2), ("train.importance_cap=2", 2)],
)
def test_mismatch_counts_what_is_known_without_a_forward_of_its_own(
    make_trainer: Maker, monkeypatch: pytest.MonkeyPatch, override: str, counted: int
) -> None:
    """Weights that have moved are never measured: a learning rate that ruins them shows nowhere."""
    trainer, *_ = make_trainer(
        "method=grpo", "method.kl=0", "train.minibatches=2", "train.warmup_steps=0", "train.learning_rate=1", override
    )
    trees = asyncio.run(trainer.roll_out(0)).trees
    for tree in trees:
        credit_grpo(tree)
    praise(trees)
    shift_sampling(trees, 0.25)
    seen: list[int] = []
    forwards: list[int] = []
    of = Mismatch.of

    def measured(sampling: torch.Tensor, training: torch.Tensor) -> Mismatch:
        seen.append(len(sampling))
        return of(sampling, training)

    monkeypatch.setattr(Mismatch, "of", measured)
    trainer.model.model.language_model.register_forward_pre_hook(lambda *_: forwards.append(1))
    figures = trainer.update(dict(enumerate(trees)))
    tokens = [sum(len(s) for s in tree.segments() if s.credits) for tree in trees]
    assert seen == tokens[:counted]
    assert len(forwards) == 1 + counted  # the losses', and where they are computed anew that of the second's
    assert figures["mismatch_mean"] == pytest.approx(0.25, abs=1e-4)
    assert figures["mismatch_max"] == pytest.approx(0.25, abs=1e-3)


def test_importance_weights_are_those_of_the_noise_in_the_sampling_logprobs(make_trainer: Maker) -> None:
    """Half of the tokens were told e^0.5 too likely, half too unlikely: they weigh e^−0.5, and e^0.5 cut to 1.2. At
    ratio 1 and advantage 1 the loss is minus the mean of the weights."""
    trainer, *_ = make_trainer("method=grpo", "method.kl=0", "method.aggregation=token-mean")
    trees = asyncio.run(trainer.roll_out(0)).trees
    for tree in trees:
        credit_grpo(tree)
    praise(trees)
    shift_sampling(trees, 0.5)
    (pack,) = pack_trees(trees, trainer.agent.chat, 100_000)
    n = len(pack.targets)
    for cap, high in ((None, 1.0), (1.2, 1.2), (9.0, np.exp(0.5))):
        train = trainer.config.train.model_copy(update={"importance_cap": cap})
        trainer.config = trainer.config.model_copy(update={"train": train})
        assert (trainer.old_logprobs(pack, moved=False) is None) is (cap is not None)
        loss, _, logprobs = trainer.loss(pack, None, Minibatch([pack], 1, n, images=False))
        more = (pack.old_logprobs > logprobs).sum().item()
        low = 1.0 if cap is None else np.exp(-0.5)
        assert 0 < more < n
        assert loss.item() == pytest.approx(-(more * low + (n - more) * high) / n, rel=1e-4)


def test_a_step_with_checkpointing_is_the_same_step(make_trainer: Maker) -> None:
    def weights(*overrides: str) -> tuple[list[torch.Tensor], int]:
        trainer, model, _ = make_trainer("train.warmup_steps=0", "method.name=grpo", *overrides)
        trees, _ = asyncio.run(trainer.step(0))
        praise(trees)
        calls: list[int] = []
        for layer in model.model.language_model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        trainer.update(dict(enumerate(trees)))
        return [p.detach() for p in model.parameters()], len(calls)

    plain, once = weights()
    checkpointed, twice = weights("train.gradient_checkpointing=true")
    assert twice == 2 * once
    for one, other in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    rounded, _ = weights("train.autocast=true")
    assert any(not torch.equal(one, other) for one, other in zip(plain, rounded, strict=True))


def test_the_reference_is_computed_from_the_same_inputs(make_trainer: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, *_ = make_trainer()
    trees, _ = asyncio.run(trainer.step(0))
    made: list[Pack] = []
    of = PackInputs.of

    def counting(pack: Pack, *rest: Any) -> PackInputs:
        made.append(pack)
        return of(pack, *rest)

    monkeypatch.setattr(PackInputs, "of", counting)
    (pack, *_) = pack_trees(trees, trainer.agent.chat, 100_000)
    _, divergence, _ = trainer.loss(pack, pack.old_logprobs, Minibatch([pack], 1, 1, images=False))
    assert divergence == 0.0  # the reference is the policy itself: the same numbers to the last bit
    assert len(made) == 1


def test_grpo_never_forks(make_trainer: Maker) -> None:
    trainer, *_ = make_trainer("method.name=grpo")
    trees, figures = asyncio.run(trainer.step(0))
    assert figures["forked"] == 0
    assert len(trees[0].leaves()) == 4


def test_a_broken_gradient_is_dropped(make_trainer: Maker) -> None:
    trainer, *_ = make_trainer()
    parameter = trainer.optimizer.parameters[0]
    before = parameter.clone()
    parameter.grad = torch.full_like(parameter, float("nan"))
    assert np.isnan(trainer.optimizer.step())
    assert torch.equal(parameter, before)
    assert parameter.grad is None


def test_groups_of_one_outcome_are_left_out_of_the_update(make_trainer: Maker) -> None:
    """All calls fail, so every group is replaced as long as that is allowed, and nothing is learned."""
    trainer, model, _ = make_trainer("method=grpo", "method.dynamic_sampling=1", "train.warmup_steps=0")
    before = [p.detach().clone() for p in model.parameters()]
    trees, figures = asyncio.run(trainer.step(0))
    assert len(trees) == 3
    assert len({tree.question_id for tree in trees}) == 3
    assert figures["trained_tokens"] == 0
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=grpo", "method.dynamic_sampling=2"],
        ["method=axpo", "method.adaptive_budget=1"],
        ["method=axpo", "method.prefix_fix=false"],
        ["method=cispo"],
        ["method=arpo"],
        ["method=arpo", "method.arpo_rule=code"],
        ["method=rltf"],
    ],
    ids=" ".join,
)
def test_every_method_repeats_itself_however_long_scoring_takes(make_trainer: Maker, overrides: list[str]) -> None:
    """Rewards differ by what was written; few places, so that groups end one after another."""
    runs = []
    for seed in range(2):
        trainer, *_ = make_trainer("engine.max_batch=3", "engine.overlap=2", "rollout.temperature=1.3", *overrides)
        naps = random.Random(seed)

        def slowly(text: str, question: Question, naps: random.Random = naps) -> Verdict:
            time.sleep(naps.choice([0, 0, 0.01, 0.1]))
            return Verdict(float(len(text) % 2), True, "length", text)

        trainer.agent = replace(trainer.agent, score=slowly)
        trees, figures = asyncio.run(trainer.step(0))
        runs.append((written(trees), {k: v for k, v in figures.items() if not k.endswith("seconds")}))
        assert np.isfinite(figures["loss"])
        assert figures["rollouts"] >= 8
    assert runs[0] == runs[1]


def test_twice_the_rollouts(make_trainer: Maker) -> None:
    trainer, *_ = make_trainer("method=grpo", "method.num_rollouts=2x")
    trees, _ = asyncio.run(trainer.step(0))
    assert [len(tree.base_leaves()) for tree in trees] == [8, 8]


def test_an_adaptive_budget_is_kept_from_step_to_step(make_trainer: Maker) -> None:
    trainer, *_ = make_trainer("method.budget=0.125", "method.adaptive_budget=1")
    _, figures = asyncio.run(trainer.step(0))
    assert figures["forked"] == 0  # one rollout is too few for a prefix of two
    assert trainer.kept == 1
    _, figures = asyncio.run(trainer.step(1))
    assert figures["forked"] == 1
