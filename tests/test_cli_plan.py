"""`axpo plan`: what it prints, what it refuses, and that it loads no weights."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import axpo, mistake, succeed
from plan.published import CONFIGS, write_checkpoint
from torch.distributed.fsdp import FSDPModule

from axpo.cli_plan import check_fit
from axpo.cli_shared import QUICKSTART
from axpo.config import ConfigError, load_config
from axpo.plan.memory import GIB, PARTS


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Holds two files of configuration and nothing else."""
    return f"model={write_checkpoint(tmp_path / 'model', CONFIGS['qwen3_vl_2b'])}"


def row(output: str, name: str) -> list[str]:
    """The cells of the row of this name."""
    (line,) = (line for line in output.splitlines() if line.startswith(name + "  "))
    return re.split(r"\s{2,}", line[len(name) :].strip())


def test_the_quickstarts_plan():
    output = succeed("plan", QUICKSTART).stdout
    assert row(output, "all") == row(output, "trained") == ["1,696,448"]
    assert row(output, "rollouts") == ["64 = 8 × 8"]
    assert row(output, "rollouts that the method adds, at most") == ["16 (+25%)"]
    assert row(output, "tokens, and patches, of the largest image") == ["16 and 64"]
    assert "How much memory a GPU has is not known: --gpu-memory says it." in output
    assert max(map(len, output.splitlines())) <= 80


def test_parts_add_up_to_what_is_taken_together(model: str):
    output = succeed("plan", QUICKSTART, model, "dtype=bfloat16", "max_pixels=262144", "--gpu-memory", 300).stdout
    table = output[output.index("GiB of each process") : output.index("a step of all processes")]
    named = [name for name in PARTS if f"{name}  " in table]
    parts, together = (
        [[0 if cell == "-" else float(cell) for cell in row(table, name)] for name in names]
        for names in (named, ["together"])
    )
    assert len(parts) >= 6
    for moment in range(3):
        assert sum(part[moment] for part in parts) == pytest.approx(together[0][moment], abs=0.05)
    # 2.13 billion weights of 2 bytes; moments and float32 copies take 12.
    assert row(table, "weights") == ["3.96"] * 3
    assert row(table, "optimizer") == ["23.78"] * 3


def test_what_cannot_fit_ends_with_1_and_names_the_knob(model: str):
    result = axpo("plan", QUICKSTART, model, "dtype=bfloat16", "max_pixels=262144", "--gpu-memory", 60)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert re.fullmatch(
        r"error: it does not fit: the update takes [\d.]+ GiB of a GPU, and 57\.0 GiB of its 60\.0 GiB can be used; "
        r"it fits with train\.gradient_checkpointing=true \(takes [\d.]+ GiB off the peak\)",
        line,
    )
    assert "together" in result.stdout  # the tables come first
    fitting = ("train.gradient_checkpointing=true", "--gpu-memory", 60)
    succeed("plan", QUICKSTART, model, "dtype=bfloat16", "max_pixels=262144", *fitting)


def test_what_cannot_fit_is_refused_before_a_run_begins(model: str, monkeypatch: pytest.MonkeyPatch):
    given = [model, "dtype=bfloat16", "max_pixels=262144", "device=cuda", "data.sft=miniature"]

    def check(memory: int, *overrides: str, tuning: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory * GIB))
        check_fit(load_config(QUICKSTART, [*given, *overrides]), tuning)

    with pytest.raises(
        ConfigError, match=r"it does not fit: .* of its 20\.0 GiB can be used; it fits with (.|\n)*plan"
    ):
        check(20)
    check(300)
    check(20, "preflight=false")
    check(20, "device=cpu")
    check(100, tuning=True)
    with pytest.raises(ConfigError, match="it does not fit"):
        check(40, tuning=True)


def test_a_torch_that_cannot_share_weights_is_named_where_they_are_trained(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(FSDPModule, "set_reduce_scatter_unused_params")
    check_fit(load_config(QUICKSTART, ["parallel.processes=2"]))
    with pytest.raises(ConfigError, match=r"parallel.sharding: got 'full', which needs torch 2.13 or later; this is"):
        check_fit(load_config(QUICKSTART, ["parallel={processes: 2, sharding: full}"]))


def test_mistakes(model: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    told = mistake("plan", QUICKSTART, f"model={tmp_path / 'empty'}")
    assert "its config.json cannot be read" in told
    assert "must be a folder that holds config.json (and preprocessor_config.json)" in told
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    assert "has no preprocessor_config.json that can be read" in mistake("plan", QUICKSTART, model)
    assert axpo("plan", QUICKSTART, model, "--gpu-memory", 0).exit_code == 2
