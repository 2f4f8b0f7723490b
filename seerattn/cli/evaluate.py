"""`seerattn eval`: an experiment of methods and tasks, run as far as it is not yet done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from seerattn.cli.options import from_options
from seerattn.cli.terminal import print_table, say, screen
from seerattn.eval.experiment import Experiment
from seerattn.eval.run import Cell, Outcome, Runner, make_cells, make_jobs
from seerattn.eval.tasks.task import Setup
from seerattn.hf.eval_model import Loading
from seerattn.hf.loading import read_config, read_tokenizer
from seerattn.report.render.terminal import print_tables
from seerattn.results.file import ResultsFile
from seerattn.texts import visible

OutputOption = Annotated[Path | None, typer.Option(help="Results file; finished cells in it are not run again.")]
LimitOption = Annotated[int, typer.Option(help="At most so many documents in each task; 0 for all.", min=0)]
OnlyOption = Annotated[list[str], typer.Option(help="Run a method or task of this name alone; may be repeated.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Check everything, show the cells and stop.")]


@from_options
def evaluate(
    experiment: Experiment,
    loading: Loading,
    output: OutputOption = None,
    limit: LimitOption = 0,
    only: OnlyOption = [],  # noqa: B006
    dry_run: DryRunOption = False,
) -> None:
    """Measure methods on tasks, at equal realised density or at equal time, beside the dense model.

    Each method is tuned to every density or time. A cell that fails is written down with its reason and the rest goes
    on; the exit code is 1 then, and the next start tries it again. An experiment may be a YAML file: --config.
    """
    experiment = experiment.keep(only)
    trust = {"trust_remote_code": loading.trust_remote_code}
    file = ResultsFile(output, loading.place)
    config, tokenizer = read_config(experiment.model, **trust), read_tokenizer(experiment.model, **trust)
    experiment.check(config)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    jobs = make_jobs(experiment, Setup(tokenizer, experiment.contexts, limit, longest))
    cells = make_cells(experiment, jobs)
    if dry_run:
        _print_cells(cells)
        say(f"{len(cells)} cells")
        return
    runner = Runner(loading.load(experiment.model, name=experiment.called), experiment, jobs, file)
    outcomes = _run(runner)
    print_tables([row for outcome in outcomes for row in outcome.rows])
    notes = dict.fromkeys(outcome.note for outcome in outcomes if outcome.note)
    for sentence in ("As near as it gets:", *notes) if notes else ():
        say(sentence)
    if output is not None:
        say(f"results are in {output}")
    failed = [outcome for outcome in outcomes if outcome.failure]
    if failed:
        body = [[str(outcome.cell), outcome.failure or ""] for outcome in failed]
        print_table(["cell", "reason"], body, texts=("cell", "reason"), title="failed", fold=True)
        raise typer.Exit(1)


def _run(runner: Runner) -> list[Outcome]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    outcomes: list[Outcome] = []
    with Progress(*columns, console=screen(stderr=True), transient=True) as bar:
        # Cells differ in length, so the time left goes by tokens.
        task = bar.add_task("", total=sum(cell.job.tokens for cell in runner.cells))
        running = runner.run()
        for number, cell in enumerate(runner.cells, 1):
            bar.update(task, description=visible(f"{number} of {len(runner.cells)}: {cell}"))
            outcome = next(running)
            outcomes.append(outcome)
            if outcome.failure:
                bar.console.print(visible(f"failed: {cell}: {outcome.failure}"), soft_wrap=True)
            bar.advance(task, cell.job.tokens)
    return outcomes


def _print_cells(cells: Sequence[Cell]) -> None:
    """What would run: a line for each method in each task at each context."""
    lines: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        job = cell.job
        place = (job.task, job.text, str(job.context), str(len(job.sequences)), str(cell.method), cell.method.kind)
        lines.setdefault(place, []).append(cell)
    body = []
    for place, of in lines.items():
        asked = [
            " ".join(f"{value:g}" for value in dict.fromkeys(c.asked for c in of if c.asked and c.budget == budget))
            for budget in ("density", "time")
        ]
        rows = " ".join(str(n) for n in dict.fromkeys(cell.last_rows_dense for cell in of) if n)
        body.append([*place, *asked, rows, str(len(of))])
    heads = ["task", "text", "context", "sequences", "method", "kind", "densities", "times", "last rows dense", "cells"]
    print_table(heads, body, texts=("task", "text", "method", "kind"), fold=True)
