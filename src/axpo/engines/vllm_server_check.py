"""Whether a vLLM server can serve a policy, as far as it tells before any weights are loaded."""

import re
from typing import Any

import httpx
from transformers import PretrainedConfig

from axpo.engines.vllm_start import VERSIONS

CONNECT = 10.0  # seconds; an answer may take as long as it takes
_FIRST = 120.0  # but one to these questions: others may be asked for at the same time
COMMAND = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out --enable-prompt-tokens-details "
    "--logprobs-mode processed_logprobs --generation-config vllm --no-mm-device-do-normalize "
    """--weight-transfer-config '{"backend": "nccl"}'"""
)
# A token that a bias makes certain: only processed log-probs say so.
_SURE = {
    "token_ids": [1],
    "sampling_params": {"temperature": 1.0, "max_tokens": 1, "logprobs": 0, "logit_bias": {"1": 100.0}},
}
# How vLLM describes a model's embedding, the vision tower being (visual).
_EMBEDDING = re.compile(r"\(embed_tokens\): VocabParallelEmbedding\(.*?embedding_dim=(\d+), org_vocab_size=(\d+)")


def server_problem(url: str, context: int, model: PretrainedConfig, by_nccl: bool) -> str | None:
    """Why the server cannot be used for paths of so many tokens of this model; None where it can, as far as it tells.

    `by_nccl`: whether weights will go to it by NCCL, which waits for ever for a server that does not take them.
    """
    try:
        with httpx.Client(base_url=url, timeout=httpx.Timeout(_FIRST, connect=CONNECT)) as client:
            version = str(client.get("/version").raise_for_status().json()["version"])
            (listed, *_) = client.get("/v1/models").raise_for_status().json()["data"]
            served = int(listed["max_model_len"])
            token = client.post("/inference/v1/generate", json=_SURE)
            weights = client.get("/weight_info")
            settings = client.get("/server_info", params={"config_format": "json"})
            described = client.post("/collective_rpc", json={"method": "get_model_inspection"})
    except (httpx.HTTPError, httpx.InvalidURL, KeyError, TypeError, ValueError) as error:
        return f"no vLLM server answers there ({type(error).__name__}: {error})"
    if not version.startswith(f"{VERSIONS}."):
        return f"it is vLLM {version}; must be of the line {VERSIONS}"
    if served < context:
        return f"it serves {served} tokens, but rollout.max_context is {context}; --max-model-len sets it"
    if token.status_code in (403, 404) or 404 in (weights.status_code, settings.status_code, described.status_code):
        return f"it takes no token ids or no weights; it must be started as: {COMMAND}"
    try:
        (sampled,) = token.raise_for_status().json()["choices"][0]["logprobs"]["content"]
        processed = abs(sampled["logprob"]) < 1e-3
    except (httpx.HTTPError, LookupError, TypeError, ValueError):
        return f"it answers {token.status_code} where a token is asked for: {token.text[:500]}"
    if not processed:
        return f"its log-probs are not those of what it samples from; it must be started as: {COMMAND}"
    try:
        options = settings.raise_for_status().json()["vllm_config"]
        inspection = str(described.raise_for_status().json()["results"][0])
        return _options_problem(options, by_nccl) or _model_problem(inspection, model)
    except (httpx.HTTPError, LookupError, TypeError, ValueError) as error:
        return f"it does not tell how it was started ({type(error).__name__}: {error})"


def _options_problem(options: dict[str, Any], by_nccl: bool) -> str | None:
    transfer = (options["weight_transfer_config"] or {}).get("backend")
    if by_nccl and transfer != "nccl":
        return f"it takes no weights by NCCL; it must be started as: {COMMAND}"
    images = options["model_config"]["multimodal_config"]
    if images is not None and images["mm_device_do_normalize"]:
        return f"it would prepare images that are prepared already; it must be started as: {COMMAND}"
    return None


def _model_problem(inspection: str, model: PretrainedConfig) -> str | None:
    """That it serves a model of another size. One that vLLM describes in other words is left to the log-probs."""
    if (embedding := _EMBEDDING.search(inspection)) is None:
        return None
    text = model.get_text_config()
    served = int(embedding[1]), int(embedding[2]), "(visual)" in inspection
    wanted = text.hidden_size, text.vocab_size, getattr(model, "vision_config", None) is not None
    if served == wanted:
        return None
    return f"it serves another model: {_described(*served)}; that of this config has {_described(*wanted)}"


def _described(hidden: int, vocabulary: int, sees: bool) -> str:
    return f"hidden_size {hidden}, vocab_size {vocabulary}, {'a' if sees else 'no'} vision tower"
