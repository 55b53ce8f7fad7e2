"""Supervised fine-tuning: the same trees, packing and forward, with likelihood as the loss."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from transformers import PreTrainedModel

from axpo.chat import END_THINK, THINK, Chat, ChatError
from axpo.config import Config
from axpo.minibatch import apply, minibatches
from axpo.optimizer import Optimizer
from axpo.packing import pack_logprobs
from axpo.parallel import ALONE, Ranks, computing
from axpo.policy import banned_tokens, start_fingerprint, update_forward
from axpo.questions import DataError, Trajectory
from axpo.sharding import shard
from axpo.tools.arguments import called_tool
from axpo.tree import Credit, Kind, RolloutTree, Segment, ToolUse


def trajectory_tree(trajectory: Trajectory, chat: Chat, tools: Sequence[dict[str, object]]) -> RolloutTree:
    """A tree of one branch, as if the policy had written the assistant's turns. Observations tell which tools they
    answer, by the names in the calls.

    Raises ChatError where a turn begins with the `<think>` that the prompt already ends with, never ends its thinking,
    or holds what a policy must not write, where the last one calls a tool, and where an image does not open.
    """
    question = trajectory.question
    tree = RolloutTree(question.id, *chat.prompt(question.messages, question.images, list(tools)))
    end = tree.root
    uses: list[ToolUse] = []
    for turn in trajectory.turns:
        if turn.role == "assistant":
            if chat.opens_thinking and turn.content.lstrip().startswith(THINK):
                raise ChatError(f"a turn begins with {THINK}, with which this model's prompt ends; leave it out")
            ids = chat.turn(turn.content)
            written = chat.parse(ids)
            if written.thinking_end is None:
                raise ChatError(f"a turn never ends its thinking; {END_THINK} must stand before calls and answer")
            uses = [ToolUse(called_tool(text) or "") for text in written.call_texts]
            end = tree.append(end, Kind.POLICY, ids, [0.0] * len(ids), calls=written.calls)
        else:
            observation, images = chat.observation([(turn.content, turn.images)])
            end = tree.append(end, Kind.OBSERVATION, observation, images=images, uses=uses)
    if uses:
        raise ChatError("the last turn calls a tool, which nothing answers")
    return tree


def check_calls(trees: Sequence[RolloutTree], offered: Sequence[str]) -> None:
    """Raise DataError where turns call tools that are not `offered`: training would teach what rollouts then refuse."""
    known = {"", *offered}  # a malformed call names none
    called = [(tree.question_id, {use.name for s in tree.segments() for use in s.uses}) for tree in trees]
    if wrong := [(question, unknown) for question, names in called if (unknown := names - known)]:
        counts = Counter(name for _, unknown in wrong for name in sorted(unknown))
        named = ", ".join(f"{name!r} ({count} trajectories)" for name, count in counts.most_common(5))
        raise DataError(
            f"tools.names: offers {', '.join(offered) or 'nothing'}, but turns of data.sft call {named}, first in "
            f"{wrong[0][0]}; they must call tools by the names that they have here"
        )


def check_lengths(trees: Sequence[RolloutTree], limit: int) -> None:
    """Raise DataError where trajectories have more than `limit` tokens: each is trained whole, and some step of many
    would find no memory for it."""
    lengths = [(sum(map(len, tree.segments())), tree.question_id) for tree in trees]
    if longer := [each for each in lengths if each[0] > limit]:
        length, name = max(longer)
        raise DataError(
            f"rollout.max_context: got {limit}, but {len(longer)} of {len(trees)} trajectories of data.sft are longer; "
            f"the longest, {name}, has {length} tokens. Leave them out, or set rollout.max_context to that"
        )


def imitate(tree: RolloutTree, leaves: Sequence[Segment]) -> RolloutTree:
    """Credit the policy tokens of these rollouts, so that packing trains them and nothing else; returns the tree."""
    for segment in tree.segments():
        segment.credits = ()
    for leaf in leaves:
        policy = [segment for segment in leaf.path() if segment.kind is Kind.POLICY]
        for segment in policy:
            segment.credits = (Credit(1.0, sum(map(len, policy))),)
    return tree


def sft_steps(
    config: Config, model: PreTrainedModel, chat: Chat, trees: Sequence[RolloutTree], ranks: Ranks = ALONE
) -> Iterator[dict[str, float | int]]:
    """Train on the credited tokens of the trees; yields the figures of each step as it is done.

    The loss is the mean negative log-likelihood over the tokens of a batch. Of several processes (`ranks`) each has all
    the trees, and learns from its share of every batch. Raises DataError where there are no trees, and ConfigError
    where the processes start from different weights.
    """
    if not trees:
        raise DataError("there is no trajectory to learn from")
    options, shared = config.sft, config.parallel.sharding == "full"
    start_fingerprint(model, ranks)
    if shared:
        with ranks.bound():
            shard(model)
    optimizer = Optimizer(
        model,
        options.learning_rate,
        options.warmup_steps,
        config.train.weight_decay,
        config.train.grad_clip,
        total_steps=options.steps,
        offload=config.parallel.offload,
    )
    banned = banned_tokens(chat, model)
    rng = np.random.default_rng(config.seed)
    order: list[int] = []
    for step in range(options.steps):
        while len(order) < options.batch:
            order += [int(i) for i in rng.permutation(len(trees))]
        batch, order = order[: options.batch], order[options.batch :]
        own = [trees[batch[place]] for place in ranks.share(options.batch)]
        [minibatch] = minibatches([own], chat, config.train.pack_tokens, ranks, shared)
        losses = []
        with computing(config, ranks):
            for pack in minibatch.packs:
                with update_forward(model, config.train.gradient_checkpointing, config.train.autocast):
                    loss = -pack_logprobs(model, pack, chat, banned).sum() / minibatch.tokens
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.take()
                losses.append(loss.item())
            norm = apply(minibatch, optimizer, model, ranks, shared)
        [total] = ranks.sum([sum(losses)])
        yield {"step": step + 1, "loss": total, "grad_norm": norm, "trained_tokens": minibatch.tokens}
