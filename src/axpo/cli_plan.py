"""`axpo plan`: what a config would take, before anything runs."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from axpo.cli_shared import ConfigFile, Overrides, command
from axpo.config import Config, ConfigError, load_config

if TYPE_CHECKING:
    from axpo.plan.shapes import Shape

TOO_LARGE = 1  # exit status
WIDTH = 80


def plan(
    config_file: ConfigFile,
    overrides: Overrides = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option("--gpu-memory", min=0.001, help="GiB of each GPU. Default: those of the one here, if any."),
    ] = None,
) -> None:
    """Say what a run would take: parameters, memory, rollouts and tokens of a step. No weights are loaded.

    It plans axpo train, or axpo sft where the config has data for that alone. It ends with code 1 where the run cannot
    fit, and says what to change.
    """
    with command():
        config = load_config(config_file, overrides or [])
        import torch
        from transformers.utils import logging as transformers_logging

        from axpo.plan.memory import GIB
        from axpo.plan.planning import make_plan, refusal
        from axpo.plan.report import tables

        transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        memory = None if gpu_memory is None else int(gpu_memory * GIB)
        if memory is None and torch.cuda.is_available():
            memory = torch.cuda.get_device_properties(0).total_memory
        shape, pixels = _measured(config)
        made = make_plan(config, shape, pixels, memory)
        console = Console(width=min(WIDTH, Console().width), highlight=False)
        for table in tables(made):
            console.print(table)
        if made.excess:
            typer.echo(f"error: {refusal(made, pixels)}", err=True)
            raise typer.Exit(TOO_LARGE)


def check_fit(config: Config, tuning: bool = False) -> None:
    """Raise ConfigError where the GPU's memory cannot hold what `axpo train`, or `axpo sft` (`tuning`), would take, or
    this torch cannot divide it.

    Memory is not checked off CUDA, with `preflight` off, or of a model whose layers the plan does not know.
    """
    from axpo.sharding import check_sharding

    check_sharding(config.parallel)
    if not config.preflight or not config.device.startswith("cuda"):
        return
    import torch

    from axpo.plan.planning import make_plan, refusal

    try:
        shape, pixels = _measured(config)
    except ConfigError:
        return
    made = make_plan(config, shape, pixels, torch.cuda.get_device_properties(config.device).total_memory, tuning)
    if made.excess:
        raise ConfigError(f"{refusal(made, pixels)}\naxpo plan shows more; preflight=false begins without this check")


def _measured(config: Config) -> "tuple[Shape, int]":
    """The sizes of the config's model, and the pixels of its largest image. Raises ConfigError."""
    from axpo.plan.shapes import image_pixels, load_shape

    shape = load_shape(config)
    return shape, image_pixels(config) if shape.vision else 0
