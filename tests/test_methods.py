from typing import Any, get_args

import pytest
import torch

from axpo.loss import policy_loss
from axpo.methods import COMMON, IGNORED_BY_OTHERS, METHODS, needs_entropy
from axpo.options import MethodConfig
from axpo.tree import CallSpan, Credit, Kind, Outcome, RolloutTree, Segment, StopReason


def test_every_option_of_a_method_is_taken_by_some_method():
    taken = {"name", *COMMON, *(option for method in METHODS.values() for option in method.options)}
    assert taken == set(MethodConfig.model_fields)
    assert set(IGNORED_BY_OTHERS) < taken


def test_the_config_knows_the_same_names():
    assert get_args(MethodConfig.model_fields["name"].annotation) == tuple(METHODS)


def test_each_says_what_it_is_and_where_it_comes_from():
    for name, method in METHODS.items():
        assert method.name == name
        assert method.summary
        assert "arXiv" in method.source


# One small group under every method, by hand. Four rollouts of one question:
#   0 calls a tool and fails; it is resampled twice, and the first continuation is right
#   1 calls a tool and fails
#   2 answers at once, right
#   3 answers at once, wrong
# So the rewards are (0, 0, 1, 0), of mean 1/4 and sample deviation 1/2; with 0 recovered (1, 0, 1, 0): 1/2, 0.577350.


def group(from_scratch: bool = False, forked: bool = True) -> tuple[RolloutTree, dict[str, Segment]]:
    """The tree, and its policy segments by name."""
    tree = RolloutTree("q", [1])
    named = {}
    for name, reward, calls in (("0", 0, True), ("1", 0, True), ("2", 1, False), ("3", 0, False)):
        spans = [CallSpan(1, 2, 4)] if calls else []
        named[name] = tree.append(tree.root, Kind.POLICY, [2, 3, 4, 5], [-1.0] * 4, calls=spans)
        named[name].outcome = Outcome(StopReason.ANSWER, float(reward))
    if forked:
        start = tree.root if from_scratch else tree.fork(named["0"], 2)
        for name, reward in (("a", 1), ("b", 0)):
            named[name] = tree.append(start, Kind.POLICY, [6, 7, 8], [-1.0] * 3, resampled=1)
            named[name].outcome = Outcome(StopReason.ANSWER, float(reward))
        if not from_scratch:
            named["failed"] = named["0"].children[0]
    return tree, named


PLAIN = {"1": -0.5, "2": 1.5, "3": -0.5}
CONTINUED = {"a": 0.707107, "b": -0.707107}  # (1, 0)
GOLDEN: list[tuple[dict[str, Any], dict[str, Any], dict[str, float]]] = [
    ({"name": "grpo"}, {"forked": False}, {"0": -0.5, **PLAIN}),
    (
        {"name": "grpo", "deviation": "population"},
        {"forked": False},
        {"0": -0.57735, "1": -0.57735, "2": 1.732051, "3": -0.57735},
    ),
    ({"name": "grpo", "deviation": "none"}, {"forked": False}, {"0": -0.25, "1": -0.25, "2": 0.75, "3": -0.25}),
    ({"name": "axpo"}, {}, {"0": 0.866025, **CONTINUED, **PLAIN}),
    ({"name": "axpo", "prefix_credit": False}, {}, {"0": -0.5, "failed": -0.5, **CONTINUED, **PLAIN}),
    # All of the tree: (0, 0, 1, 0, 1, 0), of mean 1/3 and deviation 0.516398; for the source (1, 0, 1, 0, 1, 0).
    (
        {"name": "axpo", "separate_groups": False},
        {},
        {"0": 0.912871, "a": 1.290994, "b": -0.645497, "1": -0.645497, "2": 1.290994, "3": -0.645497},
    ),
    ({"name": "axpo", "prefix_fix": False}, {"from_scratch": True}, {"0": -0.5, **CONTINUED, **PLAIN}),
    # (0.2, 0.2, 1, 0): mean 0.35, deviation 0.443471
    ({"name": "tool_bonus"}, {"forked": False}, {"0": -0.338241, "1": -0.338241, "2": 1.465711, "3": -0.78923}),
    # (-0.2, -0.2, 1, 0): mean 0.15, deviation 0.574456
    ({"name": "tool_penalty"}, {"forked": False}, {"0": -0.609272, "1": -0.609272, "2": 1.479661, "3": -0.261116}),
    ({"name": "tool_penalty", "tool_reward": 0.0}, {"forked": False}, {"0": -0.5, **PLAIN}),
    ({"name": "cispo"}, {"forked": False}, {"0": -0.5, **PLAIN}),
    ({"name": "arpo"}, {"forked": False}, {"0": -0.5, **PLAIN}),
    # Second attempts, whose rewards are compared with the first ones' mean of 1/4.
    ({"name": "rltf"}, {"from_scratch": True}, {"0": -0.5, "a": 0.75, "b": -0.25, **PLAIN}),
]


@pytest.mark.parametrize(("options", "shape", "expected"), GOLDEN, ids=[str(case[0]) for case in GOLDEN])
def test_what_each_method_teaches(options: dict[str, Any], shape: dict[str, Any], expected: dict[str, float]):
    tree, named = group(**shape)
    chosen = MethodConfig(**options)
    METHODS[chosen.name].credit(tree, chosen)
    taught = {name: [credit.advantage for credit in segment.credits] for name, segment in named.items()}
    assert taught == {name: [pytest.approx(expected[name], abs=1e-5)] if name in expected else [] for name in named}


def test_rollouts_of_arpo_learn_twice_what_they_share():
    tree = RolloutTree("q", [1])
    first = tree.append(tree.root, Kind.POLICY, [2, 3], [-1.0] * 2)
    seen = tree.append(first, Kind.OBSERVATION, [4])
    for tokens, reward in ((1, 1.0), (2, 0.0)):
        end = tree.append(seen, Kind.POLICY, [5] * tokens, [-1.0] * tokens)
        end.outcome = Outcome(StopReason.ANSWER, reward)
    METHODS["arpo"].credit(tree, MethodConfig(name="arpo"))
    right, wrong = pytest.approx(0.707107, abs=1e-5), pytest.approx(-0.707107, abs=1e-5)
    assert first.credits == (Credit(right, 3), Credit(wrong, 4))


def test_the_surrogate_of_cispo_is_a_weight():
    """ρ = e^0.5 = 1.6487 is cut to 1.4 and carries no gradient; the clipped surrogate's gradient is 0 there."""
    old, advantages, weights = torch.tensor([-1.5]), torch.tensor([2.0]), torch.tensor([1.0])
    gradients = {}
    for kind in ("clipped", "cispo"):
        logprobs = torch.tensor([-1.0], requires_grad=True)
        loss = policy_loss(logprobs, old, None, advantages, weights, surrogate=kind)  # type: ignore[arg-type]
        loss.backward()
        assert logprobs.grad is not None
        gradients[kind] = (round(loss.item(), 5), round(logprobs.grad.item(), 5))
    assert gradients == {"clipped": (-2.8, 0.0), "cispo": (2.8, -2.8)}


def test_a_token_that_nobody_sampled_has_the_ratio_one():
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    old = torch.tensor([float("nan"), -1.0])
    policy_loss(logprobs, old, None, torch.tensor([2.0, 2.0]), torch.tensor([0.5, 0.5])).backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-1.0, -1.0]


def test_a_method_has_defaults_of_its_own_and_keeps_what_is_given():
    assert MethodConfig(name="cispo").kl == 0
    assert MethodConfig(name="cispo", kl=0.5).kl == 0.5
    assert MethodConfig(name="grpo").kl == 1e-3
    assert MethodConfig.model_validate("cispo") == MethodConfig(name="cispo")


def test_only_some_need_to_know_how_uncertain_a_token_was():
    needing = [
        options
        for options in ({"name": "arpo"}, {"rank": "entropy"}, {"name": "rltf"}, {})
        if needs_entropy(MethodConfig(**options))
    ]
    assert needing == [{"name": "arpo"}, {"rank": "entropy"}]
