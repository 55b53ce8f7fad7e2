"""`axpo compare`: methods × seeds, run in parallel, aggregated, and laid beside the paper."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from axpo.cli_shared import command, shown
from axpo.progress import WIDTH, percent


def compare(
    grid_file: Annotated[Path, typer.Argument(metavar="GRID", help="YAML file; docs/compare.md explains its keys.")],
    report: Annotated[bool, typer.Option("--report", help="Run nothing: aggregate what is done so far.")] = False,
    results: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A results.json of the same grid from elsewhere: what it has is not run."),
    ] = None,
) -> None:
    """Compare methods on the same seeds.

    Each run is an ordinary axpo train in a process of its own. What has ended is never run again, and what was killed
    goes on: to continue, give the same command. Writes summary.json, results.json, table.md, plots, and a page that
    lays the table beside the paper's. Exits with 1 where a run failed.
    """
    with command():
        from axpo.comparison.aggregate import read_results
        from axpo.comparison.cells import GRID_COPY, cells_to_run, has_ended, output_of, parallel, run_cells
        from axpo.comparison.display import TerminalDisplay
        from axpo.comparison.grid import cells_of, load_grid
        from axpo.comparison.report import write_report
        from axpo.config import ConfigError

        grid = load_grid(grid_file)
        cells = cells_of(grid)
        elsewhere = read_results(results or [], cells)
        failures = []
        if report:  # also while another process runs the cells
            if not (grid.output / GRID_COPY).is_file():
                raise ConfigError(f"output: {grid.output} holds no comparison to report on")
            summary = write_report(grid, cells, elsewhere)
        else:
            here = cells_to_run(cells, elsewhere)
            with output_of(grid, grid_file):
                try:
                    with TerminalDisplay(here, sum(map(has_ended, here)), parallel(grid, cells)) as display:
                        failures = asyncio.run(run_cells(grid, here, display))
                except KeyboardInterrupt:
                    done = sum(map(has_ended, here))
                    typer.echo(f"interrupted: {done} of {len(here)} runs are done; the same command goes on", err=True)
                    raise typer.Exit(130) from None
                summary = write_report(grid, cells, elsewhere)
        console = Console()
        console.print(_table(summary), width=min(WIDTH, console.width))
        finished, wanted = summary["cells"]["finished"], summary["cells"]["all"]
        typer.echo(
            f"{finished} of {wanted} runs are done; page.html, table.md and summary.json in {shown(grid.output)}"
        )
        for failure in failures:
            typer.echo(f"failed: {failure.cell.label}: {failure.error}", err=True)
        if failures:
            raise typer.Exit(1)


def _table(summary: Mapping[str, Any]) -> Table:
    """The methods by their means, at most 80 columns wide."""
    passes = [key for key in next(iter(summary["methods"].values())) if key.startswith("pass")]
    table = Table()
    table.add_column("")
    for title in ("seeds", *(f"Pass@{key.removeprefix('pass')}" for key in passes), "tool use", "rollouts"):
        table.add_column(title, justify="right")
    for name, entry in summary["methods"].items():
        shares = (percent(entry[key]["mean"]) for key in (*passes, "tool_use"))
        rollouts = entry["rollouts"]["mean"]
        table.add_row(name, str(entry["seeds"]), *shares, "–" if rollouts is None else f"{rollouts:.0f}")
    return table
