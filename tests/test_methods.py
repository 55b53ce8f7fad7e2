import pytest
import torch

from axpo.methods import METHODS, method
from axpo.tree import CallSpan, Kind, Outcome, RolloutTree, StopReason


def test_a_method_is_found_by_its_name():
    assert {name: method(name).name for name in METHODS} == {"grpo": "grpo", "axpo": "axpo"}
    assert all(m.summary and "arXiv" in m.source for m in METHODS.values())


@pytest.mark.parametrize("name", ["ppo", "", "AXPO"])
def test_an_unknown_method_is_named_beside_the_known_ones(name: str):
    with pytest.raises(ValueError, match=f"unknown method '{name}': known are grpo, axpo"):
        method(name)


def failed_tool_group() -> RolloutTree:
    tree = RolloutTree("q", [1])
    for reward, calls in ((0.0, [CallSpan(1, 2, 4)]), (1.0, [])):
        rollout = tree.append(tree.root, Kind.POLICY, [2, 3, 4, 5], [-1.0] * 4, calls=calls)
        rollout.outcome = Outcome(StopReason.ANSWER, reward)
    return tree


def test_grpo_never_forks():
    grpo = method("grpo")
    tree = failed_tool_group()
    prefix = tree.fork(tree.root.children[0], 2)  # were it forked, GRPO would still see the two rollouts alone
    tree.append(prefix, Kind.POLICY, [6], [-1.0], resampled=True).outcome = Outcome(StopReason.ANSWER, 1.0)
    streams = grpo.credit(tree, "sample")
    assert grpo.candidates is None
    assert [(s.tokens, round(s.advantage, 3)) for s in streams] == [(4, -0.707), (4, 0.707)]


def test_axpo_forks_and_credits_the_recovered_prefix():
    axpo, tree = method("axpo"), failed_tool_group()
    assert axpo.candidates is not None
    (candidate,) = axpo.candidates(tree)
    prefix = tree.fork(candidate.segment, candidate.token_index)
    for reward in (1.0, 0.0):
        drawn = tree.append(prefix, Kind.POLICY, [6], [-1.0], resampled=True)
        drawn.outcome = Outcome(StopReason.ANSWER, reward)
    streams = axpo.credit(tree, "population")
    assert [(s.tokens, round(s.advantage, 3)) for s in streams] == [(2, 0.0), (1, 1.0), (1, -1.0), (4, 1.0)]


@pytest.mark.parametrize("name", list(METHODS))
def test_the_loss_of_a_method_takes_what_the_trainer_gives(name: str):
    old, advantages, weights = torch.tensor([-1.0]), torch.tensor([2.0]), torch.tensor([0.5])
    loss = method(name).loss(old, old, old, advantages, weights, clip_low=0.2, clip_high=0.4, kl=1e-3)
    assert loss.item() == pytest.approx(-1.0)
