"""Trainings in two real processes, which gloo connects, each with a vLLM of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import CONFIG, lines, make_project
from safetensors.torch import load_file

from axpo.launch import free_port
from axpo.miniature.base import SFT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="make test-vllm runs these")

VLLM = (
    "engine.name=vllm",
    "engine.kv_memory=0.1",
    "parallel.processes=2",
    "train.learning_rate=1e-3",
    "data.eval=null",
)
TRAIN = """
import torch
from axpo import cli, workflow
from axpo.policy import policy_weights

train = workflow.run_training

async def run_training(config, run, progress, model, *others, ranks):
    figures = await train(config, run, progress, model, *others, ranks=ranks)
    torch.save(dict(policy_weights(model)), run.folder / f"rank_{ranks.rank}.pt")
    return figures

workflow.run_training = run_training
cli.main()
"""


def train_as_torchrun_does(project: Path, *overrides: str) -> Path:
    """A run whose folder also has the weights of each rank."""
    run = project / "run"
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TRAIN, "train", str(project / "config.yaml"), f"output={run}", *VLLM, *overrides]
    both = [
        subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=os.environ | place | {"RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in "01"
    ]
    errors = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(errors)
    assert not any("Traceback" in said for said in errors), "\n".join(errors)
    return run


@pytest.mark.parametrize(
    "overrides", [("parallel.sharding=none",), ("parallel.sharding=full", "lora.rank=4")], ids=["whole", "shared, lora"]
)
def test_each_process_generates_with_the_weights_that_both_have_learnt(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    run = train_as_torchrun_does(make_project(tmp_path), *overrides)
    before, first, second = load_file(SFT / "model.safetensors"), *(torch.load(run / f"rank_{r}.pt") for r in (0, 1))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert max(float((first[name] - before[name]).abs().max()) for name in first) > 1e-3
    steps = lines(run)
    assert len(steps) == CONFIG["train"]["steps"]
    for step in steps:  # of both ranks' tokens; those of the second step are drawn after an update
        assert step["trained_tokens"] > 0
        assert step["mismatch_mean"] < 1e-3
