"""From a config to the parts of a run. What can be wrong is found before any weights are loaded."""

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from transformers import AutoConfig, PreTrainedModel

from axpo.adapters import add_adapters
from axpo.agent import Agent, Limits
from axpo.chat import Chat
from axpo.config import MINIATURE, MINIATURE_SFT, Config, ConfigError, Source
from axpo.engines.base import Engine, EngineError, Sampling
from axpo.engines.local import LocalEngine
from axpo.engines.vllm import VllmEngine
from axpo.engines.vllm_server_check import server_problem
from axpo.engines.vllm_servers import VllmServers
from axpo.engines.vllm_start import refusal, start_vllm, vllm_problem
from axpo.methods import needs_entropy
from axpo.miniature import base
from axpo.miniature.world import corpus, sample_problems
from axpo.parallel import ALONE, RankError, Ranks
from axpo.policy import freeze_vision, load_policy
from axpo.questions import Question, Trajectory, load_questions, load_trajectories
from axpo.rewards.critique import critic
from axpo.tools.base import Toolbox
from axpo.tools.built_in import Documents, built_in, undone
from axpo.tools.loading import load_tools

MINIATURE_QUESTIONS = 900
MINIATURE_HELD_OUT = 300
HELD_OUT_SEED = 1  # the questions of seed 0 were looked at while the miniature was made


@dataclass(frozen=True)
class Data:
    """What the commands need of the config's data; None for what is not given."""

    train: list[Question] | None
    eval: list[Question] | None


def load_data(config: Config) -> Data:
    """Read the questions. Raises DataError, and ConfigError for an evaluation of more questions than there are."""
    held_out = _questions(config.data.eval, True, config.seed)
    if held_out is not None and config.eval.questions > len(held_out):
        raise ConfigError(f"eval.questions: got {config.eval.questions}, but data.eval holds {len(held_out)}")
    if held_out is not None and config.eval.questions:
        held_out = held_out[: config.eval.questions]
    return Data(_questions(config.data.train, False, config.seed), held_out)


def load_probes(config: Config, most: int) -> list[Question]:
    """At most so many questions (0: all) of data.train to diagnose a policy with. Raises DataError.

    Those of the miniature are like the ones that it trains on, but apart from them.
    """
    if not isinstance(config.data.train, Path):
        count = most or MINIATURE_QUESTIONS
        return [problem.question for problem in sample_problems(count, config.seed, "tuning")]
    questions = load_questions(config.data.train)
    return questions[:most] if most else questions


def load_sft_data(config: Config) -> list[Trajectory]:
    """Read the trajectories. Raises ConfigError where there are none to read, DataError for a file that is wrong."""
    if not isinstance(config.data.sft, Path):
        raise ConfigError("data.sft: must be a .jsonl or .parquet file of trajectories")
    return load_trajectories(config.data.sft)


def _questions(source: Source, held_out: bool, seed: int) -> list[Question] | None:
    if source is None:
        return None
    if isinstance(source, Path):
        return load_questions(source)
    if held_out:  # the same ones whatever the seed, so that runs can be compared
        return [problem.question for problem in sample_problems(MINIATURE_HELD_OUT, HELD_OUT_SEED, "held_out")]
    return [problem.question for problem in sample_problems(MINIATURE_QUESTIONS, seed)]


def model_path(config: Config) -> str | Path:
    """Where the config's model lies. Raises ConfigError for a path where no folder is."""
    if config.model in (MINIATURE, MINIATURE_SFT):
        return base.BASE if config.model == MINIATURE else base.SFT
    if os.path.isabs(config.model) and not os.path.isdir(config.model):
        raise ConfigError(
            f"model: got {config.model!r}, but there is no such folder; a run's checkpoint is there once axpo sft or "
            "axpo train has written it"
        )
    return config.model


def load_chat(config: Config) -> Chat:
    """Raises ChatError for a model that is no checkpoint, or has no template that knows tools."""
    return Chat.from_pretrained(model_path(config), config.max_pixels)


def load_toolbox(config: Config, chat: Chat, described: bool = False) -> Toolbox:
    """The tools, checked: the sandbox computes, keys are there, MCP servers answer.

    Where they are only `described` nobody calls them, nor is checked what the built-in ones need; those of evaluation
    are left out. Raises ToolError for a tool that cannot be offered.
    """
    # Each of the processes that train together has tools of its own.
    processes = dist.get_world_size() if dist.is_initialized() else 1
    options = config.tools.model_copy(update={"search_rate": config.tools.search_rate / processes})

    def documents() -> Documents:
        return corpus() if options.corpus == MINIATURE else cast(Path | None, options.corpus)

    if described:
        return Toolbox(load_tools(options.names, undone(options)))
    known = built_in(options, documents, chat.shorten)
    training, evaluation = load_tools(options.names, known), load_tools(config.eval.tools, known, "eval.tools")
    return Toolbox(training, options.timeout, options.rollout_timeout, options.concurrency, evaluation)


def load_model(config: Config) -> PreTrainedModel:
    """The weights, on the config's device, with what of them is trained. Sets torch's threads.

    Raises PolicyError where they cannot be loaded, ConfigError where the model lacks a layer of lora.targets.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = load_policy(model_path(config), getattr(torch, config.dtype), config.device)
    if not config.train.vision:
        freeze_vision(model)
    if config.lora.rank:
        add_adapters(model, config.lora, config.seed)
    return model


def check_engine(config: Config) -> None:
    """Raises ConfigError where the config's engine cannot be had here, before any weights are loaded."""
    if config.engine.name == "vllm" and (problem := vllm_problem()) is not None:
        raise ConfigError(f"engine.name: got 'vllm', but {problem}")
    if config.vllm.servers:
        model, by_nccl = AutoConfig.from_pretrained(model_path(config)), config.device.startswith("cuda")
        for url in config.vllm.servers:
            if (problem := server_problem(url, config.rollout.max_context, model, by_nccl)) is not None:
                raise ConfigError(f"vllm.servers: got {url!r}, but {problem}")


def make_engine(
    config: Config, model: PreTrainedModel, chat: Chat, entropies: bool = False, ranks: Ranks = ALONE
) -> Engine:
    """The engine that generates with this model; with entropies if they are asked for or the method needs them.

    All ranks make theirs at the same time. Raises ConfigError where vLLM gives none, does not start, or cannot serve
    the model.
    """
    options = config.engine
    entropies = entropies or needs_entropy(config.method)
    if options.name == "vllm":
        if entropies:
            raise ConfigError("engine.name: got 'vllm', which gives no entropies; must be local here")
        return _vllm_engine(config, model, chat, ranks)
    return LocalEngine(model, chat, options.max_batch, options.overlap, options.kv_memory, entropies)


def _vllm_engine(config: Config, model: PreTrainedModel, chat: Chat, ranks: Ranks) -> Engine:
    if config.vllm.servers:
        try:
            return VllmServers(model, chat, config.vllm.servers, ranks)
        except EngineError as error:
            raise ConfigError(str(error)) from error
        except ImportError as error:  # of vLLM, by which requests and weights are packed
            raise ConfigError(f"engine.name: vLLM cannot be imported: {error}") from error
    start = partial(
        start_vllm,
        model_path(config),
        chat,
        dtype=config.precision,
        device=config.device,
        max_batch=config.engine.max_batch,
        context=config.rollout.max_context,
        images=config.rollout.max_images,
        memory=config.vllm.memory,
        kv_memory=config.engine.kv_memory,
        eager=config.vllm.eager,
        ranks=ranks,
    )
    try:
        return VllmEngine(model, chat, start, sleeps=config.device.startswith("cuda"))
    except EngineError as error:
        raise ConfigError(str(error)) from error
    except RankError:  # of another process, which tells its own
        raise
    except (ValueError, RuntimeError, ImportError, AssertionError) as error:  # vLLM refuses with all of these
        key, said = refusal(error, config.device)
        raise ConfigError(f"{key}: vLLM does not start with it: {said}") from error


def training_agent(config: Config, engine: Engine, chat: Chat, toolbox: Toolbox) -> Agent:
    """Rolls out as training does."""
    rollout = config.rollout
    sampling = Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_tokens)
    criticise = critic(config.judge) if config.method.name == "rltf" else None
    return Agent(engine, chat, toolbox, sampling, _limits(config), criticise=criticise)


def probing_agent(config: Config, engine: Engine, chat: Chat, toolbox: Toolbox) -> Agent:
    """Rolls out as training does; whatever the method, nobody criticises."""
    return replace(training_agent(config, engine, chat, toolbox), criticise=None)


def evaluation_agent(config: Config, engine: Engine, chat: Chat, toolbox: Toolbox) -> Agent:
    """Rolls out as evaluation does."""
    sampling = Sampling(config.eval.temperature, config.eval.top_p, config.eval.top_k, config.rollout.max_tokens)
    return Agent(engine, chat, toolbox.in_evaluation, sampling, _limits(config))


def _limits(config: Config) -> Limits:
    return Limits(config.rollout.max_turns, config.rollout.max_context, config.rollout.max_images)
