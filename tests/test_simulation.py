"""The bandit: its rollouts are trees, its credit and forks the methods' own, its gradient that of the loss."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from axpo.cli_simulate import VARIANTS
from axpo.explore import ranked
from axpo.loss import policy_loss, token_weights
from axpo.methods import METHODS
from axpo.options import MethodConfig
from axpo.simulation import (
    ACT,
    CELLS,
    RIGHT,
    THINK,
    TOOL_USE,
    WRONG,
    Bandit,
    Credit,
    Draws,
    Setting,
    Unforked,
    simulate,
)
from axpo.tree import RolloutTree

SEEDS = ((5, 0), (5, 1))


def setting(method: str | dict[str, Any] = "axpo", **given: Any) -> Setting:
    options = VARIANTS[method] if isinstance(method, str) else method
    return Setting(MethodConfig(**options), **{"seeds": SEEDS, **given})


def drawn(target: int, *rollouts: tuple[int, int]) -> Draws:
    """One question of one run, with the given tokens."""
    ids = np.array(rollouts)[None, None]
    likelihood = np.array([1 / CELLS] * CELLS + [TOOL_USE, 1 - TOOL_USE, 0.3, 0.7])
    right = (ids[..., 1] == target) | (ids[..., 1] == RIGHT)
    return Draws(np.array([[target]]), likelihood[None, None], ids, right)


def test_at_first_three_of_ten_rollouts_act_and_a_fifth_of_their_calls_is_right():
    bandit = Bandit(setting(questions=400))
    assert bandit.tool_use() == pytest.approx([TOOL_USE] * 2)
    likely = math.exp(4.5) / (4 * math.exp(4.5) + 60)
    assert bandit.accuracy_tool() == pytest.approx([likely] * 2)
    draws = bandit.draw()
    acts = draws.ids[..., 0] == ACT
    assert acts.mean() == pytest.approx(TOOL_USE, abs=0.03)
    assert draws.right[acts].mean() == pytest.approx(likely, abs=0.03)
    assert draws.right[~acts].mean() == pytest.approx(0.3, abs=0.03)
    assert (draws.ids[~acts][:, 0] == THINK).all()
    assert set(draws.ids[~acts][:, 1]) == {RIGHT, WRONG}
    coarse = draws.ids[..., 1] // 4 == draws.targets[..., None] // 4
    assert coarse[acts].mean() == pytest.approx(4 * likely, abs=0.03)


def test_a_grpo_step_by_hand():
    """Rewards 1 and 0: advantages ±1/√2. The decision of each rollout weighs a half, over B·N = 2."""
    bandit = Bandit(setting("grpo", questions=1, rollouts=2, seeds=((0,),)))
    draws = drawn(7, (ACT, 7), (THINK, WRONG))
    logit, rows = bandit.gradient(draws, bandit.tokens(draws, {}))
    weight = 1 / math.sqrt(2) / 2 / 2
    assert logit == pytest.approx([weight * (1 - TOOL_USE) - weight * (0 - TOOL_USE)], rel=1e-5)
    expected = np.full(CELLS, -weight / CELLS)
    expected[7] += weight
    assert rows[0, 0] == pytest.approx(expected, rel=1e-5)


def test_an_axpo_step_by_hand():
    """AXPO.md's worked values: no rollout right, one of four continuations is: the prefix +1.5, they +1.5 and -0.5."""
    options = {"name": "axpo", "budget": 1.0}
    for seed in range(50):
        bandit = Bandit(setting(options, questions=1, rollouts=4, seeds=((seed,),)))
        draws = drawn(7, (THINK, WRONG), (ACT, 3), (THINK, WRONG), (THINK, WRONG))
        draws.cells[:] = 0
        draws.cells[0, 0, [7, 9]] = 0.25, 0.75
        draws.cells[0, 0, 3] = 1e-9
        forked = bandit.resample(draws)
        (tree,) = forked.values()
        (prefix,) = [segment for segment in tree.segments() if any(child.resampled for child in segment.children)]
        named = [int(leaf.ids[0]) for leaf in tree.continuations(prefix)]
        assert len(named) == 4
        if named.count(7) == 1:
            break
    assert prefix.ids.tolist() == [ACT]
    assert prefix.children[0].ids.tolist() == [3]
    tokens = bandit.tokens(draws, forked)
    found = sorted((int(i), round(w * 4, 4)) for i, w in zip(tokens.id, tokens.weight, strict=True) if w)
    assert found == [(7, 1.5), (9, -0.5), (9, -0.5), (9, -0.5), (ACT, 1.5)]


@pytest.mark.parametrize("variant", ["grpo_2x", *(name for name, o in VARIANTS.items() if o["name"] == "axpo")])
def test_the_gradient_is_that_of_the_loss(variant: str):
    """Of the whole step's trees, each token's log-prob taken from the parameters by torch."""
    bandit = Bandit(setting(variant, questions=8, rollouts=4, p_think=0.2))
    bandit.weights += np.random.default_rng(0).normal(size=bandit.weights.shape)
    options = bandit.setting.options
    draws = bandit.draw()
    forked = bandit.resample(draws) if bandit.setting.budget else {}
    assert bool(forked) == (options.name == "axpo")
    logit, rows = bandit.gradient(draws, bandit.tokens(draws, forked))
    matrix = np.zeros_like(bandit.weights)
    np.add.at(matrix, (np.arange(2)[:, None], draws.targets), rows)

    theta = torch.tensor(bandit.logit, requires_grad=True)
    weights = torch.tensor(bandit.weights, requires_grad=True)
    logprobs, advantages, lengths = [], [], []
    for run, question in np.ndindex(draws.targets.shape):
        tree = forked.get((run, question)) or bandit.tree(draws, (run, question))
        METHODS[options.name].credit(tree, options)
        decision = torch.nn.functional.logsigmoid(torch.stack([theta[run], -theta[run]]))
        answer = torch.zeros(2, dtype=torch.float64)  # nothing learns it
        cells = weights[run, draws.targets[run, question]].log_softmax(0)
        table = torch.cat([cells, decision, answer])
        for segment in tree.segments():
            for credit in segment.credits:
                for token in segment.ids.tolist():
                    logprobs.append(table[token])
                    advantages.append(credit.advantage)
                    lengths.append(float(credit.stream_tokens))
    now = torch.stack(logprobs)
    each = token_weights(torch.tensor(lengths, dtype=torch.float64), 8 * bandit.setting.size, len(logprobs))
    advantage = torch.tensor(advantages, dtype=torch.float64)
    (-policy_loss(now, now.detach(), None, advantage, each, kl=0.0)).backward()
    assert theta.grad is not None
    assert weights.grad is not None
    np.testing.assert_allclose(logit, theta.grad, atol=1e-12)
    np.testing.assert_allclose(matrix, weights.grad, atol=1e-12)
    assert np.abs(matrix).max() > 1e-3


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6), st.sampled_from(sorted(VARIANTS)))
def test_a_group_that_is_not_forked_is_credited_and_ranked_as_its_own_tree(kinds: list[int], variant: str):
    bandit = Bandit(setting(variant, rollouts=len(kinds), questions=1, seeds=((0,),)))
    draws = drawn(5, *((ACT, 5 if k % 2 else 6) if k >= 2 else (THINK, RIGHT if k % 2 else WRONG) for k in kinds))
    options = bandit.setting.options
    tree = bandit.tree(draws, (0, 0))
    unforked = Unforked(Credit(options), options, len(kinds))
    assert bool(unforked.triggered(np.array(kinds))) == bool(ranked(tree, options))
    METHODS[options.name].credit(tree, options)
    expected = [leaf.credits[0].advantage / 2 for leaf in tree.leaves()]
    assert unforked.weights(np.array(kinds)) == pytest.approx(expected, abs=1e-12)
    assert unforked.weights(np.array(kinds[::-1])) == pytest.approx(expected[::-1], abs=1e-12)


def test_the_trees_of_a_step_keep_the_budget_and_what_the_policy_gave():
    bandit = Bandit(setting(questions=16, rollouts=8, p_think=0.1))
    draws = bandit.draw()
    forked = bandit.resample(draws)
    assert bandit.setting.budget == 8
    for run in (0, 1):
        trees = [tree for (r, _), tree in forked.items() if r == run]
        assert sum(len(tree.leaves()) - len(tree.base_leaves()) for tree in trees) == 8 * 4
    (run, question), tree = next(iter(forked.items()))
    assert [row.ids.tolist()[1:] for row in tree.rows() if row.ids[1] == ACT]
    for leaf in tree.leaves():
        path = leaf.path()
        ids = np.concatenate([segment.ids for segment in path[1:]])
        logprobs = np.concatenate([segment.logprobs for segment in path[1:]])
        q = TOOL_USE if ids[0] == ACT else 1 - TOOL_USE
        p = draws.cells[run, question, ids[1]] if ids[0] == ACT else (0.1 if ids[1] == RIGHT else 0.9)
        assert np.exp(logprobs) == pytest.approx([q, p], rel=1e-5)
        assert leaf.outcome is not None
        assert leaf.outcome.reward == float(ids[1] in (draws.targets[run, question], RIGHT))


def test_from_scratch_the_continuations_begin_at_the_root():
    bandit = Bandit(setting("prefix_fix=false", questions=16, p_think=0.1))
    tree: RolloutTree = next(iter(bandit.resample(bandit.draw()).values()))
    again = [segment for segment in tree.root.children if segment.resampled]
    assert [len(segment) for segment in again] == [2] * len(again)
    assert len(again) in (4, 8, 12)
    METHODS["axpo"].credit(tree, bandit.setting.options)
    assert all(len(leaf.credits) == 1 and leaf.credits[0].stream_tokens == 2 for leaf in tree.leaves())


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("axpo", "grpo")])
def test_every_variant_changes_the_numbers(variant: str):
    short = {"steps": 12, "questions": 16, "p_think": 0.2}
    plain = "axpo" if VARIANTS[variant]["name"] == "axpo" else "grpo"
    assert (simulate(setting(variant, **short)).tool_use != simulate(setting(plain, **short)).tool_use).any()


def test_a_seed_decides_its_run_whatever_runs_beside_it():
    together = simulate(setting(steps=20))
    for run, seed in enumerate(SEEDS):
        alone = simulate(setting(steps=20, seeds=(seed,)))
        assert (alone.tool_use[0] == together.tool_use[run]).all()
        assert (alone.accuracy[0] == together.accuracy[run]).all()
    assert (together.tool_use[0] != together.tool_use[1]).any()


def test_the_curves_are_probabilities_at_the_steps_that_they_name():
    curves = simulate(setting(steps=200, p_think=0.4))
    assert (curves.steps[0], curves.steps[-1], len(curves.steps)) == (0, 200, 81)
    assert curves.tool_use.shape == curves.accuracy.shape == (2, 81)
    mixed = curves.tool_use * curves.accuracy_tool + (1 - curves.tool_use) * 0.4
    assert curves.accuracy == pytest.approx(mixed)
    assert simulate(setting(steps=3)).steps.tolist() == [0, 1, 2, 3]


def test_grpo_stops_acting_where_axpo_learns_to():
    seeds = tuple((9, number) for number in range(4))
    grpo, axpo = (simulate(setting(name, seeds=seeds)) for name in ("grpo", "axpo"))
    assert grpo.tool_use[:, -1].mean() < 0.1
    assert axpo.tool_use[:, -1].mean() > 0.6
    assert axpo.accuracy[:, -1].mean() > grpo.accuracy[:, -1].mean() + 0.3
