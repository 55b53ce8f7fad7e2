"""Every benchmark runs at a tiny size and writes what it promises. What it measures here means nothing."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ONCE = ("--runs", "1", "--threads", "1")
SPREAD = {"median", "min", "max"}


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Benchmarks are scripts that import their neighbours by plain names, which nobody else should see."""
    import torch

    threads, before = torch.get_num_threads(), set(sys.modules)
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def result(folder: Path, name: str) -> Any:
    found = json.loads((folder / f"{name}.json").read_text())
    assert {"cpu", "cores", "threads", "torch", "transformers"} <= set(found["machine"])
    assert found["sizes"]["runs"] == 1
    return found


def test_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import packing

    monkeypatch.setattr(packing, "LENGTH", 8)
    monkeypatch.setattr(packing, "CASES", ((16, 0.5),))
    # Each of these is a process of its own; the next test tries one.
    monkeypatch.setattr(packing, "alone", lambda *_: 1.0)
    packing.main([*ONCE, "--growth", "2", "4", "--out", str(tmp_path)])
    found = result(tmp_path, "packing")
    (case,) = found["cases"]
    assert case["unique_tokens"] == 16 + 7 * 8 + 4 + 4 * 4
    assert case["row_tokens"] == 11 * (16 + 8)
    assert case["trained_tokens"] == case["unique_tokens"] - 16
    assert case["bound"] < case["flop_bound"] < 1
    assert case["time_over_bound"] == pytest.approx(case["packed_over_rows"]["median"] / case["bound"])
    assert set(case["packed_seconds"]) == set(case["rows_seconds"]) == SPREAD
    assert set(case["memory_mb"]) == {"packed", "rows", "one_row"}
    assert [point["rollouts"] for point in found["growth"]["points"]] == [2, 4]
    assert {"seconds_per_token", "r_squared", "exponent"} <= set(found["growth"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_the_peak_of_what_runs(tmp_path: Path) -> None:
    import timing

    script = tmp_path / "holds.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "from timing import peak_memory\n"
        "print('a line before')\n"
        "print(peak_memory(lambda: bytearray(50 * 2**20)))\n"
    )
    assert timing.alone(str(script)) == pytest.approx(50, abs=5)


def test_rows_and_counted_operations() -> None:
    """The operations are those that torch counts; trees share what their rows repeat."""
    import forked
    import gpu_step
    import torch
    from flops import attended, text_flops, vision_flops
    from torch.utils.flop_counter import FlopCounterMode

    model = gpu_step.make_model("cpu", tiny=True).float().eval()
    model.set_attn_implementation("eager")  # which computes every score
    chat = gpu_step.RandomImages(model)
    trees = gpu_step.make_trees(gpu_step.TINY, chat)
    rows = forked.Rows.of(trees, chat.image_token_id, chat.merge_size)
    count, width = rows.ids.shape
    trained = sum(map(len, rows.sources))
    with FlopCounterMode(display=False) as counter:
        rows.step(model, torch.tensor([511]), 4, chat.pixels)
    expected = text_flops(model, count * width, count * width**2, trained) + vision_flops(model, [16] * count)
    again = 2 * 64 * 512 * trained  # the logits, which the backward pass computes a second time
    assert counter.get_total_flops() == expected + again

    # A prompt of 24; seven rollouts of 8; a prefix of 4 with four ends of 4.
    expected = 24 * 25 // 2 + 7 * (8 * 24 + 36) + (4 * 24 + 10) + 4 * (4 * 28 + 10)
    assert attended(forked.trained_paths(trees[0])) == expected


def test_resampling_cost(tmp_path: Path) -> None:
    import resampling_cost

    small = ["--rollouts", "4", "--callers", "1", "--tokens", "24", "--ratios", "1", "--questions", "1"]
    resampling_cost.main([*ONCE, *small, "--out", str(tmp_path)])
    cases = {case["contender"]: case for case in result(tmp_path, "resampling_cost")["cases"]}
    assert set(cases) == {"axpo r=0", "grpo r=0", "axpo r=1", "grpo r=1"}
    assert cases["axpo r=1"]["forked"] == 1
    assert cases["axpo r=1"]["rollouts"] == cases["grpo r=1"]["rollouts"] == 8
    assert cases["axpo r=0"]["sampled_tokens"] == cases["grpo r=0"]["sampled_tokens"]
    for case in cases.values():
        for part in ("step", "rollout", "update"):
            assert set(case[f"{part}_seconds"]) == set(case[f"{part}_over_grpo"]) == SPREAD


def test_engine_without_vllm(tmp_path: Path) -> None:
    import engine

    small = ["--in-flight", "1", "2", "--prompt", "20", "--new", "3", "--vllm", str(tmp_path / "none")]
    engine.main([*ONCE, *small, "--out", str(tmp_path)])
    found = result(tmp_path, "engine")
    assert "make bench-engine" in found["vllm"]["reason"]
    assert [(case["prompts"], case["in_flight"]) for case in found["cases"]] == [
        ("shared", 1),
        ("shared", 2),
        ("own", 1),
        ("own", 2),
    ]
    for case in found["cases"]:
        assert case["tokens_per_second"]["vllm"] is None
        assert set(case["tokens_per_second"]["local"]) == set(case["tokens_per_second"]["generate"]) == SPREAD
        assert set(case["local_over"]) == {"generate"}


def test_vllm_that_does_not_start_says_why(tmp_path: Path) -> None:
    import engine

    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho first >&2\necho no such module >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(RuntimeError, match="vLLM ended: no such module"):
        engine.Vllm(python, 1, 1)


def test_vllm_gets_the_same_language_model(tmp_path: Path) -> None:
    import engine
    import torch
    from transformers import AutoModelForCausalLM

    from axpo.miniature.base import BASE
    from axpo.policy import load_policy

    engine.save_text_model(tmp_path)
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids).logits
        expected = load_policy(BASE)(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_gpu_step(tmp_path: Path) -> None:
    import gpu_step

    small = ["--device", "cpu", "--tiny", "--questions", "1", "--peak-tflops", "1"]
    gpu_step.main([*ONCE, *small, "--out", str(tmp_path)])
    found = result(tmp_path, "gpu_step")
    for side in ("packed", "rows"):
        figures = found["sides"][side]
        assert figures["peak_gb"] is None
        for key in ("seconds", "computed_tokens_per_second", "trained_tokens_per_second", "mfu"):
            assert set(figures[key]) == SPREAD
    assert found["sides"]["packed"]["flops"] < found["sides"]["rows"]["flops"]


def test_gpu_step_without_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_step
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu_step.main(["--out", str(tmp_path)])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_shape_is_that_of_qwen3_vl_2b() -> None:
    """2,127,532,032 parameters, as the published checkpoint has."""
    import gpu_step
    import torch

    with torch.device("meta"):
        model = gpu_step.make_model("meta", tiny=False)
    assert sum(p.numel() for p in model.parameters()) == 2_127_532_032


def test_ratios_of_a_step_are_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL is in an environment of its own; what is made of the figures, and our side of them, is tried here."""
    monkeypatch.setitem(sys.modules, "torchvision_shim", ModuleType("torchvision_shim"))
    import step_vs_trl
    from workload import Shape

    side = step_vs_trl.Ours("grpo", Shape(questions=1, rollouts=4, callers=1, tokens=24, prompt=640))
    side.step()
    assert side.tokens["forked"] == 0
    assert side.tokens["sampled"] == sum(side.trainer.agent.engine.script.sampled(row) for row in range(4))  # type: ignore[attr-defined]
    steps = {
        name: [{"step": seconds, "rollout": 1.0, "update": seconds - 1} for seconds in (base, 2 * base, 3 * base)]
        for name, base in (("grpo", 2.0), ("axpo", 3.0), ("trl", 10.0))
    }
    found = step_vs_trl.result(steps, {"axpo": [1.0, 3.0], "trl": [10.0, 10.0]})
    assert found["axpo_over_trl"] == pytest.approx(0.3)
    assert found["grpo_over_trl"] == pytest.approx(0.2)
    assert found["axpo_over_grpo"] == pytest.approx(1.5)
    assert found["update_over_trl"] == pytest.approx(3 / 19)
    assert found["peak_memory_over_trl"] == pytest.approx(0.2)
    assert found["spread"]["peak_memory_over_trl"] == {"median": pytest.approx(0.2), "min": 0.1, "max": 0.3}


def test_further_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two policies of a comparison, asked far questions and offered a tool that training never had; once."""
    import further
    from commands import succeed

    from axpo.miniature import unseen

    monkeypatch.setattr(unseen, "COUNT", 2)
    monkeypatch.setattr(further, "MORE", 2)
    monkeypatch.setattr(further, "METHODS", ("sft", "axpo"))
    cells = tmp_path / "cells"
    config = tmp_path / "config.yaml"
    config.write_text(
        "model: miniature_sft\nthreads: 1\nmax_pixels: 16384\ndata: {train: miniature, eval: miniature}\n"
        "tools: {names: [zoom, python, search], corpus: miniature, zoom_pixels: 16384, search_results: 1}\n"
        "rollout: {max_turns: 3, max_tokens: 96, max_context: 1100, max_images: 4}\n"
        "train: {steps: 0}\neval: {questions: 1}\n"
    )
    succeed("train", config, f"output={cells / 'sft' / 'seed_1'}")
    shutil.copytree(cells / "sft", cells / "axpo")
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["further.py", str(tmp_path), str(tmp_path / "further.json")])
        further.main()
        monkeypatch.setattr(further.subprocess, "run", None)  # the second time nothing is left to run
    found = json.loads((tmp_path / "further.json").read_text())
    assert set(found["guesses"]) == {"held_out", "more", "far", "unseen"}
    assert 0.5 < found["guesses"]["held_out"]["usual"] < 0.7 < found["guesses"]["held_out"]["common"] < 0.9
    assert found["unseen"]["methods"]["sft"]["seeds"] == 1
    assert {"pass1", "pass4", "tool_use", "image_search"} < set(found["unseen"]["methods"]["axpo"])
    for split in ("more", "far", "unseen"):
        assert found[split]["pairs"]["axpo_minus_sft"]["pass1"]["mean"] == 0  # the same policy


def test_a_lengthened_run_is_the_longer_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import longer
    import yaml
    from commands import succeed

    (tmp_path / "questions.jsonl").write_text('{"question": "What is the crop of Bel-nia?", "answer": "rye"}\n')
    config = {
        "model": "miniature",
        "data": {"train": "questions.jsonl", "eval": "questions.jsonl"},
        "rollout": {"questions": 1, "rollouts": 2, "max_tokens": 8, "max_turns": 1, "max_context": 600},
        "train": {"warmup_steps": 0, "save_every": 1},
        "method": "grpo",
        "eval": {"samples": 1, "every": 1},
    }
    for name, steps in (("short", 1), ("long", 2), ("straight", 2)):
        given = {**config, "train": {**config["train"], "steps": steps}}  # type: ignore[dict-item]
        grid = {"config": given, "output": name, "seeds": [1], "methods": {"grpo": []}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(grid))
    succeed("compare", tmp_path / "short.yaml")
    monkeypatch.setattr(sys, "argv", ["longer.py", str(tmp_path / "short.yaml"), str(tmp_path / "long.yaml")])
    longer.main()
    lines = {}
    for name in ("long", "straight"):
        succeed("compare", tmp_path / f"{name}.yaml")
        text = (tmp_path / name / "cells" / "grpo" / "seed_1" / "metrics.jsonl").read_text()
        lines[name] = [{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in text.splitlines()]
    assert [line.get("of", line.get("step")) for line in lines["long"]] == [1, "step_1", 2, "grpo"]
    assert lines["long"] == lines["straight"]
