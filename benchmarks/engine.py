"""Tokens per second of our local engine, of transformers' `generate`, and of vLLM.

    python benchmarks/engine.py           (about 10 minutes on two cores)
    make bench-engine                     (makes vLLM's environment first)

The miniature model in float32, prompts of text (random ids), a fixed number of new tokens at temperature 1. All
rollouts have one prompt (shared), or each its own. Nobody stops early: ours and `generate` can sample neither the
end of the turn nor the special tokens that training forbids; vLLM ignores the end, which costs it nothing. Every
run begins with an empty cache.

- **local**: the engine that training uses. It also returns every token's log-prob, which nobody else is asked for.
- **generate**: one batch under SDPA, with nothing to pad. It has no means to share a prompt.
- **vllm**: its CPU build, compiled, prefix caching on. It takes the language model alone, which on text is a Qwen3, and
  runs in a process of its own that idles while others run. Where `--vllm` is no Python with vLLM, the JSON says why it
  is missing.
"""

import asyncio
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from timing import alternate, machine, options, ratio, shown, spread, table, write
from transformers import AutoModelForImageTextToText, GenerationConfig

from axpo.chat import Chat
from axpo.engines.base import Request, RolloutKey, Sampling
from axpo.engines.local import LocalEngine
from axpo.miniature.base import BASE
from axpo.policy import banned_tokens, load_policy

PROMPT, NEW = 512, 64
IN_FLIGHT = (1, 8, 64, 256)
HERE = Path(__file__).parent
VLLM = HERE.parent / ".venv-vllm/bin/python"

Prompts = list[list[int]]


class Contender(Protocol):
    def prepare(self, prompts: Prompts, new: int) -> None:
        """Set what the next runs do; not timed."""

    def run(self) -> int:
        """Generate for all prompts at once; returns how many tokens."""


class Local:
    """Our engine."""

    def __init__(self, in_flight: int) -> None:
        chat = Chat.from_pretrained(BASE)
        chat.banned_ids = (*chat.banned_ids, chat.stop_id)
        self.engine = LocalEngine(load_policy(BASE), chat, max_batch=in_flight)

    def prepare(self, prompts: Prompts, new: int) -> None:
        self.prompts, self.sampling = prompts, Sampling(max_tokens=new)

    def run(self) -> int:
        self.engine.update_weights()  # which empties the cache
        return asyncio.run(self._run())

    async def _run(self) -> int:
        return sum(await asyncio.gather(*(self._one(i, prompt) for i, prompt in enumerate(self.prompts))))

    async def _one(self, index: int, prompt: list[int]) -> int:
        key = RolloutKey("q", index)
        with self.engine.rollout(key):
            return len((await self.engine.generate(Request(prompt, [], self.sampling, index, key))).ids)


class Generate:
    """transformers, with a model of its own."""

    def __init__(self) -> None:
        chat = Chat.from_pretrained(BASE)
        self.model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None  # spares it to look for what cannot be sampled
        self.banned = [*banned_tokens(chat, self.model).tolist(), chat.stop_id]
        self.pad = chat.pad_id

    def prepare(self, prompts: Prompts, new: int) -> None:
        self.ids = torch.tensor(prompts)
        self.config = GenerationConfig(
            max_new_tokens=new,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            suppress_tokens=self.banned,
            pad_token_id=self.pad,
        )

    def run(self) -> int:
        mask = torch.ones_like(self.ids)
        found = self.model.generate(self.ids, attention_mask=mask, generation_config=self.config)
        return found[:, self.ids.shape[1] :].numel()


class Vllm:
    """vLLM in a process of its own (vllm_side.py). Raises RuntimeError, saying why, where it does not start."""

    def __init__(self, python: Path, in_flight: int, threads: int) -> None:
        if not python.is_file():
            raise RuntimeError("no environment with vLLM: `make bench-engine` makes one")
        self.folder = tempfile.TemporaryDirectory()
        folder = Path(self.folder.name)
        save_text_model(folder)
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [str(python), str(HERE / "vllm_side.py"), str(folder), str(in_flight)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            )
        self.version = self._answer()["version"]

    def prepare(self, prompts: Prompts, new: int) -> None:
        self._ask({"prompts": prompts, "new": new})

    def run(self) -> int:
        return int(self._ask({})["tokens"])

    def close(self) -> None:
        self.process.communicate()  # its input ends, and so does it
        self.folder.cleanup()

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            said = Path(self.folder.name, "log").read_text().strip().splitlines()
            raise RuntimeError(f"vLLM ended: {said[-1] if said else 'it said nothing'}")
        return json.loads(line)


def save_text_model(folder: Path) -> None:
    """The miniature's language model as a checkpoint of Qwen3: the same arithmetic where all positions are equal."""
    model = load_policy(BASE)
    config = model.config.get_text_config().to_dict()
    rope = {key: config["rope_parameters"][key] for key in ("rope_type", "rope_theta")}
    config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_parameters": rope}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    prefix = "model.language_model."
    weights = {
        name.replace(prefix, "model."): value.contiguous()
        for name, value in model.state_dict().items()
        if name.startswith(prefix)
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def compare(contenders: dict[str, Contender], in_flight: int, share: bool, prompt: int, new: int, runs: int) -> Any:
    """One case: the tokens per second of each."""
    rng = np.random.default_rng(in_flight)
    prompts = rng.integers(20, 500, (1 if share else in_flight, prompt)).tolist() * (in_flight if share else 1)
    for contender in contenders.values():
        contender.prepare(prompts, new)
    wanted = in_flight * new

    def run(name: str) -> None:
        if (found := contenders[name].run()) != wanted:
            raise RuntimeError(f"{name} made {found} tokens of {wanted}")

    seconds = alternate({name: partial(run, name) for name in contenders}, runs)
    speeds = {name: [wanted / s for s in taken] for name, taken in seconds.items()}
    return {
        "in_flight": in_flight,
        "prompts": "shared" if share else "own",
        "tokens_per_second": {name: spread(speed) for name, speed in speeds.items()} | missing(contenders),
        "local_over": {name: ratio(speeds["local"], speed) for name, speed in speeds.items() if name != "local"},
    }


def missing(contenders: dict[str, Contender]) -> dict[str, None]:
    """What is not there, for the JSON."""
    return {} if "vllm" in contenders else {"vllm": None}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--in-flight", type=int, nargs="*", default=IN_FLIGHT)
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=NEW, help="new tokens of a rollout")
    parser.add_argument("--vllm", type=Path, default=VLLM, help="a Python that has vLLM")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    most = max(chosen.in_flight)
    contenders: dict[str, Contender] = {"local": Local(most), "generate": Generate()}
    vllm: dict[str, str | bool | None] = {"version": None, "reason": None, "text_only": True}
    try:
        contenders["vllm"] = rival = Vllm(chosen.vllm, most, chosen.threads)
        vllm["version"] = rival.version
    except RuntimeError as error:
        vllm["reason"] = str(error)
        print(f"without vLLM: {error}")
    cases = []
    for share in (True, False):
        for in_flight in chosen.in_flight:
            cases.append(compare(contenders, in_flight, share, chosen.prompt, chosen.new, chosen.runs))
            print(json.dumps(cases[-1]), flush=True)
    if "vllm" in contenders:
        rival.close()
    sizes = {"prompt": chosen.prompt, "new_tokens": chosen.new, "runs": chosen.runs}
    write("engine", {"machine": machine(), "vllm": vllm, "sizes": sizes, "cases": cases}, chosen.out)
    print(
        table(
            [
                {"in flight": case["in_flight"], "prompts": case["prompts"]}
                | {f"{name} tokens/s": s and shown(s) for name, s in case["tokens_per_second"].items()}
                | {f"local / {name}": r["median"] for name, r in case["local_over"].items()}
                for case in cases
            ]
        )
    )


if __name__ == "__main__":
    main()
