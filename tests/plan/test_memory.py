"""The parts of memory, by hand, on a model of round numbers."""

from dataclasses import replace

import pytest

from axpo.config import Config, load_config
from axpo.plan.activations import Batch
from axpo.plan.memory import CONTEXT, GIB, PROCESS, VLLM_WORK, Moment, host_bytes, kv_bytes, moments, vllm_least
from axpo.plan.planning import make_plan, refusal, remedies
from axpo.plan.shapes import Shape

# 100 layers of 10 million, a vocabulary of 10,000 × 1,000, a tower of 50 million.
SHAPE = Shape(
    hidden=1000,
    layers=100,
    heads=10,
    key_heads=2,
    head_dim=100,
    intermediate=3000,
    vocabulary=10_000,
    tied=True,
    vision=None,
    language_parameters=10**9,
    vision_parameters=5 * 10**7,
    embedding_parameters=10**7,
    layer_parameters=10**7,
    linears=tuple((f"layers.{n}.q_proj", 1000, 1000) for n in range(100)),
)
ALL = 1_060_000_000
BATCH = Batch(1000, 1000)


def config(*overrides: str) -> Config:
    """On the CPU, which nothing but the CUDA parts tells apart; a GPU that is not there cannot be asked for here."""
    return load_config(None, overrides)


def by_name(given: Config, gpu_memory: int | None = None, tuning: bool = False) -> dict[str, Moment]:
    return {moment.name: moment for moment in moments(given, SHAPE, BATCH, gpu_memory, tuning)}


@pytest.mark.parametrize(("dtype", "weight", "optimizer"), [("float32", 4, 8), ("bfloat16", 2, 12)])
def test_what_lasts(dtype: str, weight: int, optimizer: int):
    found = by_name(config(f"dtype={dtype}"))
    assert list(found) == ["rollout", "update", "optimizer"]
    update, rollout = found["update"].parts, found["rollout"].parts
    assert update["weights"] == update["reference policy"] == ALL * weight
    assert update["gradients"] == ALL * 4  # packs are added up in float32
    assert update["optimizer"] == found["optimizer"].parts["optimizer"] == ALL * optimizer
    assert "gradients" not in rollout
    assert rollout["keys and values"] == 2 * GIB  # engine.kv_memory


def test_no_reference_without_kl_with_adapters_or_in_fine_tuning():
    for found in by_name(config("method.kl=0")), by_name(config("lora.rank=8")), by_name(config(), tuning=True):
        assert not found["update"].parts["reference policy"]
    assert "rollout" not in by_name(config(), tuning=True)


def test_a_frozen_tower_has_no_gradients():
    parts = by_name(config("train.vision=false"))["update"].parts
    assert parts["gradients"] == 4 * (ALL - 5 * 10**7)
    assert parts["weights"] == 4 * ALL


def test_adapters_have_the_models_dtype_and_float32_copies():
    parts = by_name(config("lora.rank=8", "dtype=bfloat16"))["update"].parts
    adapters = 100 * 8 * 2000
    assert parts["weights"] == 2 * (ALL + adapters)
    assert (parts["gradients"], parts["optimizer"]) == (4 * adapters, 12 * adapters)


def test_shards():
    given = ("parallel.processes=4", "dtype=bfloat16")
    alone, sharded = by_name(config(*given)), by_name(config(*given, "parallel.sharding=full"))
    for part in "weights", "gradients", "optimizer", "reference policy":
        assert sharded["update"].parts[part] == alone["update"].parts[part] // 4
    assert sharded["update"].parts["activations"] == alone["update"].parts["activations"]
    # All but the layers, 60 million, with gradients; two layers; a layer's gradients in both precisions.
    assert sharded["update"].parts["gathered weights"] == 2 * (2 * 6 + 2) * 10**7 + (2 + 4) * 10**7
    # When all else has gone its 60 million gradients are there in both precisions, with their share, and those of all.
    reduced = (2 + 4) * 6 * 10**7 + (4 * 6 * 10**7 + 2 * ALL) // 4
    assert sharded["reduction"].parts["gradients"] == ALL + reduced
    frozen = by_name(config(*given, "parallel.sharding=full", "train.vision=false"))
    numbers = ALL - 5 * 10**7
    assert frozen["reduction"].parts["gradients"] == numbers + (2 + 4) * 10**7 + (4 * 10**7 + 2 * numbers) // 4
    # The local engine generates with all weights at once.
    assert sharded["rollout"].parts["gathered weights"] == 2 * ALL
    assert not alone["update"].parts["gathered weights"]


def test_the_start_holds_the_policy_whole_and_then_vllm_or_the_reference():
    sharded = ("parallel.processes=4", "parallel.sharding=full", "dtype=bfloat16")
    start = by_name(config(*sharded))["start"].parts
    assert (start["weights"], start["reference policy"]) == (2 * ALL, 2 * ALL)
    for share, vllm, reference in (0.3, 12 * GIB, 0), (0.03, 0, 2 * ALL):
        parts = by_name(config(*sharded, "engine.name=vllm", f"vllm.memory={share}"), 40 * GIB)["start"].parts
        assert (parts.get("vLLM", 0), parts.get("reference policy", 0)) == (vllm, reference)
    tuning = by_name(config(*sharded), tuning=True)["start"]
    assert tuning.total == 2 * ALL


def test_offload():
    """The optimizer steps on the host, and the reference comes for its own forward alone."""
    given = config("parallel.offload=true", "device=cuda")
    found = by_name(given)
    assert list(found) == ["start", "rollout", "reference", "update", "optimizer"]
    assert not any(moment.parts.get("optimizer") for moment in found.values())
    assert [moment.parts["reference policy"] for moment in found.values()] == [4 * ALL, 0, 4 * ALL, 0, 0]
    # Copies, moments, their gradients, the reference; and the weights as they are saved.
    assert host_bytes(given, SHAPE) == PROCESS + (4 + 8 + 4 + 4) * ALL + 4 * ALL
    # The checkpoint while it is opened; weights and moments as they are saved, of shards too.
    assert host_bytes(config("device=cuda"), SHAPE) == PROCESS + 4 * ALL + 12 * ALL
    shared = config("device=cuda", "parallel.processes=4", "parallel.sharding=full", "rollout.questions=4")
    assert host_bytes(shared, SHAPE) == 4 * (PROCESS + 4 * ALL) + 12 * ALL


def test_vllm_takes_its_share_of_the_gpu():
    given = config("engine.name=vllm", "vllm.memory=0.3", "dtype=bfloat16", "rollout.max_context=5000")
    assert by_name(given, 40 * GIB)["rollout"].parts["vLLM"] == 12 * GIB
    assert not by_name(given)["rollout"].parts["vLLM"]
    token = 2 * 100 * 200 * 2  # keys and values of 100 layers, 2 heads of 100, in bfloat16
    assert vllm_least(given, SHAPE) == 2 * ALL + 5000 * token + VLLM_WORK
    # With autocast it computes in bfloat16 over the trainer's float32 weights; the local engine has the latter.
    both = ("train.autocast=true", "rollout.max_context=5000")
    assert vllm_least(config("engine.name=vllm", *both), SHAPE) == 2 * ALL + 5000 * token + VLLM_WORK
    assert kv_bytes(config("engine.name=vllm"), SHAPE) == kv_bytes(config(*both), SHAPE) == 2 * token
    served = config("engine.name=vllm", "vllm.servers=[http://localhost:8000]")
    assert not by_name(served, 40 * GIB)["rollout"].parts["vLLM"]


def test_cuda_has_a_context_and_steps_all_weights_at_once():
    given = config("device=cuda")
    found = by_name(given)
    assert {moment.parts["CUDA context"] for moment in found.values()} == {CONTEXT}
    assert found["optimizer"].parts["optimizer"] == 12 * ALL


def plan_of(gpu: float, *overrides: str):  # type: ignore[no-untyped-def]
    given = config("method=grpo", "rollout.max_context=4096", "data.train=miniature", *overrides)
    return make_plan(given, SHAPE, 0, int(gpu * GIB))


def test_nothing_is_judged_without_memory_and_nothing_refused_that_fits():
    assert not plan_of(1000).excess
    assert not remedies(plan_of(1000), 0)
    assert not replace(plan_of(1), gpu_memory=None).excess


@pytest.mark.parametrize(
    ("overrides", "knob"),
    [
        ([], "train.gradient_checkpointing=true"),
        (["train.gradient_checkpointing=true", "parallel.processes=8"], "parallel.sharding=full"),
        (["train.gradient_checkpointing=true", "train.pack_tokens=1000", "device=cuda"], "parallel.offload=true"),
        (["train.gradient_checkpointing=true"], "train.pack_tokens="),
        (["train.gradient_checkpointing=true", "engine.kv_memory=60"], "engine.kv_memory="),
        (["train.gradient_checkpointing=true", "train.pack_tokens=1000"], "rollout.max_context="),
    ],
)
def test_the_smallest_change_that_helps_is_named(overrides: list[str], knob: str):
    """A GPU a little smaller than the peak is; what is named makes it fit, and what comes before it would not."""
    plan = plan_of(1000, *overrides)
    tight = plan_of(plan.peak.total / GIB * 0.999 / 0.95, *overrides)
    assert tight.excess
    (change,) = remedies(tight, 0)
    assert change.override.startswith(knob)
    assert not change.plan.excess
    assert f"it fits with {change.override}" in refusal(tight, 0)


@pytest.mark.parametrize(("share", "named"), [(0.9, "vllm.memory=0.65"), (0.1, "vllm.memory=0.15")])
def test_vllms_share_is_lowered_or_raised(share: float, named: str):
    """Of 60 GiB: 15.8 for what rests in a rollout leave 41.2 of the 57 that can be used, which is 0.65 and a bit; and
    4.0 of weights, 0.6 of keys and values and 2.0 to work with are 6.6."""
    plan = plan_of(60, "engine.name=vllm", f"vllm.memory={share}", "train.gradient_checkpointing=true")
    assert [change.override for change in remedies(plan, 0)] == [named]
    if share < 0.5:
        line = refusal(plan, 0)
        assert line.startswith(
            "vllm.memory: got 0.1, which is 6.0 GiB of this GPU's 60.0 GiB, but the weights and one "
        )
        assert line.endswith("; it fits with vllm.memory=0.15")


def test_changes_are_put_together_where_one_is_too_little():
    plan = plan_of(18, "dtype=bfloat16", "parallel.processes=2")
    changes = [change.override for change in remedies(plan, 0)]
    assert len(changes) >= 2
    assert changes[0] == "train.gradient_checkpointing=true"
    assert " and " in refusal(plan, 0)


def test_what_nothing_helps_is_said():
    assert refusal(plan_of(1), 0).endswith(
        "; no option that the plan knows makes it fit: it takes more GPUs or a smaller model"
    )
