"""Weights that two real processes share, which gloo connects."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import (
    assert_figures_alike,
    assert_learnt_alike,
    assert_weights_alike,
    fine_tune,
    make_project,
    start,
    train,
    train_interrupted,
    wait_for,
    weights,
)
from safetensors.torch import load_file

from axpo.launch import TOLD, free_port
from axpo.miniature.base import SFT
from axpo.run import TRAINING_STATE


def test_shared_weights_learn_what_whole_ones_learn(tmp_path: Path) -> None:
    """Also from a checkpoint, whose weights and optimizer are whole."""
    project = make_project(tmp_path)
    whole = train(project, "whole", "parallel.processes=2")
    shared = train_interrupted(
        project, "shared", "parallel.processes=2", "parallel.sharding=full", "train.gradient_checkpointing=true"
    )
    assert_learnt_alike(whole, shared, 1e-5)


def test_adapters_of_shared_weights_learn_what_those_of_whole_ones_learn(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    given = ("parallel.processes=2", "lora.rank=4", "train.steps=1", "data.eval=null")
    whole = train(project, "whole", *given)
    assert_learnt_alike(whole, train(project, "shared", "parallel.sharding=full", *given), 1e-5)


def test_shared_weights_in_bfloat16_learn_what_whole_ones_learn(tmp_path: Path) -> None:
    """Of the first step, up to what bfloat16 gradients are rounded by: later rollouts would differ."""
    project = make_project(tmp_path)
    given = ("parallel.processes=2", "dtype=bfloat16", "train.vision=false", "train.steps=1")
    given += ("train.minibatches=1", "data.eval=null")
    runs = [train(project, name, f"parallel.sharding={name}", *given) for name in ("none", "full")]
    whole, shared = (
        torch.load(run / "checkpoint" / TRAINING_STATE)["trainer"]["optimizer"]["adamw"]["state"] for run in runs
    )
    assert whole.keys() == shared.keys()
    ours, theirs = (torch.cat([each["exp_avg"].flatten() for each in m.values()]) for m in (whole, shared))
    assert ours.norm() > 0
    assert (ours - theirs).norm() < 0.01 * ours.norm()


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_are_taught_what_one_is(tmp_path: Path, sharding: str) -> None:
    """Of each batch of three one has two trajectories, and one may have the only image."""
    project = make_project(tmp_path)
    alone = "train.pack_tokens=1"  # a pack holds one: so each is computed in the same order, whoever has it
    one = fine_tune(project, "one", alone)
    two = fine_tune(project, "two", alone, "parallel.processes=2", f"parallel.sharding={sharding}")
    assert_weights_alike(one, two, 1e-6 if sharding == "none" else 1e-5)
    assert_figures_alike(one, two)


def test_fine_tuning_that_is_interrupted_leaves_what_was_learnt(tmp_path: Path) -> None:
    project, run = make_project(tmp_path), tmp_path / "run"
    given = ["parallel.processes=2", "parallel.sharding=full", "sft.steps=1000"]
    data = f"data.sft={project}/trajectories.jsonl"
    process = start("sft", project / "config.yaml", data, f"output={run}", *given)
    wait_for(run / "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert (process.returncode, errors.splitlines()) == (130, [f"interrupted: the run so far is in {run}"])
    before, after = load_file(SFT / "model.safetensors"), weights(run)
    assert max((after[name] - before[name]).abs().max() for name in before) > 1e-5


FAILING = """
import sys, traceback
from axpo import build, trainer
from axpo.config import load_config
from axpo.launch import end_rank
from axpo.miniature.base import SFT
from axpo.parallel import joined

def fail(*_, **__):
    raise MemoryError("no memory left")

config = load_config(None, ["model=miniature_sft", "parallel.processes=2", "parallel.sharding=full", "threads=1"])
try:
    with joined(config) as ranks:
        chat, model = build.load_chat(config), build.load_model(config)
        engine = build.make_engine(config, model, chat, ranks=ranks)
        agent = build.training_agent(config, engine, chat, build.load_toolbox(config, chat))
        if not ranks.main:
            setattr(trainer, sys.argv[1], fail)
        made = trainer.Trainer(config, agent, model, [], ranks)
        made.restore({"start": made.start}, SFT)
except SystemExit as ended:
    end_rank(ended.code)
except Exception:
    traceback.print_exc()
    end_rank(1)
"""


@pytest.mark.parametrize("part", ["Optimizer", "restore_weights"])
def test_an_error_of_one_process_before_weights_are_gathered_is_told(part: str) -> None:
    """The others are about to gather them, for which they would wait, or crash."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FAILING, part]
    both = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | place | {"RANK": rank})
        for rank in "01"
    ]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert "RankError: process 1 of the training has failed: MemoryError: no memory left" in said[0]
    assert [process.returncode for process in both] == [1, TOLD], said[1]
