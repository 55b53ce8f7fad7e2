"""The options of a run, section by section: meaning, unit, default and source of each."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

MINIATURE = "miniature"
MINIATURE_SFT = "miniature_sft"  # its base after the quickstart's fine-tuning
BUILT_IN_TOOLS = ("zoom", "python", "search", "image_search")


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


Integer = Annotated[int, BeforeValidator(_not_bool)]
Real = Annotated[float, BeforeValidator(_not_bool)]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Source = Literal["miniature"] | AbsolutePath | None


def _tool(given: Any) -> str | dict[str, Any]:
    names = f"one of {', '.join(BUILT_IN_TOOLS)}, a Python file (.py), or {{mcp: COMMAND or URL}}"
    if isinstance(given, dict) and isinstance(given.get("mcp"), str) and given.keys() <= {"mcp", "env", "only"}:
        for key in ("env", "only"):
            names_of_key = given.get(key, [])
            if not isinstance(names_of_key, list) or not all(isinstance(name, str) for name in names_of_key):
                raise ValueError(f"must have a list of names as {key!r}")
        return given
    if isinstance(given, str) and given.endswith(".py"):
        return str(_absolute(Path(given)))
    if given not in BUILT_IN_TOOLS:
        raise ValueError(f"must be {names}")
    return str(given)


def _named_or_url(names: Sequence[str], with_url: Mapping[str, str]) -> Callable[[Any], str | dict[str, str]]:
    """Checks a choice between plain names and names with an address: `local`, or `{searxng: http://…}`."""
    forms = [*names, *(f"{{{name}: {form}}}" for name, form in with_url.items())]

    def check(given: Any) -> str | dict[str, str]:
        if isinstance(given, str) and given in names:
            return given
        if isinstance(given, dict) and len(given) == 1 and given.keys() <= with_url.keys():
            ((name, address),) = given.items()
            if isinstance(address, str) and address:
                return {name: address}
        raise ValueError(f"must be {', '.join(forms[:-1])} or {forms[-1]}")

    return check


_sandbox = _named_or_url(("bubblewrap", "none_i_trust_the_policy"), {"remote": "URL"})
_search = _named_or_url(
    ("local", "tavily", "serper"), {"tavily": "URL", "serper": "URL", "searxng": "URL", "url": "TEMPLATE"}
)
_image_provider = _named_or_url((), {"url": "URL", "serper": "UPLOAD URL", "table": "FILE.jsonl"})


def _image_search(given: Any) -> str | dict[str, str] | None:
    return None if given is None else _image_provider(given)


def _default_cache() -> Path:
    return _absolute(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "axpo")


def is_folder(name: str, within: Path = Path()) -> bool:
    """Whether a model's name is a path: its form says so where its folder is not there yet."""
    if name in ("", MINIATURE, MINIATURE_SFT):
        return False
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or (within / name).is_dir()


def _checkpoint(name: str) -> str:
    return str(_absolute(Path(name))) if is_folder(name) else name


def _device(name: str) -> str:
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError("must be cpu, mps, cuda or cuda:INDEX")
    return name


Tool = Annotated[str | dict[str, Any], PlainValidator(_tool)]
Checkpoint = Annotated[str, AfterValidator(_checkpoint)]
Device = Annotated[str, AfterValidator(_device)]

# Where a method differs from the defaults below, unless the config says otherwise.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "cispo": {"clip_low": 1.0, "aggregation": "token-mean", "kl": 0.0},
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_section(cls, data: Any) -> Any:
        return {} if data is None else data  # "train:" with all its keys commented out


class DataConfig(Section):
    """Questions and trajectories: a .jsonl or .parquet file, or "miniature" for the embedded world."""

    train: Source = None
    """Questions to train on by reinforcement learning. Default: none."""
    eval: Source = None
    """Held-out questions. Default: none, and nothing is evaluated."""
    sft: Source = None
    """Trajectories for supervised fine-tuning. Default: none."""


class ToolsConfig(Section):
    """What the policy may call. `tools: [NAME, ...]` says the same as `tools: {names: [NAME, ...]}`."""

    names: list[Tool] = []
    """"zoom", "python", "search", "image_search", a Python file whose functions and classes are tools, or {mcp: COMMAND
    or URL} for those of an MCP server (`env`: variables that the command gets, `only`: the tools to take).
    Default: none."""
    timeout: Real = Field(default=30.0, gt=0)
    """Seconds a call may take. Default: 30 (as Qwen-Agent)."""
    rollout_timeout: Real = Field(default=300.0, gt=0)
    """Seconds that all calls of a rollout may take; one that has begun may end. Default: 300."""
    concurrency: Integer = Field(default=64, ge=1)
    """Calls of one tool that run at once; others wait, which does not count. Default: 64."""
    sandbox: Annotated[str | dict[str, str], PlainValidator(_sandbox)] = "bubblewrap"
    """Where `python` runs: bubblewrap, {remote: URL} of a SandboxFusion service, or none_i_trust_the_policy, a plain
    child process (axpo/tools/sandbox.py says what each does not protect from). Default: bubblewrap."""
    zoom_pixels: Integer = Field(default=262144, ge=32 * 32)
    """Pixels that a zoomed crop is enlarged to at least. Default: 262144 (as Qwen-Agent)."""
    search: Annotated[str | dict[str, str], PlainValidator(_search)] = "local"
    """What `search` asks: local (the corpus), tavily, serper, {searxng: URL}, or {url: TEMPLATE} with {query} in it, as
    in axpo/tools/providers.py. Keys come from the environment. Default: local."""
    corpus: Source = None
    """Documents for local search: .jsonl or .parquet with `title` and `text`, or "miniature". Default: none."""
    embedder: AbsolutePath | None = None
    """Folder of a sentence-transformers checkpoint whose ranking is merged with BM25's. Default: none, BM25 alone."""
    search_results: Integer = Field(default=3, ge=1)
    """Documents that one search returns. Default: 3."""
    search_tokens: Integer = Field(default=2048, ge=16)
    """Tokens that the documents of one search are cut to. Default: 2048."""
    search_rate: Real = Field(default=5.0, gt=0)
    """Requests a second to a provider of search, of all rollouts and processes together. Default: 5."""
    image_search: Annotated[dict[str, str] | None, PlainValidator(_image_search)] = None
    """What `image_search` asks: {url: URL}, {serper: URL to upload images to}, or {table: FILE.jsonl} of hits found
    before, as in axpo/tools/image_providers.py. Default: none."""
    cache: AbsolutePath = Field(default_factory=_default_cache)
    """Folder that keeps what providers have answered, and the corpus's index. Default: axpo in the user's cache."""

    @model_validator(mode="before")
    @classmethod
    def _of_names(cls, data: Any) -> Any:
        return {"names": data} if isinstance(data, list) else data


class RolloutConfig(Section):
    """How the rollouts of a training step are drawn."""

    questions: Integer = Field(default=16, ge=1)
    """Questions a step (B). Default: 16."""
    rollouts: Integer = Field(default=8, ge=1)
    """Rollouts of each question (N), at least 2. Default: 8 (AXPO, section 5)."""
    max_turns: Integer = Field(default=3, ge=0)
    """Turns that may call a tool; one more is left for the answer. Default: 3 (AXPO, section 5)."""
    max_tokens: Integer = Field(default=2048, ge=1)
    """Tokens of one turn. Default: 2048."""
    max_context: Integer = Field(default=16384, ge=2)
    """Tokens of a whole rollout, its prompt included; no trajectory of data.sft may have more. Default: 16384."""
    max_images: Integer = Field(default=8, ge=0)
    """Images of a whole rollout, those of its prompt included. Default: 8."""
    temperature: Real = Field(default=1.0, gt=0)
    """Sampling temperature. Default: 1 (Qwen3-VL)."""
    top_p: Real = Field(default=1.0, gt=0, le=1)
    """Share of the probability mass that is sampled from. Default: 1, all of it."""
    top_k: Integer = Field(default=0, ge=0)
    """Number of most likely tokens that are sampled from. Default: 0, all of them."""


class MethodConfig(Section):
    """Where to fork, how to credit, which loss (arXiv 2605.28774, sections 3 and 6). `axpo methods` lists the methods
    and which of these options each one takes."""

    name: Literal["grpo", "axpo", "tool_bonus", "tool_penalty", "cispo", "arpo", "rltf"] = "axpo"
    """The method; `method: NAME` says the same. Default: axpo."""
    num_rollouts: str = Field(default="1x", pattern="^[1-9]x$")
    """Multiplies rollout.rollouts: with 2x GRPO gets twice the rollouts (paper's control of compute). Default: 1x."""
    deviation: Literal["sample", "population", "none"] = "sample"
    """What a group's advantages are divided by: its standard deviation over n-1 (as verl) or over n, or nothing (the
    advantage of Dr. GRPO, not its loss). Default: sample."""
    aggregation: Literal["seq-mean", "token-mean"] = "seq-mean"
    """Mean over each sequence and then over B·N (paper), or over all tokens. Default: seq-mean; cispo token-mean."""
    clip_low: Real = Field(default=0.2, ge=0, le=1)
    """How far the probability ratio counts below 1. Default: 0.2 (paper); cispo 1, no bound."""
    clip_high: Real = Field(default=0.4, ge=0)
    """How far the probability ratio counts above 1. Default: 0.4 (paper)."""
    kl: Real = Field(default=1e-3, ge=0)
    """Weight of the KL divergence to the policy that training starts from. Default: 1e-3 (paper); cispo 0."""
    threshold: Real = Field(default=0.5, gt=0, le=1)
    """A rollout is right from this reward on; rewards lie in 0..1 (the rules of axpo.rewards give 0 or 1, a scorer of
    your own may give more). Default: 0.5."""
    dynamic_sampling: Integer = Field(default=0, ge=0)
    """Groups of one outcome are left out, and up to so many a step replaced by other questions (DAPO, arXiv
    2503.14476). Default: 0, all groups are kept."""
    budget: Real = Field(default=0.25, ge=0)
    """Extra rollouts a step, as a share (r) of the B·N rollouts. Default: 0.25 (paper)."""
    continuations: Integer = Field(default=4, ge=2)
    """Continuations of one prefix (K). Default: 4 (paper)."""
    adaptive_budget: Real = Field(default=0.0, ge=0)
    """Above 0: a prefix whose first two continuations make the same call gets no more of them, others get what that
    saves, and what a step leaves over is kept, up to so many steps' budgets. Default: 0, a fixed budget (paper)."""
    prefix_fix: bool = True
    """false: continuations start from the prompt instead of the prefix (ablation). Default: true."""
    resample_no_tool: bool = False
    """true: all-wrong rollouts without a tool are resampled too, from the end of their thinking (ablation).
    Default: false."""
    rank: Literal["confidence", "random", "entropy"] = "confidence"
    """Who is resampled first: least confidence in the call's tokens (paper), anybody (ablation), or the greatest mean
    entropy of the distributions that they were drawn from. Default: confidence."""
    prefix_credit: bool = True
    """false: the source keeps the advantage of its own reward, on prefix and failed end (ablation). Default: true."""
    separate_groups: bool = True
    """false: continuations are normalised together with the rollouts of their question (ablation). Default: true."""
    fork_at: Literal["first", "last", "most_uncertain", "every"] = "first"
    """Which of a rollout's calls, the first of each turn, may be forked. Default: first (paper)."""
    tool_reward: Real = Field(default=0.2, ge=0)
    """What tool_bonus adds to the reward of a rollout that uses a tool, and tool_penalty takes away. Default: 0.2."""
    arpo_rule: Literal["published", "code"] = "published"
    """published: branch where the entropy right after an observation has risen; code: as the authors' program, by the
    entropy of the segment before it and a random number. Default: published."""
    arpo_weight: Real = Field(default=0.2, ge=0)
    """How much a rise of entropy counts; published: only beside an arpo_chance that is not 0.5. Default: 0.2 (ARPO's
    code)."""
    arpo_chance: Real = Field(default=0.5, ge=0, le=1)
    """published: branch where 0.5 + weight·rise is above it; code: the chance without a rise. Default: 0.5."""

    @model_validator(mode="before")
    @classmethod
    def _of_name(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"name": data}
        if isinstance(data, dict) and isinstance(data.get("name"), str):
            return {**METHOD_DEFAULTS.get(data["name"], {}), **data}
        return data


class JudgeConfig(Section):
    """A model behind an OpenAI-compatible endpoint that criticises answers (for rltf)."""

    url: str | None = None
    """What `/chat/completions` is appended to, such as http://localhost:8000/v1. Default: none, the verifier does."""
    model: str = ""
    """The model's name at that endpoint. Default: none, it must be given with the URL."""
    key: str = ""
    """The environment variable that holds the key. Default: none is sent."""


class TrainConfig(Section):
    """Optimisation by reinforcement learning."""

    steps: Integer = Field(default=200, ge=0)
    """Training steps. Default: 200."""
    learning_rate: Real = Field(default=1e-6, gt=0)
    """AdamW's learning rate after the warm-up. Default: 1e-6 (usual for full fine-tuning)."""
    warmup_steps: Integer = Field(default=10, ge=0)
    """Optimizer steps over which the learning rate rises from 0. Default: 10."""
    weight_decay: Real = Field(default=0.0, ge=0)
    """AdamW's weight decay. Default: 0."""
    grad_clip: Real = Field(default=1.0, gt=0)
    """Largest norm of the gradient. Default: 1."""
    minibatches: Integer = Field(default=1, ge=1)
    """Optimizer steps a training step; its questions are divided among them. Default: 1, on-policy."""
    pack_tokens: Integer = Field(default=16384, ge=1)
    """Tokens of one packed forward, which a longer rollout passes alone. A larger tree is cut between rollouts, and
    what leads to each part is computed again. Default: 16384."""
    gradient_checkpointing: bool = False
    """Keep only what goes into each layer and compute it again for the gradient: less memory, a third more time.
    Default: false."""
    autocast: bool = False
    """Compute the updates' forward and backward in bfloat16 over float32 weights. Default: false."""
    vision: bool = True
    """false: the vision tower, with what maps its output into the language model, stays as it is. Default: true."""
    importance_cap: Real | None = Field(default=None, gt=0)
    """Truncated importance sampling: a token's share in the loss, its KL term aside, is weighted by the probability
    that the trainer gives it before the update over the one that the engine sampled it with, at most so much (Yao et
    al. 2025; verl and TRL take 2). Then old_logprobs: auto computes anew. Default: none given, no weights."""
    old_logprobs: Literal["auto", "recompute"] = "auto"
    """Log-probs that the probability ratio compares with: auto takes those of sampling where they are exact (top_p 1,
    top_k 0, float32, no autocast) and else computes them anew before the update, recompute always. Default: auto."""
    save_every: Integer = Field(default=50, ge=0)
    """Training steps between checkpoints; 0 saves only at the end. Default: 50."""
    save_images: bool = True
    """false: rollouts are kept in trees/ without the bytes of their images, which take most of the space.
    Default: true."""


class SftConfig(Section):
    """Supervised fine-tuning on trajectories."""

    steps: Integer = Field(default=1000, ge=0)
    """Optimizer steps. Default: 1000."""
    batch: Integer = Field(default=64, ge=1)
    """Questions a step, with all their trajectories (those of a file are one each). Default: 64."""
    learning_rate: Real = Field(default=1e-5, gt=0)
    """AdamW's learning rate after the warm-up; from there it falls linearly to 0. Default: 1e-5 (usual)."""
    warmup_steps: Integer = Field(default=50, ge=0)
    """Optimizer steps over which the learning rate rises from 0. Default: 50."""
    save_every: Integer = Field(default=100, ge=0)
    """Optimizer steps between checkpoints, each in place of the one before; 0 saves only at the end. Default: 100."""


class EvalConfig(Section):
    """Evaluation on held-out questions."""

    every: Integer = Field(default=0, ge=0)
    """Training steps between evaluations. Default: 0, only at the end."""
    tools: list[Tool] = []
    """What evaluation offers besides tools.names: the place of `image_search`, which the paper's policies do not train
    with. Default: none."""
    questions: Integer = Field(default=0, ge=0)
    """Questions to evaluate on. Default: 0, all of them."""
    samples: Integer = Field(default=4, ge=1)
    """Rollouts of each question, for Pass@1 and Pass@samples. Default: 4 (paper)."""
    temperature: Real = Field(default=1.0, ge=0)
    """Sampling temperature, 0 for the likeliest token. Default: 1 (Qwen3-VL)."""
    top_p: Real = Field(default=0.95, gt=0, le=1)
    """Share of the probability mass that is sampled from. Default: 0.95 (Qwen3-VL)."""
    top_k: Integer = Field(default=20, ge=0)
    """Number of most likely tokens that are sampled from; 0: all. Default: 20 (Qwen3-VL)."""


class EngineConfig(Section):
    """What generates the rollouts."""

    name: Literal["local", "vllm"] = "local"
    """local: the embedded engine, which generates with the trained model itself; vllm: vLLM, see `vllm`.
    Default: local."""
    max_batch: Integer = Field(default=64, ge=1)
    """Rollouts that generate at the same time; vLLM's servers decide that themselves. Default: 64."""
    overlap: Integer = Field(default=16, ge=0)
    """Local only: decoding steps that go on while a tool runs; then all wait for it, so that a seed repeats a run.
    Default: 16."""
    kv_memory: Real = Field(default=2.0, gt=0)
    """GiB for keys and values of the local engine, and of vLLM on a CPU. Over it, what was used longest ago is dropped
    and computed again. Default: 2."""


class AlarmsConfig(Section):
    """What a training run warns of. An alarm is shown when it begins, and is in metrics.jsonl as long as it lasts."""

    steps: Integer = Field(default=20, ge=7)
    """Training steps (n) that tool use and groups of one outcome are watched over. Default: 20; fewer than 7 show no
    trend."""
    tool_use: Real = Field(default=0.05, ge=0, le=1)
    """Least share of the rollouts of n steps that use a tool. Default: 0.05, where two of three groups of 8
    hold no call; 0: no alarm."""
    tool_use_fall: Real = Field(default=0.1, ge=0, le=1)
    """How much of itself tool use may lose from the first half of n steps to the second, where it falls beyond what
    chance explains. Default: 0.1; 1: no alarm."""
    void: Real = Field(default=0.25, ge=0, le=1)
    """Greatest share of the rollouts of one step that are void. Default: 0.25; 1: no alarm."""
    one_outcome: Real = Field(default=0.9, ge=0, le=1)
    """Greatest share of the groups of n steps in which all rollouts have the same reward. Default: 0.9; 1: no alarm."""
    mismatch: Real = Field(default=0.05, ge=0)
    """Greatest mean difference, over the tokens of a step, of the log-probs of sampling and of training at the same
    weights, in nats. Default: 0.05; 0: no alarm."""
    stop: bool = False
    """true: the first alarm ends the run, after its checkpoint is saved. Default: false."""
