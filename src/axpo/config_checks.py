"""What options must be together: one line for each problem, naming the key, what was given and what is allowed."""

import os
from fractions import Fraction
from typing import TYPE_CHECKING

from axpo.methods import COMMON, IGNORED_BY_OTHERS, METHODS, needs_entropy
from axpo.options_size import VLLM_TEMPERATURES

if TYPE_CHECKING:
    from axpo.config import Config


def problems(config: "Config") -> list[str]:
    """All that does not fit together in a config whose every option is right by itself."""
    return [
        *_method_problems(config),
        *_group_problems(config),
        *_engine_problems(config),
        *_parallel_problems(config),
        *_other_problems(config),
    ]


def _method_problems(config: "Config") -> list[str]:
    chosen, options = METHODS[config.method.name], config.method
    found = []
    for key in sorted(options.model_fields_set - {"name", *COMMON, *IGNORED_BY_OTHERS, *chosen.options}):
        default = type(options).model_fields[key].default
        if getattr(options, key) != default:
            takers = ", ".join(method.name for method in METHODS.values() if key in method.options)
            found.append(
                f"method.{key}: got {getattr(options, key)!r}, but that is an option of {takers}, "
                f"not of {chosen.name}; must be left out or {default!r}"
            )
    return [*found, *_judge_problems(config)]


def _judge_problems(config: "Config") -> list[str]:
    judge = config.judge
    if judge.url is None:
        return []
    found = []
    if config.method.name != "rltf":
        found.append(f"judge.url: got {judge.url!r}, but only method=rltf asks a judge; must be left out")
    if not judge.url.startswith(("http://", "https://")):
        found.append(f"judge.url: got {judge.url!r}, must begin with http:// or https://")
    if not judge.model:
        found.append("judge.model: got nothing, but judge.url is given; must be the model's name there")
    if judge.key and judge.key not in os.environ:
        found.append(f"judge.key: got {judge.key!r}, but no such environment variable is set")
    return found


def _group_problems(config: "Config") -> list[str]:
    questions, rollouts = config.rollout.questions, config.group_size
    needed, budget = config.method.continuations, config.method.budget
    problems = []
    if config.rollout.rollouts < 2:
        problems.append(
            f"rollout.rollouts: got {config.rollout.rollouts}, must be at least 2: "
            "an advantage compares a rollout with the others of its group, and a group of size 1 has none"
        )
    extra = Fraction(str(budget)) * questions * rollouts
    kept = Fraction(str(config.method.adaptive_budget))
    if config.method.name == "axpo" and int(extra) * (1 + kept) < needed:
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


def _engine_problems(config: "Config") -> list[str]:
    servers = config.vllm.servers
    if config.engine.name != "vllm":
        if servers:
            return [f"vllm.servers: got {servers}, but engine.name is {config.engine.name!r}; must be left out"]
        return []
    found = []
    if needs_entropy(config.method):
        key, value = ("name", config.method.name) if config.method.name == "arpo" else ("rank", config.method.rank)
        found.append(
            f"method.{key}: got {value!r}, which needs entropies, but vLLM gives none; needs engine.name=local"
        )
    for key, temperature in (
        ("rollout.temperature", config.rollout.temperature),
        ("eval.temperature", config.eval.temperature),
    ):
        least, most = VLLM_TEMPERATURES
        if temperature and not least <= temperature <= most:
            found.append(f"{key}: got {temperature:g}, but vLLM samples at temperatures from {least} to {most:g}")
    found += [
        f"vllm.servers: got {url!r}, must begin with http:// or https://"
        for url in servers
        if not url.startswith(("http://", "https://"))
    ]
    if config.device == "mps" or (config.device.startswith("cuda:") and not servers):
        found.append(
            f"device: got {config.device!r}, but vLLM runs on the first GPU that it sees, or the CPU; "
            "must be cuda or cpu (CUDA_VISIBLE_DEVICES chooses the GPU)"
        )
    return found


def _round_up(value: Fraction) -> str:
    """The fraction with as many decimals as it takes (at most six), never less than it is."""
    for decimals in range(7):
        scaled = -(-value.numerator * 10**decimals // value.denominator)
        if scaled * value.denominator == value.numerator * 10**decimals:
            break
    return f"{scaled / 10**decimals:.{decimals}f}"


def _parallel_problems(config: "Config") -> list[str]:
    parallel, found = config.parallel, []
    for key, data, most in (
        ("rollout.questions", config.data.train, config.rollout.questions),
        ("sft.batch", config.data.sft, config.sft.batch),
    ):
        if data is not None and parallel.processes > most:
            found.append(
                f"parallel.processes: got {parallel.processes}, must be at most {key} = {most}: "
                "each process has its own share of them"
            )
    if parallel.processes > 1:
        for key in ("adaptive_budget", "dynamic_sampling"):
            if given := getattr(config.method, key):
                found.append(
                    f"method.{key}: got {given:g}, but with parallel.processes = {parallel.processes} must be 0: "
                    "what one group's rollouts decide for others is decided in one process only"
                )
        if config.device not in ("cpu", "cuda"):
            found.append(
                f"device: got {config.device!r}, but with parallel.processes = {parallel.processes} must be cuda, "
                "of which each process takes one, or cpu"
            )
    elif parallel.sharding == "full":
        found.append("parallel.sharding: got 'full', but parallel.processes = 1 has nobody to share with; must be none")
    if parallel.offload and config.device == "cpu":
        found.append("parallel.offload: got true, but with device = cpu all is in the host's memory; must be false")
    if parallel.offload and parallel.sharding == "full":
        found.append(
            "parallel.offload: got true, but with parallel.sharding = full the optimizer is divided among the "
            "GPUs; must be false"
        )
    return found


def _other_problems(config: "Config") -> list[str]:
    problems = []
    if config.rollout.max_tokens > config.rollout.max_context:
        problems.append(
            f"rollout.max_tokens: got {config.rollout.max_tokens}, "
            f"must be at most rollout.max_context = {config.rollout.max_context}"
        )
    for key, names in (("tools.names", config.tools.names), ("eval.tools", config.eval.tools)):
        if "search" in names and config.tools.search == "local" and config.tools.corpus is None:
            problems.append(
                f"tools.corpus: got nothing, but {key} has 'search', "
                "which needs a .jsonl or .parquet file of documents, or 'miniature', unless tools.search says otherwise"
            )
        if "image_search" in names and config.tools.image_search is None:
            problems.append(
                f"tools.image_search: got nothing, but {key} has 'image_search'; "
                "must be {url: URL}, {serper: UPLOAD URL} or {table: FILE.jsonl}"
            )
    if config.train.autocast and config.dtype != "float32":
        problems.append(
            f"train.autocast: got true, but with dtype = {config.dtype} all is computed in it; must be false"
        )
    for folder in (config.output, *config.output.parents):
        if folder.is_file():
            problems.append(f"output: got {config.output}, but {folder} is a file; must be a folder, or not exist yet")
    return problems
