"""The stages that the commands are made of: fine-tune, train, evaluate."""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any, Protocol

from transformers import PreTrainedModel

from axpo import build
from axpo.chat import Chat
from axpo.config import Config
from axpo.diagnostics.alarms import Alarms, AlarmStop
from axpo.engines.base import Engine
from axpo.evaluation.runner import evaluate, summarise
from axpo.parallel import ALONE, Ranks, computing, in_order
from axpo.preflight import preflight, preflight_sft
from axpo.questions import Question
from axpo.run import Run
from axpo.sft import sft_steps
from axpo.tools.base import Toolbox
from axpo.trainer import Trainer
from axpo.tree import RolloutTree

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """What shows the user how far a run is."""

    def stage(self, name: str, total: int) -> None: ...

    def step(self, figures: dict[str, Any]) -> None: ...


async def run_training(
    config: Config,
    run: Run,
    progress: Progress,
    model: PreTrainedModel,
    chat: Chat,
    toolbox: Toolbox,
    data: build.Data,
    engine: Engine | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train by reinforcement and evaluate; returns the last evaluation. `engine` is one of this model that is there.

    Every rank runs this, with a `run` of the same folder, which only that of rank 0 writes.

    Goes on from the run's last checkpoint, if it has one: what came after it is done again, in the same numbers.

    Trees and figures are written with every step, a checkpoint every `train.save_every` steps and at the end,
    also where the run is interrupted. An alarm that begins is logged as a warning.

    Raises AlarmStop at the first alarm, the checkpoint being saved, where `alarms.stop` says so, and PreflightError
    before the first step, nothing having been written.
    """
    assert data.train is not None
    engine = engine or build.make_engine(config, model, chat, ranks=ranks)
    engine.sleep()  # its memory is that of the reference until the weights are divided; the trainer wakes it
    trainer = Trainer(config, build.training_agent(config, engine, chat, toolbox), model, data.train, ranks)
    alarms = Alarms(config.alarms, bool(config.tools.names))
    saved = None
    if ranks.main:
        run.complete_checkpoint()
    ranks.meet()
    if (state := run.training_state()) is not None:
        trainer.restore(state["trainer"], run.folder / "checkpoint")
        alarms.restore(state["alarms"])
        saved = trainer.done
    done, steps, name = saved or 0, config.train.steps, config.method.name
    if config.preflight and done < steps:
        await preflight(config, model, trainer.agent, run.folder, ranks)
    run.rewind(name, done)
    evaluated = ranks.of_main(run.evaluations() if ranks.main else {})  # whose lines that one has just rewound

    async def evaluate_as(called: str) -> dict[str, Any]:
        return await run_evaluation(config, run, progress, engine, chat, toolbox, data.eval or [], called, ranks)

    def save() -> None:
        with trainer.together():
            run.save_checkpoint(model, chat, state={"trainer": trainer.state(), "alarms": alarms.state()})
        ranks.meet()  # nobody goes on, or ends, before it is written

    progress.stage(name, steps - done)
    try:
        with ranks.together():
            while done < steps:
                due = data.eval and config.eval.every and done and done % config.eval.every == 0
                if due and f"step_{done}" not in evaluated:
                    await evaluate_as(f"step_{done}")
                    with trainer.together():  # the engine remembers nothing of it: steps are as they are without it
                        engine.sleep()
                        engine.update_weights()
                    progress.stage(name, steps - done)
                started = time.perf_counter()
                trees, figures = await trainer.step(done)
                run.save_trees(f"step_{done + 1:05d}", trees, config.train.save_images)
                figures["seconds"] = time.perf_counter() - started
                on = alarms.step(figures)
                run.log({"stage": name, **figures, "alarms": [alarm.name for alarm in on]})
                done += 1
                progress.step(figures)
                for alarm in on:
                    if alarm.begun:
                        logger.warning("step %d: %s", done, alarm.message)
                if on and config.alarms.stop:
                    names = ", ".join(alarm.name for alarm in on)
                    raise AlarmStop(f"stopped after step {done} by alarms.stop ({names})")
                if config.train.save_every and done % config.train.save_every == 0:
                    save()
                    saved = done
    finally:
        # An error amid an update, or amid writing a step, leaves weights that are of no logged step.
        if not ranks.lost and all(
            made == done != saved for made, done, saved in ranks.all((trainer.done, done, saved))
        ):
            save()
    if name in evaluated:
        return evaluated[name]
    return await evaluate_as(name) if data.eval else {}


async def run_evaluation(
    config: Config,
    run: Run,
    progress: Progress,
    engine: Engine,
    chat: Chat,
    toolbox: Toolbox,
    questions: Sequence[Question],
    name: str,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Evaluate the engine's model as it is; logs and returns the figures, and writes the trees.

    Each rank evaluates its share of the questions; progress is that of the own share.
    """
    agent = build.evaluation_agent(config, engine, chat, toolbox)
    progress.stage(f"evaluation of {name}", len(ranks.share(len(questions))))
    samples = config.eval.samples
    started = time.perf_counter()
    with ranks.together():
        own = await evaluate(agent, questions, samples, config.seed, lambda: progress.step({}), ranks.share)
        groups = in_order(ranks.to_main(own))
        summary = ranks.of_main(summarise(groups, samples, config.method.threshold))
    run.save_trees(f"eval_{name}", [tree for tree, _ in groups], config.train.save_images)
    run.log({"stage": "eval", "of": name, **summary, "seconds": time.perf_counter() - started})
    return summary


async def run_sft(
    config: Config,
    run: Run,
    progress: Progress,
    model: PreTrainedModel,
    chat: Chat,
    trees: Sequence[RolloutTree],
    checkpoint: str = "checkpoint",
    ranks: Ranks = ALONE,
) -> None:
    """Fine-tune on the credited tokens of the trees. Raises PreflightError before the first step.

    The checkpoint is written every `sft.save_every` steps and at the end, also where the run is interrupted; not after
    an error amid what ranks compute together, who can put nothing together any more.

    Every rank runs this, with the same trees.
    """

    def save() -> None:
        with computing(config, ranks):
            run.save_checkpoint(model, chat, checkpoint)
        ranks.meet()  # nobody goes on, or ends, before it is written

    steps, every = config.sft.steps, config.sft.save_every
    if config.preflight:
        preflight_sft(config, model, chat, run.folder, ranks)
    progress.stage("sft", steps)
    started = time.perf_counter()
    try:
        with ranks.together():
            for figures in sft_steps(config, model, chat, trees, ranks):
                seconds, started = time.perf_counter() - started, time.perf_counter()
                run.log({"stage": "sft", **figures, "seconds": seconds})
                progress.step({**figures, "seconds": seconds})
                if every and figures["step"] % every == 0 and figures["step"] < steps:
                    save()
                    started = time.perf_counter()
                await asyncio.sleep(0)  # where Ctrl-C ends it: all ranks after whole steps
    finally:
        if not ranks.lost:
            save()
