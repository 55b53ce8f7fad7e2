"""Weights that two real processes share, which gloo connects."""

from pathlib import Path

from processes import assert_learnt_alike, make_project, train, train_interrupted


def test_shared_weights_learn_what_whole_ones_learn(tmp_path: Path) -> None:
    """Also from a checkpoint, whose weights and optimizer are whole."""
    project = make_project(tmp_path)
    whole = train(project, "whole", "parallel.processes=2")
    shared = train_interrupted(
        project, "shared", "parallel.processes=2", "parallel.sharding=full", "train.gradient_checkpointing=true"
    )
    assert_learnt_alike(whole, shared, 1e-5)
