"""Models that were trained further: a line for each way of training and sparsity, a column for each text and context.

Results of such models say so in their cell: ``training`` holds the "name" of the way of training, the "sparsity" that
the model was trained at (None for a model that was not trained sparsely), and what else decided the training. They
stand in these tables and in no other: their weights differ, so what they are compared with is the model that was
trained densely, whose name is `REFERENCE`, and not the same model run densely.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from seerattn.report.parts import Cell, Column, Line, Table, plain
from seerattn.report.select import ends, group, is_finetuned, right_answers
from seerattn.report.tables.retrieval import SHARE_ERROR
from seerattn.results.record import Result
from seerattn.results.statistics import perplexity_difference, proportion

ID, TITLE = "finetuned", "Fine-tuning"
READ = (
    "Models whose weights were trained further, densely or while they attended sparsely, at the sparsity that they run "
    "with; the realised one is in brackets. They are compared with the model that was trained densely and runs dense."
)
REFERENCE = "dense"
RUN_DENSE = ", run dense"


def tables(results: Sequence[Result]) -> list[Table]:
    """Perplexity and retrieval by way of training and sparsity, and what targets of some rows cost."""
    found = []
    for model, rows in group(filter(is_finetuned, results), lambda r: r.model).items():
        losses, answers = ([r for r in rows if r.what == what] for what in ("perplexity", "accuracy"))
        if losses:
            note = "Below each perplexity stands its difference from that of the dense training, ± its paired error."
            found.append(_table(f"Fine-tuned: perplexity, {model}", losses, [note]))
        if _full_targets(losses):
            found.append(_partial_targets(losses))
        if answers:
            found.append(_table(f"Fine-tuned: retrieval, {model}", answers, [SHARE_ERROR]))
    return found


def _table(title: str, rows: Sequence[Result], notes: Sequence[str]) -> Table:
    # The same documents at the same length share a column.
    places = group(rows, lambda r: (r.text, r.cell.get("task", ""), r.context, r.cell.get("data"), r.seed))
    columns, cells, groups = [Column("sparsity", text=True)], {}, {}
    for number, ((text, task, context, *_), of_place) in enumerate(places.items()):
        name = " ".join(filter(None, (task.replace("_", "-"), f"{context:,} tokens")))
        columns.append(Column(name, text))
        reference = _reference(of_place)
        for line, found in _lines(of_place, reference).items():
            cells.setdefault(line, {})[number] = _cell(found, reference), found
        size = f"{right_answers(found)[1]} documents a cell." if task else _size(reference)
        groups.setdefault(text, size)
    lines = []
    for name, sparsity in sorted(cells, key=lambda line: (line[0].endswith(RUN_DENSE), *_rank(line, list(cells)))):
        of_line = cells[name, sparsity]
        sparse = [r for _, found in of_line.values() for r in found if r.kind != "dense"]
        shares = [1 - r.realised_density for r in sparse if r.realised_density is not None]
        label = f"{sparsity:g}" + (f" ({ends(shares)})" if shares else "")
        label = label if sparse or not sparsity else f"0, trained at {label}"
        values = [of_line[place][0] if place in of_line else None for place in range(len(places))]
        lines.append(Line(name, [Cell(label), *values]))
    return Table(title, "trained", columns, lines, notes, groups)


def _rank(line: tuple[str, float], lines: list[tuple[str, float]]) -> tuple[int, float]:
    return [name for name, _ in lines].index(line[0]), line[1]


def _cell(found: Sequence[Result], reference: Result | None) -> Cell:
    row = found[-1]
    if row.what == "accuracy":
        share, error = proportion(*right_answers(found))
        return Cell(f"{share:.2f}", f"{error:.2f}")
    if row.value is None:
        return Cell("not finite")
    return Cell(f"{row.value:.2f}", more="" if reference in (None, row) else percent(row, reference))


def _size(reference: Result | None) -> str:
    return "" if reference is None else f"{len(reference.sampled('documents'))} documents, {reference.n:,} tokens."


def _lines(rows: Iterable[Result], reference: Result | None) -> dict[tuple[str, float], list[Result]]:
    """Results by way of training and sparsity: that of the choice, or of the training where the model runs dense."""
    lines: dict[tuple[str, float], list[Result]] = {}
    for r in rows:
        training = r.cell["training"]
        name, sparsity = training["name"], 0.0
        if r.kind != "dense":
            # A policy of its own has the sparsity that it computed.
            sparsity = round(1 - (r.density or r.realised_density or 0.0), 6)
        elif training["sparsity"] is not None:
            name, sparsity = name + RUN_DENSE, training["sparsity"]
        elif reference is not None and name != REFERENCE and r.weights.get("model") == reference.weights.get("model"):
            # Gates added afterwards: without them the model is the reference.
            continue
        lines.setdefault((name, sparsity), []).append(r)
    return lines


def _partial_targets(rows: Sequence[Result]) -> Table:
    """Models that differ in the share of rows with a target alone, beside the one that was trained on all of them."""
    full = _full_targets(rows)
    lines: dict[str, dict[tuple, Cell]] = {}
    for r in rows:
        training, base = r.cell["training"], full.get(_target_place(r))
        if r.method != "gate" or base is None or r.value is None or training.get("annealed"):
            continue
        every = training["target_every"]
        name = f"{training['sparsity']:g}, {training['target_share']:.0%} of the rows"
        cell = Cell(f"{r.value:.3f}", more="" if r is base else percent(r, base))
        lines.setdefault(name + (f", every {every} steps" if every > 1 else ""), {})[r.text, r.context] = cell
    places = list(dict.fromkeys((r.text, r.context) for r in full.values()))
    # Whole targets, which the others are compared with, come first.
    body = sorted(lines.items(), key=lambda line: bool(next(iter(line[1].values())).more))
    return plain(
        f"Fine-tuned: targets of some rows, {rows[0].model}",
        ["sparsity and target", *(f"{text}, {context:,}" for text, context in places)],
        [[name, *(cells.get(place, Cell("")) for place in places)] for name, cells in body],
        ["Beside each perplexity stands its difference from the model trained on whole targets, ± its paired error."],
    )


def _full_targets(rows: Iterable[Result]) -> dict[tuple, Result]:
    """Models trained on whole targets at every step, measured at the sparsity of their training."""
    found = {}
    for r in rows:
        training = r.cell["training"]
        whole = training.get("target_share") == 1.0 and training["target_every"] == 1 and not training["annealed"]
        if whole and r.method == "gate" and r.value is not None:
            found[_target_place(r)] = r
    return found


def _target_place(r: Result) -> tuple:
    return r.text, r.context, r.cell.get("data"), r.cell["training"]["sparsity"], r.density


def _reference(rows: Iterable[Result]) -> Result | None:
    """The model that was trained densely."""
    return next((r for r in rows if r.cell["training"]["name"] == REFERENCE and r.value is not None), None)


def percent(row: Result, base: Result) -> str:
    """Difference of two perplexities of the same documents in percent of the second."""
    losses, tokens = row.sampled("losses"), base.sampled("tokens")
    gap = perplexity_difference(losses, base.sampled("losses"), tokens)
    error = "" if gap.stderr is None else f" ± {100 * gap.stderr / base.value:.2f}"
    return f"{100 * gap.value / base.value:+.2f}{error} %"
