"""Fine-tuning on trajectories: the tokens that are trained, and that training raises their likelihood."""

from collections.abc import Callable

import pytest
import torch

from axpo.chat import Chat, ChatError
from axpo.config import load_config
from axpo.options_size import ParallelConfig
from axpo.packing import pack_logprobs, pack_trees
from axpo.policy import banned_tokens
from axpo.questions import DataError, Question, Trajectory, Turn
from axpo.sft import check_calls, check_lengths, imitate, sft_steps, trajectory_tree
from axpo.tree import Kind

QUESTION = Question("q", [{"role": "user", "content": "What is 2 + 3?"}], (), "5")
CALLING = 'I compute.\n</think>\n\n<tool_call>\n{"name": "python", "arguments": {"code": "2 + 3"}}\n</tool_call>'
ANSWERING = "It is 5.\n</think>\n\n<answer>5</answer>"
TRAJECTORY = Trajectory(QUESTION, (Turn("assistant", CALLING), Turn("tool", "5"), Turn("assistant", ANSWERING)))


def test_a_trajectory_is_the_tree_that_the_policy_would_have_grown(chat: Chat) -> None:
    tree = trajectory_tree(TRAJECTORY, chat, [])
    (leaf,) = tree.leaves()
    kinds = [s.kind for s in leaf.path()]
    assert kinds == [Kind.PROMPT, Kind.POLICY, Kind.OBSERVATION, Kind.POLICY]
    assert chat.parse(leaf.path()[1].ids.tolist()).call_texts[0].startswith('{"name": "python"')
    assert leaf.path()[3].ids.tolist() == chat.turn(ANSWERING)
    assert leaf.uses_tool


def test_a_turn_that_no_policy_may_write_is_refused(chat: Chat) -> None:
    with pytest.raises(ChatError, match="image_pad"):
        trajectory_tree(Trajectory(QUESTION, (Turn("assistant", "<|image_pad|>"),)), chat, [])


def test_a_turn_that_never_ends_its_thinking_is_refused(chat: Chat) -> None:
    with pytest.raises(ChatError, match="never ends its thinking; </think> must stand before calls and answer"):
        trajectory_tree(Trajectory(QUESTION, (Turn("assistant", "The answer is 5."),)), chat, [])


def test_a_call_that_nothing_answers_is_refused(chat: Chat) -> None:
    with pytest.raises(ChatError, match="the last turn calls a tool, which nothing answers"):
        trajectory_tree(Trajectory(QUESTION, (Turn("assistant", CALLING),)), chat, [])


def test_calls_that_only_the_turns_end_closes_count(chat: Chat) -> None:
    calling = Turn("assistant", '</think>\n\n<tool_call>\n{"name": "zoom", "arguments": {}}')
    tree = trajectory_tree(Trajectory(QUESTION, (calling, Turn("tool", "5"), Turn("assistant", ANSWERING))), chat, [])
    with pytest.raises(DataError, match=r"turns of data.sft call 'zoom'"):
        check_calls([tree], ["python"])
    check_calls([tree], ["zoom"])


def test_trajectories_that_are_too_long_are_counted_and_the_longest_is_named(chat: Chat) -> None:
    trees = []
    for number in range(4):
        turns = (Turn("assistant", f"{'Hm. ' * number}\n</think>\n\n<answer>5</answer>"),)
        trees.append(trajectory_tree(Trajectory(Question(f"q{number}", QUESTION.messages, (), "5"), turns), chat, []))
    lengths = [sum(map(len, tree.segments())) for tree in trees]
    check_lengths(trees, lengths[3])
    told = rf"rollout\.max_context: got {lengths[1]}, but 2 of 4 .* the longest, q3, has {lengths[3]} tokens"
    with pytest.raises(DataError, match=told):
        check_lengths(trees, lengths[1])


def test_only_the_policys_tokens_of_the_chosen_rollouts_are_trained(chat: Chat) -> None:
    tree = trajectory_tree(TRAJECTORY, chat, [])
    other = chat.turn("Hm.\n</think>\n\n6")
    tree.append(tree.root, Kind.POLICY, other, [0.0] * len(other))
    right = tree.leaves()[0]
    (pack,) = pack_trees([imitate(tree, [right])], chat, 1000)
    assert sorted(pack.targets.tolist()) == sorted(chat.turn(CALLING) + chat.turn(ANSWERING))


def test_training_raises_the_likelihood(chat: Chat, make_model: Callable) -> None:
    model = make_model()
    tree = trajectory_tree(TRAJECTORY, chat, [])
    trees = [imitate(tree, tree.leaves())]
    (pack,) = pack_trees(trees, chat, 1000)
    banned = banned_tokens(chat, model)

    def likelihood() -> float:
        with torch.no_grad():
            return pack_logprobs(model, pack, chat, banned).mean().item()

    before = likelihood()
    config = load_config(None, ["sft.steps=6", "sft.batch=2", "sft.learning_rate=0.003", "sft.warmup_steps=0"])
    figures = list(sft_steps(config, model, chat, trees))
    assert [f["step"] for f in figures] == [1, 2, 3, 4, 5, 6]
    assert figures[0]["loss"] == pytest.approx(-before, rel=1e-4)
    assert likelihood() > before + 1


def test_checkpointing_and_autocast_act_here_too(chat: Chat, make_model: Callable) -> None:
    tree = trajectory_tree(TRAJECTORY, chat, [])
    trees = [imitate(tree, tree.leaves())]

    def weights(*overrides: str) -> tuple[list[torch.Tensor], int]:
        model, calls = make_model(), []
        model.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        config = load_config(None, ["sft.steps=1", "sft.batch=1", "sft.warmup_steps=0", *overrides])
        list(sft_steps(config, model, chat, trees))
        return [p.detach() for p in model.parameters()], len(calls)

    plain, once = weights()
    checkpointed, twice = weights("train.gradient_checkpointing=true")
    rounded, _ = weights("train.autocast=true")
    assert (once, twice) == (1, 2)
    for one, other in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    assert any(not torch.equal(one, other) for one, other in zip(plain, rounded, strict=True))


def test_the_optimizer_may_lie_in_the_hosts_memory(
    chat: Chat, make_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = trajectory_tree(TRAJECTORY, chat, [])
    trees = [imitate(tree, tree.leaves())]
    config = load_config(None, ["sft.steps=3", "sft.batch=2", "sft.learning_rate=0.003", "sft.warmup_steps=0"])
    away = config.model_copy(update={"parallel": ParallelConfig(offload=True)})  # a config refuses it on the CPU
    one, other = make_model(), make_model()
    put: list[torch.Tensor] = []
    monkeypatch.setattr(
        "axpo.optimizer.in_host", lambda tensor, dtype: put.append(tensor) or tensor.detach().to(dtype, copy=True)
    )
    expected = list(sft_steps(config, one, chat, trees))
    assert not put
    assert list(sft_steps(away, other, chat, trees)) == expected
    # Float32 copies are made of what has come there, not on the device.
    assert all(one is parameter for one, parameter in zip(put, other.parameters(), strict=True))
    assert len(put) == len(list(other.parameters()))


def test_nothing_to_learn_from_is_an_error(chat: Chat, make_model: Callable) -> None:
    with pytest.raises(DataError, match="no trajectory"):
        next(sft_steps(load_config(None, []), make_model(), chat, []))
