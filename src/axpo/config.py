"""Every option of a run: its meaning, unit, default and source.

A config is a YAML file plus overrides such as `train.learning_rate=1e-5`. A relative path in the file is relative to
the file; in an override, to the current folder. Everything is checked before a model is loaded.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, Field, ValidationError, model_validator

from axpo.config_checks import problems
from axpo.config_errors import describe
from axpo.options import (
    METHOD_DEFAULTS,
    MINIATURE,
    MINIATURE_SFT,
    AbsolutePath,
    AlarmsConfig,
    Checkpoint,
    DataConfig,
    Device,
    EngineConfig,
    EvalConfig,
    Integer,
    JudgeConfig,
    MethodConfig,
    RolloutConfig,
    Section,
    SftConfig,
    Source,
    ToolsConfig,
    TrainConfig,
    is_folder,
)
from axpo.options_size import LoraConfig, ParallelConfig, VllmConfig

__all__ = [
    "MINIATURE",
    "MINIATURE_SFT",
    "Config",
    "ConfigError",
    "Source",
    "load_config",
    "make_config",
    "read_yaml",
    "save_config",
]


class ConfigError(ValueError):
    """A config that cannot be used: one line for each problem, naming the key, what was given and what is allowed."""


class Config(Section):
    """A whole run."""

    model: Checkpoint = MINIATURE
    """"miniature", "miniature_sft" (the same after fine-tuning), or the folder of a checkpoint that `from_pretrained`
    opens. Default: miniature."""
    output: AbsolutePath = Path("runs/axpo")
    """The run folder. Default: runs/axpo in the current folder."""
    seed: Integer = Field(default=0, ge=0)
    """Decides every random number of the run. Default: 0."""
    threads: Integer | None = Field(default=None, ge=1)
    """Threads of one torch operation. Default: none given, one a core."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and computation. Default: float32."""
    device: Device = "cpu"
    """cpu, mps, cuda or cuda:INDEX. Default: cpu."""
    max_pixels: Integer | None = Field(default=None, ge=32 * 32)
    """Pixels to which an image is scaled down for the model. Default: none given, the model's own."""
    data: DataConfig = DataConfig()
    tools: ToolsConfig = ToolsConfig()
    rollout: RolloutConfig = RolloutConfig()
    method: MethodConfig = MethodConfig()
    judge: JudgeConfig = JudgeConfig()
    train: TrainConfig = TrainConfig()
    sft: SftConfig = SftConfig()
    eval: EvalConfig = EvalConfig()
    engine: EngineConfig = EngineConfig()
    vllm: VllmConfig = VllmConfig()
    parallel: ParallelConfig = ParallelConfig()
    lora: LoraConfig = LoraConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    preflight: bool = True
    """Check before anything is trained or measured that the model sees its images, that the template keeps prefixes,
    that engine and trainer agree, and that the tools answer. Default: true."""

    model_config = ConfigDict(validate_default=True)

    @property
    def group_size(self) -> int:
        """Rollouts of each question that are drawn before any is forked (N)."""
        return self.rollout.rollouts * int(self.method.num_rollouts.removesuffix("x"))

    @property
    def precision(self) -> Literal["float32", "bfloat16"]:
        """What updates, and vLLM, compute in."""
        return "bfloat16" if self.train.autocast else self.dtype

    @property
    def sampling_is_exact(self) -> bool:
        """Whether the log-probs of sampling are those of the whole distribution, and rounded as the update's are."""
        whole = self.rollout.top_p == 1 and self.rollout.top_k == 0 and self.engine.name == "local"
        return whole and self.precision == "float32"

    @model_validator(mode="after")
    def _check_together(self) -> "Config":
        if found := problems(self):
            raise ValueError("\n".join(found))
        return self


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file (or the defaults) with overrides `section.key=VALUE`, VALUE being YAML.

    Raises ConfigError with one line for each problem.
    """
    if path is None:
        return make_config({}, Path(), overrides)
    return make_config(read_yaml(path), Path(os.path.abspath(path)).parent, overrides)


def make_config(given: Mapping[str, Any], folder: Path, overrides: Sequence[str] = ()) -> Config:
    """As `load_config`, of what a YAML file in this folder would hold."""
    data = keys_of_file(given, folder)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"override {override!r}: must be KEY=VALUE, such as train.learning_rate=1e-5")
        nested: Any = _parse(text, f"override {override!r}")
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        nested = _spelled_out(nested)
        data = _merged(_without_defaults_of_method(data, nested), nested)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(describe(error, Config))) from error


def keys_of_file(given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a YAML file in this folder holds, short forms spelled out and its relative paths made absolute."""
    data = _spelled_out(copy.deepcopy(dict(given)))
    _resolve_paths(data, folder)
    return data


def save_config(config: Config, path: Path) -> None:
    """Write the config with every key and absolute paths, as YAML that `load_config` reads back equal."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), "utf-8")
    beside.replace(path)


def _spelled_out(data: dict[str, Any]) -> dict[str, Any]:
    """`method: NAME` as `method: {name: NAME}`, and `tools: [NAME]` as `tools: {names: [NAME]}`, to be merged."""
    found = dict(data)
    if isinstance(data.get("method"), str):
        found["method"] = {"name": data["method"]}
    if isinstance(data.get("tools"), list):
        found["tools"] = {"names": data["tools"]}
    return found


def _without_defaults_of_method(data: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """The data without what its method alone sets by default, where an override names another method: a saved config
    spells all keys out."""
    old, new = data.get("method"), override.get("method")
    if not isinstance(old, dict) or not isinstance(new, dict) or new.get("name") in (None, old.get("name")):
        return data
    names = (old.get("name", MethodConfig().name), new["name"])
    special = {key for name in names for key in METHOD_DEFAULTS.get(str(name), {})}
    defaults = MethodConfig().model_dump() | METHOD_DEFAULTS.get(str(names[0]), {})
    return {**data, "method": {k: v for k, v in old.items() if k not in special or v != defaults[k]}}


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


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises ConfigError for a file that holds anything else, or a key twice."""
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
        return str(folder / os.path.expanduser(value))  # which leaves the homes of unknown users

    if isinstance(model := data.get("model"), str):
        if is_folder(model, folder):
            data["model"] = resolve(model)
        elif is_folder(model):
            raise ConfigError(
                f"model: got {model!r}, a folder here but not in {folder}; a path in a file is relative to that file"
            )
    if "output" in data:
        data["output"] = resolve(data["output"])
    sources, tools = data.get("data"), data.get("tools")
    if isinstance(sources, dict):
        sources.update({key: resolve(value) for key, value in sources.items()})
    if isinstance(tools, dict):
        tools.update({key: resolve(tools[key]) for key in ("corpus", "embedder", "cache") if key in tools})
        if isinstance(tools.get("image_search"), dict) and "table" in tools["image_search"]:
            tools["image_search"] = {**tools["image_search"], "table": resolve(tools["image_search"]["table"])}
    for section, key in ((tools, "names"), (data.get("eval"), "tools")):
        if isinstance(section, dict) and isinstance(section.get(key), list):
            section[key] = [resolve(n) if isinstance(n, str) and n.endswith(".py") else n for n in section[key]]


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Both, section by section; what is a mapping within a section is one value."""
    result = dict(base)
    for key, value in extra.items():
        old = result.get(key)
        result[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return result
