"""Every option of a run: its meaning, unit, default and source.

A config is a YAML file plus overrides such as `train.learning_rate=1e-5`. A relative path in the file is relative to
the file; in an override, to the current folder. Everything is checked before a model is loaded.
"""

import os
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from axpo.config_errors import describe

MINIATURE = "miniature"
BUILT_IN_TOOLS = ("zoom", "python", "search")


class ConfigError(ValueError):
    """A config that cannot be used: one line for each problem, naming the key, what was given and what is allowed."""


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))


Integer = Annotated[int, BeforeValidator(_not_bool)]
Real = Annotated[float, BeforeValidator(_not_bool)]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Source = Literal["miniature"] | AbsolutePath | None


def _tool(name: str) -> str:
    if name.endswith(".py"):
        return str(_absolute(Path(name)))
    if name not in BUILT_IN_TOOLS:
        raise ValueError(f"must be one of {', '.join(BUILT_IN_TOOLS)}, or a Python file (.py)")
    return name


def _checkpoint(name: str) -> str:
    return str(_absolute(Path(name))) if name != MINIATURE and Path(name).expanduser().is_dir() else name


def _device(name: str) -> str:
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError("must be cpu, mps, cuda or cuda:INDEX")
    return name


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_section(cls, data: Any) -> Any:
        return {} if data is None else data  # "train:" with all its keys commented out


class DataConfig(_Section):
    """Questions and trajectories: a .jsonl or .parquet file, or "miniature" for the embedded world."""

    train: Source = None
    """Questions to train on by reinforcement learning. Default: none."""
    eval: Source = None
    """Held-out questions. Default: none, and nothing is evaluated."""
    sft: Source = None
    """Trajectories for supervised fine-tuning. Default: none."""


class ToolsConfig(_Section):
    """What the policy may call."""

    names: list[Annotated[str, AfterValidator(_tool)]] = []
    """"zoom", "python", "search", or a Python file whose functions are tools. Default: none."""
    corpus: Source = None
    """Documents for `search`: .jsonl or .parquet with `title` and `text`, or "miniature". Default: none."""
    timeout: Real = Field(default=30.0, gt=0)
    """Seconds a call may take. Default: 30 (as Qwen-Agent)."""
    zoom_pixels: Integer = Field(default=262144, ge=32 * 32)
    """Pixels that a zoomed crop is enlarged to at least. Default: 262144 (as Qwen-Agent)."""
    search_results: Integer = Field(default=3, ge=1)
    """Documents that one search returns. Default: 3."""


class RolloutConfig(_Section):
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
    """Tokens of a whole rollout, its prompt included. Default: 16384."""
    max_images: Integer = Field(default=8, ge=0)
    """Images of a whole rollout, those of its prompt included. Default: 8."""
    temperature: Real = Field(default=1.0, gt=0)
    """Sampling temperature. Default: 1 (Qwen3-VL)."""
    top_p: Real = Field(default=1.0, gt=0, le=1)
    """Share of the probability mass that is sampled from. Default: 1, all of it."""
    top_k: Integer = Field(default=0, ge=0)
    """Number of most likely tokens that are sampled from. Default: 0, all of them."""


class MethodConfig(_Section):
    """Where to fork, how to credit, which loss (arXiv 2605.28774, section 3)."""

    name: Literal["grpo", "axpo"] = "axpo"
    """The method. Default: axpo."""
    budget: Real = Field(default=0.25, ge=0)
    """Extra rollouts a step, as a share (r) of the B·N rollouts. Default: 0.25 (paper)."""
    continuations: Integer = Field(default=4, ge=2)
    """Continuations of one prefix (K). Default: 4 (paper)."""
    deviation: Literal["sample", "population"] = "sample"
    """Standard deviation of a group: over n-1 or over n. Default: sample (as verl)."""
    aggregation: Literal["seq-mean", "token-mean"] = "seq-mean"
    """Mean over each sequence and then over B·N (paper), or over all tokens. Default: seq-mean."""
    clip_low: Real = Field(default=0.2, ge=0, lt=1)
    """How far the probability ratio counts below 1. Default: 0.2 (paper)."""
    clip_high: Real = Field(default=0.4, ge=0)
    """How far the probability ratio counts above 1. Default: 0.4 (paper)."""
    kl: Real = Field(default=1e-3, ge=0)
    """Weight of the KL divergence to the policy that training starts from. Default: 1e-3 (paper)."""


class TrainConfig(_Section):
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
    """Tokens of one packed forward; a larger tree is packed alone. Default: 16384."""
    gradient_checkpointing: bool = False
    """Keep only what goes into each layer and compute it again for the gradient: less memory, a third more time.
    Default: false."""
    autocast: bool = False
    """Compute the updates' forward and backward in bfloat16 over float32 weights. Default: false."""
    old_logprobs: Literal["auto", "recompute"] = "auto"
    """Log-probs that the probability ratio compares with: auto takes those of sampling where they are exact (top_p 1,
    top_k 0, float32, no autocast) and else computes them anew before the update, recompute always. Default: auto."""
    save_every: Integer = Field(default=50, ge=0)
    """Training steps between checkpoints; 0 saves only at the end. Default: 50."""


class SftConfig(_Section):
    """Supervised fine-tuning on trajectories."""

    steps: Integer = Field(default=1000, ge=0)
    """Optimizer steps. Default: 1000."""
    batch: Integer = Field(default=64, ge=1)
    """Questions a step, with all their trajectories (those of a file are one each). Default: 64."""
    learning_rate: Real = Field(default=1e-5, gt=0)
    """AdamW's learning rate after the warm-up; from there it falls linearly to 0. Default: 1e-5 (usual)."""
    warmup_steps: Integer = Field(default=50, ge=0)
    """Optimizer steps over which the learning rate rises from 0. Default: 50."""


class EvalConfig(_Section):
    """Evaluation on held-out questions."""

    every: Integer = Field(default=0, ge=0)
    """Training steps between evaluations. Default: 0, only at the end."""
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


class EngineConfig(_Section):
    """The embedded engine, which generates with the trained model itself."""

    max_batch: Integer = Field(default=64, ge=1)
    """Rollouts that generate at the same time. Default: 64."""
    overlap: Integer = Field(default=16, ge=0)
    """Decoding steps that go on while a tool runs; then all wait for it, so that a seed repeats a run. Default: 16."""
    kv_memory: Real = Field(default=2.0, gt=0)
    """GiB for keys and values. Over it, what was used longest ago is dropped and computed again. Default: 2."""


class Config(_Section):
    """A whole run."""

    model: Annotated[str, AfterValidator(_checkpoint)] = MINIATURE
    """"miniature", or the folder of a checkpoint that `from_pretrained` opens. Default: miniature."""
    output: AbsolutePath = Path("runs/axpo")
    """The run folder. Default: runs/axpo in the current folder."""
    seed: Integer = Field(default=0, ge=0)
    """Decides every random number of the run. Default: 0."""
    threads: Integer | None = Field(default=None, ge=1)
    """Threads of one torch operation. Default: none given, one a core."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and computation. Default: float32."""
    device: Annotated[str, AfterValidator(_device)] = "cpu"
    """cpu, mps, cuda or cuda:INDEX. Default: cpu."""
    max_pixels: Integer | None = Field(default=None, ge=32 * 32)
    """Pixels to which an image is scaled down for the model. Default: none given, the model's own."""
    data: DataConfig = DataConfig()
    tools: ToolsConfig = ToolsConfig()
    rollout: RolloutConfig = RolloutConfig()
    method: MethodConfig = MethodConfig()
    train: TrainConfig = TrainConfig()
    sft: SftConfig = SftConfig()
    eval: EvalConfig = EvalConfig()
    engine: EngineConfig = EngineConfig()

    model_config = ConfigDict(validate_default=True)

    @property
    def sampling_is_exact(self) -> bool:
        """Whether the log-probs of sampling are those of the whole distribution, and rounded as the update's are."""
        whole = self.rollout.top_p == 1 and self.rollout.top_k == 0
        return whole and self.dtype == "float32" and not self.train.autocast

    @model_validator(mode="after")
    def _check_together(self) -> "Config":
        problems = [*_group_problems(self), *_other_problems(self)]
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _group_problems(config: Config) -> list[str]:
    questions, rollouts = config.rollout.questions, config.rollout.rollouts
    needed, budget = config.method.continuations, config.method.budget
    problems = []
    if rollouts < 2:
        problems.append(
            f"rollout.rollouts: got {rollouts}, must be at least 2: "
            "an advantage compares a rollout with the others of its group, and a group of size 1 has none"
        )
    extra = Fraction(str(budget)) * questions * rollouts
    if config.method.name == "axpo" and int(extra) < needed:
        smallest = Fraction(needed, questions * rollouts)
        problems.append(
            f"method.budget: got {budget:g}, so nothing can ever be resampled: "
            f"r·B·N = {budget:g}·{questions}·{rollouts} = {float(extra):g} extra rollouts a step "
            f"< method.continuations = {needed}; the smallest budget that works is {_round_up(smallest)}"
        )
    if questions % config.train.minibatches:
        problems.append(
            f"train.minibatches: got {config.train.minibatches}, must divide rollout.questions = {questions} evenly"
        )
    return problems


def _round_up(value: Fraction) -> str:
    """The fraction with as many decimals as it takes (at most six), never less than it is."""
    for decimals in range(7):
        scaled = -(-value.numerator * 10**decimals // value.denominator)
        if scaled * value.denominator == value.numerator * 10**decimals:
            break
    return f"{scaled / 10**decimals:.{decimals}f}"


def _other_problems(config: Config) -> list[str]:
    problems = []
    if config.rollout.max_tokens > config.rollout.max_context:
        problems.append(
            f"rollout.max_tokens: got {config.rollout.max_tokens}, "
            f"must be at most rollout.max_context = {config.rollout.max_context}"
        )
    if "search" in config.tools.names and config.tools.corpus is None:
        problems.append(
            "tools.corpus: got nothing, but tools.names has 'search', "
            "which needs a .jsonl or .parquet file of documents, or 'miniature'"
        )
    if config.train.autocast and config.dtype != "float32":
        problems.append(
            f"train.autocast: got true, but with dtype = {config.dtype} all is computed in it; must be false"
        )
    for folder in (config.output, *config.output.parents):
        if folder.is_file():
            problems.append(f"output: got {config.output}, but {folder} is a file; must be a folder, or not exist yet")
    return problems


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file (or the defaults) with overrides `section.key=VALUE`, VALUE being YAML.

    Raises ConfigError with one line for each problem.
    """
    data: dict[str, Any] = {}
    if path is not None:
        data = _read(path)
        _resolve_paths(data, Path(os.path.abspath(path)).parent)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"override {override!r}: must be KEY=VALUE, such as train.learning_rate=1e-5")
        nested: Any = _parse(text, f"override {override!r}")
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        data = _merged(data, nested)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(describe(error, Config))) from error


def save_config(config: Config, path: Path) -> None:
    """Write the config with every key and absolute paths, as YAML that `load_config` reads back equal."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), "utf-8")


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses a key given twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: {'is not a file' if path.exists() else 'no such file'}; must be a YAML file")
    data = _parse(path.read_bytes(), str(path))
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{path}: must hold keys and values, such as 'seed: 0'")
    return data


def _parse(text: str | bytes, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from error


def _resolve_paths(data: dict[str, Any], folder: Path) -> None:
    """Make the relative paths of a YAML file relative to that file. What is of a wrong type is left for the check."""

    def resolve(value: Any) -> Any:
        if not isinstance(value, str) or value == MINIATURE:
            return value
        return str(folder / Path(value).expanduser())

    if isinstance(data.get("model"), str) and (folder / data["model"]).expanduser().is_dir():
        data["model"] = resolve(data["model"])
    if "output" in data:
        data["output"] = resolve(data["output"])
    sources, tools = data.get("data"), data.get("tools")
    if isinstance(sources, dict):
        sources.update({key: resolve(value) for key, value in sources.items()})
    if isinstance(tools, dict):
        if "corpus" in tools:
            tools["corpus"] = resolve(tools["corpus"])
        if isinstance(tools.get("names"), list):
            tools["names"] = [resolve(n) if isinstance(n, str) and n.endswith(".py") else n for n in tools["names"]]


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in extra.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result
