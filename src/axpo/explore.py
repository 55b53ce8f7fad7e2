"""What each method draws: the N rollouts of every question, and what it makes of them.

An explorer begins the rollouts of a step; what follows them it begins as groups end.
"""

from functools import partial

import numpy as np

from axpo.credit import one_outcome
from axpo.drawing import Drawing
from axpo.fork import Allocation, Candidate, Claim, allocate, branch_points, candidates, open_prefix, prefix_budget
from axpo.options import MethodConfig
from axpo.tree import RolloutTree, Segment, StopReason, scored


def explore_grpo(drawing: Drawing, options: MethodConfig) -> None:
    """N rollouts of every question. With dynamic sampling (DAPO, arXiv 2503.14476, section 3.2), a group of one outcome
    is replaced by one of another question, `options.dynamic_sampling` times a step at the most."""
    left = options.dynamic_sampling

    def refill(group: int) -> None:
        nonlocal left
        if left and one_outcome(drawing.trees[group]) and (new := drawing.replace()) is not None:
            left -= 1
            drawing.draw(new, drawing.size, then=partial(refill, new))

    for group in drawing.own:
        drawing.draw(group, drawing.size, then=partial(refill, group) if left else None)


def explore_axpo(drawing: Drawing, options: MethodConfig) -> None:
    """N rollouts of every question, and K continuations of each failed call that the budget allows (AXPO, step 2 to 5).

    A call is resampled as soon as its group is scored and nothing can keep it out of the budget any more.
    """
    if options.adaptive_budget:
        _explore_adaptively(drawing, options)
        return
    groups = len(drawing.groups)
    budget = prefix_budget(options.budget, groups, drawing.size, options.continuations)
    if not drawing.alone:
        _explore_together(drawing, options, budget)
        return
    most = budget if options.fork_at == "every" else drawing.size
    allocation = Allocation(groups, budget, most)

    def resample(scored: int) -> None:
        for group, turn, candidate in allocation.ended(scored, ranked(drawing.trees[scored], options)):
            drawing.draw(group, options.continuations, _start(drawing, group, candidate, options), turn + 1)

    for group in drawing.own:
        drawing.draw(group, drawing.size, then=partial(resample, group))


def _explore_together(drawing: Drawing, options: MethodConfig, budget: int) -> None:
    """The same over several processes: when all groups of all are scored, each process finds what the budget allows
    in the whole step, and resamples what of it is in its own groups."""
    found: dict[int, list[Candidate]] = {}

    def offer() -> dict[int, list[Claim]]:
        found.update({group: ranked(tree, options) for group, tree in drawing.drawn.items()})
        return {group: [Claim(candidate.order) for candidate in found[group]] for group in drawing.own}

    def resample(offers: list[dict[int, list[Claim]]]) -> None:
        claims = {group: each for offered in offers for group, each in offered.items()}
        turns = [0] * len(drawing.groups)
        for group, _ in allocate([claims[group] for group in range(len(drawing.groups))], budget):
            turns[group] += 1
            if group in found:
                start = _start(drawing, group, found[group][turns[group] - 1], options)
                drawing.draw(group, options.continuations, start, turns[group])

    for group in drawing.own:
        drawing.draw(group, drawing.size)
    drawing.meet(offer, resample)


def _explore_adaptively(drawing: Drawing, options: MethodConfig) -> None:
    """The same with a budget in rollouts: what a collapsed prefix saves goes to the next, the rest to the next step."""
    more = options.continuations
    step = prefix_budget(options.budget, len(drawing.groups), drawing.size, 1)
    cap = int(options.adaptive_budget * step)
    drawing.kept = min(drawing.kept, cap) + step
    running = len(drawing.groups)
    queue: list[tuple[int, Candidate]] = []
    forked = [0] * len(drawing.groups)

    def ended() -> None:
        nonlocal running
        running -= 1
        if not running:
            per_tree = [ranked(tree, options) for tree in drawing.trees]
            queue.extend(allocate(per_tree, sum(map(len, per_tree))))
            spend()

    def spend() -> None:
        while queue and drawing.kept >= more:
            group, candidate = queue.pop(0)
            drawing.kept -= more
            forked[group] += 1
            start = _start(drawing, group, candidate, options)
            drawing.draw(group, 2, start, forked[group], partial(compare, group, start, forked[group]))

    def compare(group: int, start: Segment, number: int) -> None:
        calls = [drawing.agent.written_after(start, child) for child in start.children if child.resampled == number]
        if calls[0] == calls[1]:
            drawing.kept += more - 2
            spend()
        elif more > 2:
            drawing.draw(group, more - 2, start, number)

    for group in drawing.own:
        drawing.draw(group, drawing.size, then=ended)


def explore_rltf(drawing: Drawing, options: MethodConfig) -> None:
    """N first attempts at every question and, for each that gave an answer, a second that has read its critique (RLTF,
    arXiv 2602.02482). The second is then laid at the root, as if it had been written without the first."""

    def again(group: int) -> None:
        tree, question = drawing.groups[group]
        decided = [leaf for leaf, _ in scored(tree.base_leaves())]
        answered = [leaf for leaf in decided if leaf.outcome and leaf.outcome.stop is StopReason.ANSWER]
        for number, leaf in enumerate(answered, 1):
            if (second := drawing.agent.after_critique(tree, leaf)) is not None:
                drawing.draw(group, 1, None, number, partial(_lay_at_root, second, tree, number), (second, question))

    for group in drawing.own:
        drawing.draw(group, drawing.size, then=partial(again, group))


def _lay_at_root(second: RolloutTree, tree: RolloutTree, number: int) -> None:
    """Copy the one rollout of `second` below the root of `tree`, where nobody has sampled it: its log-probs are NaN.

    One that ended by a limit is left out: the first attempt took its part of that.
    """
    (leaf,) = second.leaves()
    if leaf.outcome is None or leaf.outcome.stop not in (StopReason.ANSWER, StopReason.VOID):
        return
    end = tree.root
    for segment in leaf.path()[1:]:
        unknown = None if segment.logprobs is None else np.full(len(segment), np.nan)
        first = number if end is tree.root else 0
        end = tree.append(end, segment.kind, segment.ids, unknown, segment.images, segment.calls, first)
        end.outcome, end.thought, end.uses = segment.outcome, segment.thought, segment.uses
    tree.root.children.sort(key=lambda child: child.resampled)


def explore_arpo(drawing: Drawing, options: MethodConfig) -> None:
    """Half of the N rollouts from the prompt; the others branch where a tool's answer makes the policy uncertain (ARPO,
    arXiv 2507.19849, section 3.2), or begin at the prompt where nothing branches any more.

    A branch begins after an observation, and is one of the N rollouts: its turns before the branch it shares.
    """
    initial = max(1, drawing.size // 2)
    tried: set[Segment] = set()

    running = [1] * len(drawing.groups)  # draws of the group that have not ended

    def grow(group: int) -> None:
        running[group] -= 1
        if running[group]:
            return
        tree = drawing.trees[group]
        free = drawing.size - len(tree.leaves())
        rule = options.arpo_rule, options.arpo_weight, options.arpo_chance
        points = [point for point in branch_points(tree, drawing.agent.vocabulary, *rule) if point not in tried][:free]
        tried.update(points)
        running[group] = len(points)
        for point in points:
            drawing.draw(group, 1, point, then=partial(grow, group))
        if free and not points and options.arpo_rule == "code":
            running[group] = 1  # the program adds one a round, which may branch too
            drawing.draw(group, 1, then=partial(grow, group))
        elif free and not points:
            drawing.draw(group, free)

    for group in drawing.own:
        drawing.draw(group, initial, then=partial(grow, group))


def ranked(tree: RolloutTree, options: MethodConfig) -> list[Candidate]:
    """The fork points of a tree, by the method's options."""
    return candidates(tree, options.threshold, options.fork_at, options.rank, options.resample_no_tool)


def _start(drawing: Drawing, group: int, candidate: Candidate, options: MethodConfig) -> Segment:
    tree = drawing.trees[group]
    return open_prefix(tree, candidate) if options.prefix_fix else tree.root
