"""TRL's GRPOTrainer with tools, on the scripted work."""

import io
import tempfile
import time
from collections.abc import Callable
from typing import Any

import datasets
import PIL.Image
import torch
import torchvision_shim  # noqa: F401  (first: transformers looks for torchvision)
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen3_template
from workload import Script, Shape, calculate, questions, score, search

from axpo.chat import Chat
from axpo.miniature.base import BASE


class _Scripted(LogitsProcessor):
    """Leaves one token to sample from: the one that the script has at this place."""

    def __init__(self, turns: list[list[int]], prompt: int) -> None:
        self.turns = turns
        self.prompt = prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = input_ids.shape[1] - self.prompt
        chosen = torch.tensor([[turn[min(place, len(turn) - 1)]] for turn in self.turns])
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


class Trainer(GRPOTrainer):
    """Counts the seconds of a step's two parts, and lets the script write."""

    script: Script
    sampled = 0  # tokens of a step
    rollout_seconds = 0.0
    reference_seconds = 0.0

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        started, self.reference_seconds = time.perf_counter(), 0.0
        output = super()._generate_and_score_completions(inputs)
        self.rollout_seconds = time.perf_counter() - started - self.reference_seconds
        sampled = (output["completion_mask"] * output["tool_mask"]).sum(1).tolist()
        due = [self.script.sampled(row % self.num_generations) for row in range(len(sampled))]
        if sampled != due:
            raise RuntimeError(f"TRL sampled {sampled} tokens where the script has {due}")
        self.sampled = sum(sampled)
        return output

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        output = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if not torch.is_grad_enabled():  # of the reference, or the old ones: part of the update
            self.reference_seconds += time.perf_counter() - started
        return output

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        replied = kwargs.get("num_generations", self.num_generations) == 1
        size = self.num_generations
        turns = [self.script.turn(row % size, replied) for row in range(len(prompt_ids))]
        if replied:  # only callers come back
            turns = [self.script.turn(0, True) for _ in prompt_ids]
        forced = LogitsProcessorList([_Scripted(turns, max(map(len, prompt_ids)))])
        model, generate = self.model, self.model.generate
        model.generate = lambda **inputs: generate(**inputs, logits_processor=forced)
        try:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        finally:
            del model.generate


def reward(completions: list[Any], **_: Any) -> list[float]:
    """What the script says of the last turn."""
    return [score(completion[-1].get("content") or "", None).score for completion in completions]


class Theirs:
    """TRL's training loop, which trains so many rows at once and adds up their gradients."""

    def __init__(self, shape: Shape, rows_at_once: int) -> None:
        chat = Chat.from_pretrained(BASE)
        chat.tokenizer.response_template = qwen3_template
        processor = Qwen3VLProcessor(
            chat.image_processor, chat.tokenizer, Qwen3VLVideoProcessor(), chat_template=chat.tokenizer.chat_template
        )
        rows = [
            {"prompt": question.messages, "images": [PIL.Image.open(io.BytesIO(data)) for data in question.images]}
            for question in questions(chat, shape)
        ]
        arguments = GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,  # ours does not use it here either
            per_device_train_batch_size=rows_at_once,
            gradient_accumulation_steps=shape.questions * shape.rollouts // rows_at_once,
            num_generations=shape.rollouts,
            max_completion_length=4 * shape.tokens,
            temperature=1.0,
            top_k=0,
            beta=1e-3,
            epsilon=0.2,
            epsilon_high=0.4,
            loss_type="grpo",
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            max_tool_calling_iterations=3,
            shuffle_dataset=False,
            report_to=[],
            save_strategy="no",
            logging_steps=10_000,
            disable_tqdm=True,
            max_steps=10_000,
        )
        self.parts: list[dict[str, float]] = []
        self.trainer = Trainer(
            Qwen3VLForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32),
            reward_funcs=reward,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image())),
            processing_class=processor,
            tools=[search, calculate],
        )
        self.trainer.script = Script(chat, shape)

    def run(self, count: int, between: Callable[[], object]) -> None:
        """Make `count` steps; `between` is called after each, outside of what is timed."""
        self.trainer.add_callback(_Clock(self, count, between))
        self.trainer.train()


class _Clock(TrainerCallback):
    def __init__(self, side: Theirs, count: int, between: Callable[[], object]) -> None:
        self.side, self.count, self.between = side, count, between
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        whole = time.perf_counter() - self.started
        rollout = self.side.trainer.rollout_seconds
        self.side.parts.append({"step": whole, "rollout": rollout, "update": whole - rollout})
        self.between()
        control.should_training_stop = len(self.side.parts) >= self.count
        self.started = time.perf_counter()
