from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature with a head of its own: vLLM's CPU servers do not reload one that is the embedding."""
    import torch

    from axpo.chat import Chat
    from axpo.miniature.base import SFT
    from axpo.policy import load_policy, output_head

    model, folder = load_policy(SFT), tmp_path_factory.mktemp("untied")
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    output_head(model).weight = torch.nn.Parameter(output_head(model).weight.detach().clone())
    model.save_pretrained(folder)
    Chat.from_pretrained(SFT).save(folder)
    return folder


@pytest.fixture(scope="session")
def server(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a vLLM server on the CPU, started as docs/vllm.md says."""
    import httpx

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"""--model {untied} --host 127.0.0.1 --port {port} --max-model-len 1100 --enable-scale-out
        --enable-prompt-tokens-details --logprobs-mode processed_logprobs --generation-config vllm
        --no-mm-device-do-normalize --dtype float32 --enforce-eager --kv-cache-memory-bytes 536870912
        --no-enable-chunked-prefill --max-num-batched-tokens 8192"""
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options.split()]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=os.environ | settings, stdout=file, stderr=file)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)
