"""`seerattn compare`: a recipe of models, ways of choosing blocks and tasks, run as far as it is not yet done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from seerattn.cli.evaluate import DeviceOption, DtypeOption, ImplOption, OutputOption
from seerattn.cli.terminal import print_table, say, screen
from seerattn.cli.training import TrustOption
from seerattn.cli.values import words
from seerattn.eval.arms import choose_device, load_eval_model
from seerattn.eval.compare import Cell, Comparison, Outcome, gates_of, make_cells, make_jobs
from seerattn.eval.recipe import check_files, read_recipe
from seerattn.hf.loading import read_config, read_tokenizer
from seerattn.results.file import ResultsFile
from seerattn.texts import visible

RecipeArgument = Annotated[Path, typer.Argument(help="A YAML file; research/experiments/quick.yaml is a small one.")]
OnlySelectorsOption = Annotated[str, typer.Option(help="Names of the selectors to run, with commas between.")]
OnlyTasksOption = Annotated[str, typer.Option(help="Tasks to run, with commas between.")]
LimitOption = Annotated[int, typer.Option(help="At most so many documents in each task; 0 for all.", min=0)]
BatchOption = Annotated[int, typer.Option(help="Sequences that run together; 0 for what the recipe says.", min=0)]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Check everything, show the cells and stop.")]

LEFT = ("model", "task", "text", "selector", "cell", "reason")
# What the last table shows of each task.
SHOWN = {"perplexity": ("perplexity",), "recall": ("target_recall", "mass_recall")}


def compare(
    recipe: RecipeArgument,
    output: OutputOption = None,
    only_selectors: OnlySelectorsOption = "",
    only_tasks: OnlyTasksOption = "",
    limit: LimitOption = 0,
    batch: BatchOption = 0,
    device: DeviceOption = "",
    dtype: DtypeOption = "auto",
    impl: ImplOption = "auto",
    trust_remote_code: TrustOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Compare ways of choosing blocks at equal realised density and at equal time, as a recipe says.

    Each setting is tuned to every density or time. A cell that fails is written down with its reason and the rest goes
    on; the exit code is 1 then, and the next start tries it again.
    """
    asked = read_recipe(recipe, only_selectors=words(only_selectors), only_tasks=words(only_tasks), batch=batch or None)
    where = choose_device(device or None)
    file = ResultsFile(output, where)
    jobs = {}
    for model in asked.models:
        config, tokenizer = (
            read(model.source, trust_remote_code=trust_remote_code) for read in (read_config, read_tokenizer)
        )
        check_files(asked, model, config)
        jobs[model] = make_jobs(asked, tokenizer, limit=limit)
    cells = {model: make_cells(asked, jobs[model]) for model in asked.models}
    total = sum(map(len, cells.values()))
    if dry_run:
        _print_cells({model.name: of for model, of in cells.items()})
        say(f"{total} cells")
        return
    outcomes: dict[str, list[Outcome]] = {}
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen(stderr=True), transient=True) as bar:
        # Cells differ in length, so the time left goes by tokens.
        task = bar.add_task("", total=sum(cell.tokens for of in cells.values() for cell in of))
        for model in asked.models:
            subject = load_eval_model(
                model.source,
                gates=gates_of(asked, model),
                device=where,
                dtype=dtype,
                impl=impl,
                name=model.name,
                trust_remote_code=trust_remote_code,
            )
            comparison = Comparison(subject, model, asked, jobs[model], file)
            done = outcomes.setdefault(model.name, [])
            running = comparison.run()
            for cell in comparison.cells:
                number = sum(map(len, outcomes.values())) + 1
                bar.update(task, description=visible(f"{number} of {total}: {cell}"))
                outcome = next(running)
                done.append(outcome)
                if outcome.failure:
                    bar.console.print(visible(f"failed: {cell}: {outcome.failure}"), soft_wrap=True)
                bar.advance(task, cell.tokens)
            del subject, comparison, running
    for model, found in outcomes.items():
        _print_tables(model, found)
    if output is not None:
        say(f"results are in {output}")
    failed = [outcome for found in outcomes.values() for outcome in found if outcome.failure]
    if failed:
        _print_failures(failed)
        raise typer.Exit(1)


def _print_cells(by_model: dict[str, list[Cell]]) -> None:
    """What would run: a line for each selector in each task at each context."""
    lines: dict[tuple[str, ...], list[Cell]] = {}
    for model, cells in by_model.items():
        for cell in cells:
            job = cell.job
            place = (model, job.task.task, job.task.text, str(job.context), str(len(job.inputs)), cell.entry.name)
            lines.setdefault(place, []).append(cell)
    body = []
    for place, cells in lines.items():
        asked = [
            " ".join(f"{value:g}" for value in dict.fromkeys(c.asked for c in cells if c.asked and c.budget == budget))
            for budget in ("density", "time")
        ]
        rows = " ".join(str(n) for n in dict.fromkeys(cell.last_rows_dense for cell in cells))
        body.append([*place, *asked, rows, str(len(cells))])
    heads = ["model", "task", "text", "context", "sequences", "selector", "densities", "times", "dense rows", "cells"]
    print_table(heads, body, texts=LEFT, fold=True)


def _print_tables(model: str, outcomes: Sequence[Outcome]) -> None:
    """A table of selectors by densities and times for each quantity of each task; sentences below."""
    groups: dict[tuple[str, int], list[Outcome]] = {}
    rows_dense = list(dict.fromkeys(o.cell.last_rows_dense for o in outcomes if o.cell.asked is not None)) or [0]
    for option in rows_dense:
        for outcome in outcomes:
            # The dense model has no last rows of its own: it stands in every table.
            if outcome.cell.asked is None or outcome.cell.last_rows_dense == option:
                groups.setdefault((str(outcome.cell.job), option), []).append(outcome)
    for (job, option), found in groups.items():
        if all(outcome.cell.asked is None for outcome in found) and option != rows_dense[0]:
            continue
        for what in SHOWN.get(found[0].cell.job.task.task, ("accuracy",)):
            rows = f", last {option} query-block rows dense" if option else ""
            _print_quantity(f"{what.replace('_', ' ')}: {job} tokens, {model}{rows}", found, what)
    notes = dict.fromkeys(outcome.note for outcome in outcomes if outcome.note)
    if notes:
        for sentence in ("* as near as it gets:", *notes):
            say(sentence)


def _print_quantity(title: str, outcomes: Sequence[Outcome], what: str) -> None:
    columns = sorted({_column(o) for o in outcomes if o.cell.asked is not None}, key=lambda c: (c[0], -c[1]))
    names = list(dict.fromkeys(outcome.cell.entry.name for outcome in outcomes))
    body = []
    for name in names:
        of = [outcome for outcome in outcomes if outcome.cell.entry.name == name]
        values = {None if o.cell.asked is None else _column(o): _value(o, what) for o in of}
        body.append([name, values.get(None, ""), *(values.get(column, "") for column in columns)])
    heads = [f"{value:g}" + (" of time" if budget == "time" else "") for budget, value in columns]
    print_table(["selector", "1", *heads], body, texts=LEFT, title=title, fold=True)


def _column(outcome: Outcome) -> tuple[str, float]:
    return outcome.cell.budget, outcome.cell.asked


def _value(outcome: Outcome, what: str) -> str:
    """The value of a cell, over all depths of a retrieval task."""
    if outcome.failure:
        return "failed"
    values = [row.value for row in outcome.rows if row.what == what]
    shown = "not finite" if None in values else f"{fmean(values):.4g}"
    return shown + ("*" if outcome.note else "")


def _print_failures(outcomes: Iterable[Outcome]) -> None:
    body = [[str(outcome.cell), outcome.failure or ""] for outcome in outcomes]
    print_table(["cell", "reason"], body, texts=LEFT, title="failed", fold=True)
