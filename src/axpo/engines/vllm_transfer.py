"""The policy's weights, on their way to vLLM servers.

From a GPU they go by NCCL, through vLLM's own weight transfer. From a CPU there is no such way: they are written to a
folder, from which servers of this machine reload.
"""

import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from axpo.engines.base import EngineError
from axpo.launch import free_port
from axpo.policy import policy_weights

_TIMEOUT = 600.0  # seconds for a server to take all weights
_HELD = 10.0  # seconds in which requests that were given up let go of their keys and values


class Transfer:
    """Sends a model's weights to servers, one after the other."""

    def __init__(self, model: PreTrainedModel, urls: Sequence[str]) -> None:
        self._model = model
        self._urls = urls
        self._by_nccl: list[Any] | None = None  # one for each server

    def send(self) -> None:
        """Raises EngineError, naming the server, where one does not take the weights."""
        try:
            if self._model.device.type == "cuda":
                torch.cuda.synchronize(self._model.device)  # vLLM copies on streams of its own
                if self._by_nccl is None:
                    self._by_nccl = [_nccl(self._model, url) for url in self._urls]
                for way in self._by_nccl:
                    way.send_weights()
            else:
                self._through_a_folder()
            for url in self._urls:
                _forget(url)
        except EngineError:
            raise
        except (OSError, httpx.HTTPError, KeyError, RuntimeError, ValueError) as error:
            # Of requests, which vLLM's client uses, and of NCCL and the store by which it is joined, too.
            raise EngineError(f"vllm.servers: the weights did not arrive: {type(error).__name__}: {error}") from error

    def _through_a_folder(self) -> None:
        with tempfile.TemporaryDirectory(prefix="axpo-weights-") as folder:
            weights = {name: value.contiguous() for name, value in policy_weights(self._model)}
            save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            for url in self._urls:
                _post(url, "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})


def _forget(url: str) -> None:
    """Drop what a server has computed with the old weights, once no request holds it any more."""
    deadline = time.monotonic() + _HELD
    while not _post(url, "/reset_prefix_cache").json().get("success", True):
        if time.monotonic() > deadline:
            raise EngineError(f"vllm.servers: {url} keeps keys and values of the old weights: do others use it too?")
        time.sleep(0.1)
    for cache in ("encoder", "mm"):
        _post(url, f"/reset_{cache}_cache")


def _post(url: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
    try:
        response = httpx.post(f"{url}{path}", json=body, timeout=_TIMEOUT)
    except httpx.HTTPError as error:
        raise EngineError(f"vllm.servers: {url} failed: {type(error).__name__}: {error}") from error
    if response.status_code != 200:
        raise EngineError(f"vllm.servers: {url}{path} answers {response.status_code}: {response.text[:500]}")
    return response


def _nccl(model: PreTrainedModel, url: str) -> Any:
    """vLLM's trainer side of a transfer to one server, which may have several GPUs."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

    class Source(WeightSource):  # type: ignore[misc]
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, value.dtype, tuple(value.shape)) for name, value in policy_weights(model)]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return policy_weights(model)

    workers = httpx.get(f"{url}/get_world_size", timeout=_TIMEOUT).raise_for_status().json()["world_size"]
    place = urlsplit(url)
    server = place.hostname or "", place.port or (443 if place.scheme == "https" else 80)
    with socket.create_connection(server, timeout=10) as towards:
        address = towards.getsockname()[0]  # by which that server reaches this machine
    info = NCCLTrainerInitInfo(rank=0, master_address=address, master_port=free_port(address), world_size=1 + workers)
    return NCCLTrainerWeightTransferEngine.trainer_init(info, client=HTTPVLLMWeightSyncClient(url), source=Source())
