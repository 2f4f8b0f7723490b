"""What sparse attention costs beside dense attention, where oracles of several maps were compared.

Perplexity is told as a ratio to that of dense attention on the same documents, answers as a difference of
log-probabilities. Errors are those of these paired quantities, over documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from seerattn.report.benchmarks import tokens
from seerattn.report.names import map_name, map_of, name_of, per_head
from seerattn.report.parts import Cell, Column, Line, Table
from seerattn.report.select import PER_HEAD, at_density, by_line, ends, group, missed, reached, realised, titled
from seerattn.report.tables.gap import STREAMING, closed
from seerattn.results import statistics
from seerattn.results.record import Result
from seerattn.selection.map_form import PUBLISHED

ID, TITLE = "cost", "Cost beside dense attention"
READ = (
    "Each method beside the dense model on the same documents. An oracle chooses by a true map: it is what gates would "
    "reach that had learned that map perfectly. Densities are counted; heads of columns have the realised ones in "
    "brackets. ± is the standard error of the paired difference, over documents."
)
BRIEF = "In short"
DENSE = "dense"


@dataclass(frozen=True)
class Place:
    """A text, or a task at a length, at one density: the rows of every line, and those of the dense model."""

    name: str
    density: float
    rows: dict[str, list[Result]]
    dense: list[Result]

    @property
    def context(self) -> int:
        """Tokens of the context."""
        return next(rows[0].context for rows in self.rows.values())

    @property
    def column(self) -> Column:
        """The head of its column."""
        shares = (realised(rows) for rows in self.rows.values())
        return Column(f"{self.name} {self.density:g}", realised=ends(share for share in shares if share is not None))


@dataclass(frozen=True)
class Compared:
    """What was measured on one model: perplexities at one context, and answers, each by falling density."""

    model: str
    context: int
    perplexity: list[Place]
    answers: list[Place]


def over(row: Result, base: Result) -> statistics.Estimate:
    """How much higher a perplexity is than another on the same documents, in percent.

    The error is that of the ratio, over documents; None where the losses of documents were not recorded.
    """
    ratio = statistics.Estimate(row.value / base.value, None)
    ours, theirs = _losses(row), _losses(base)
    counts = {document: count for document, (_, count) in ours.items()}
    if ours and counts == {document: count for document, (_, count) in theirs.items()}:
        # The exponential of a mean difference of losses is the ratio of the perplexities.
        differences = [loss - theirs[document][0] for document, (loss, _) in ours.items()]
        ratio = statistics.perplexity(differences, list(counts.values()))
    return statistics.Estimate(100 * (ratio.value - 1), None if ratio.stderr is None else 100 * ratio.stderr)


def answers_over(rows: Sequence[Result], others: Sequence[Result]) -> statistics.Estimate | None:
    """How much more probable right answers are than others', in nats; None where they were not recorded.

    Args:
        rows: shares of right answers of one line, by depth, with the log-probability of every answer.
        others: those of another line to the same questions.
    """
    differences: list[float] = []
    for r in rows:
        base = next((d for d in others if d.cell.get("depth") == r.cell.get("depth")), None)
        ours, theirs = _answers([r]), _answers([] if base is None else [base])
        if not ours or len(ours) != len(theirs):
            return None
        differences += [one - other for one, other in zip(ours, theirs)]
    return statistics.mean(differences) if differences else None


def compared(results: Iterable[Result]) -> list[Compared]:
    """What was measured of every model of which oracles of several maps were; dense last rows are left out."""
    found = []
    models = group(at_density(results, "perplexity", "accuracy"), lambda r: (r.model, r.weights.get("model")))
    for (model, _), rows in models.items():
        losses = [r for r in rows if r.what == "perplexity"]
        if len({map_of(r) for r in losses} - {None}) > 1:
            context = max(r.context for r in losses)
            perplexity = _places((r for r in losses if r.context == context), lambda r: r.text)
            answers = _places((r for r in rows if r.what == "accuracy" and _answers([r])), _question)
            found += [Compared(model, context, perplexity, answers)] if perplexity else []
    return found


def _places(rows: Iterable[Result], title: Callable[[Result], str]) -> list[Place]:
    places = []
    for name, found in titled(rows, title).items():
        dense = [r for r in found if r.kind == "dense"]
        by_density = group((r for r in found if r.kind != "dense" and r.density), lambda r: r.density)
        places += [Place(name, density, by_line(by_density[density]), dense) for density in sorted(by_density)[::-1]]
    return places


def _question(row: Result) -> str:
    return f"{row.cell['task'].replace('_', '-')} {tokens(row.context)}"


def tables(results: Sequence[Result]) -> list[Table]:
    """For each model of `compared` the short table, the perplexities, the answers and what budgets per head change."""
    return [table for one in compared(results) for table in _of_model(one)]


def _of_model(one: Compared) -> list[Table]:
    shortest = min((place.context for place in one.answers), default=0)
    brief = [place for place in one.answers if place.context == shortest]
    of_context = f"{one.context:,} tokens, {one.model}"
    note = f"Of the dense model the perplexity itself. {_counts(one.perplexity)}"
    found = [_brief(one, brief)]
    found.append(_table(f"Perplexity over dense: {of_context}", one.perplexity, _lines(one.perplexity), _cost, note))
    if one.answers:
        note = "Log-probability of the right answer less that of the dense model, in nats; of the dense model itself."
        note = f"{note} {_counts(one.answers)}"
        found.append(_table(f"Answers beside dense: {one.model}", one.answers, _lines(one.answers), _cost, note))
    places = [*one.perplexity, *brief]
    both = {line: name for line, name in _lines(places).items() if any(_change(place, line) for place in places)}
    if both:
        note = (
            "Perplexity with budgets over that with equal heads, and log-probability of right answers less that with "
            f"equal heads, in nats. {_counts(places)}"
        )
        found.append(_table(f"Budgets per head over equal heads: {of_context}", places, both, _change, note))
    return found


def _brief(one: Compared, answers: Sequence[Place]) -> Table:
    """The dense model, the best oracle, all gates and streaming, at densities that answers have too.

    Of gates that were measured with budgets per head and with equal heads, the line with budgets stands here: that is
    what `TopK` does with them. Answers and the gap are told at the lowest density.
    """
    common = {place.density for place in one.perplexity} & {place.density for place in one.answers}
    losses = [place for place in one.perplexity if not common or place.density in common]
    lowest = min(place.density for place in losses)
    answers = [place for place in answers if place.density == lowest]
    rows = by_line(r for place in losses for found in place.rows.values() for r in found)
    oracle = _best_oracle(one)
    gates = [line for line, (row, *_) in rows.items() if row.kind == "learned" and line + PER_HEAD not in rows]
    all_shared = bool(gates) and all(map(per_head, gates))
    lines = {DENSE: DENSE}
    for line, (row, *_) in rows.items():
        if line == oracle:
            lines[line] = f"best oracle: {map_name(map_of(row))}{per_head(line)}"
        elif line in (*gates, STREAMING):
            lines[line] = name_of(row).removesuffix(PER_HEAD) if all_shared else name_of(row)
    gaps = [place for place in losses if place.density == lowest]
    columns = [place.column for place in losses]
    columns += [Column(f"gap closed, {place.name} {lowest:g}") for place in gaps]
    columns += [place.column for place in answers]
    body = []
    for line, name in lines.items():
        cells = [_cost(place, line, 1) for place in losses] + [_gap(place, line, oracle) for place in gaps]
        body.append(Line(name, cells + [_cost(place, line, 1) for place in answers]))
    notes = [
        "Perplexity over that of the dense model, and log-probability of right answers less its own, in nats; of the "
        "dense model the values themselves. The gap is that from streaming to the oracle of the table."
        + (" All gates with budgets per head." if all_shared else ""),
        _counts([*losses, *answers]),
    ]
    return Table(f"{BRIEF}: {one.context:,} tokens, {one.model}", "", columns, body, notes)


def _table(
    title: str, places: Sequence[Place], lines: dict[str, str], cell: Callable[[Place, str], Cell | None], note: str
) -> Table:
    body = [Line(name, [cell(place, line) for place in places]) for line, name in lines.items()]
    return Table(title, "method", [place.column for place in places], body, [note])


def _lines(places: Sequence[Place]) -> dict[str, str]:
    """Names by line, the dense model first."""
    rows = by_line(r for place in places for found in place.rows.values() for r in found)
    of_published = {line for line, (row, *_) in rows.items() if map_of(row) == PUBLISHED}
    names = {line: f"oracle by published map{per_head(line)}" for line in of_published}
    return {DENSE: DENSE} | {line: names.get(line) or name_of(row) for line, (row, *_) in rows.items()}


def _cost(place: Place, line: str, digits: int = 2) -> Cell | None:
    """What a line costs; of the dense model the value itself."""
    if line != DENSE:
        rows = place.rows.get(line)
        return _difference(rows, place.dense, digits, missed(rows)) if rows and place.dense else None
    if place.dense and place.dense[-1].what == "perplexity":
        return Cell(f"{place.dense[-1].value:.2f}")
    found = _answers(place.dense)
    return Cell(f"{statistics.mean(found).value:.2f}") if found else None


def _change(place: Place, line: str) -> Cell | None:
    """What budgets change; None where there is not both at one density."""
    equal, shared = place.rows.get(line), place.rows.get(line + PER_HEAD)
    return _difference(shared, equal, 2) if equal and shared and reached(equal) and reached(shared) else None


def _difference(rows: Sequence[Result], base: Sequence[Result], digits: int, at: str = "") -> Cell | None:
    loss = rows[-1].what == "perplexity"
    found = over(rows[-1], base[-1]) if loss else answers_over(rows, base)
    if found is None:
        return None
    error = "" if found.stderr is None else f" ± {found.stderr:.{digits}f}"
    return Cell(f"{found.value:+.{digits}f}{error}{' %' if loss else ''}", at=at)


def _gap(place: Place, line: str, oracle: str | None) -> Cell | None:
    if line in (oracle, STREAMING):
        return Cell("100%" if line == oracle else "0%")
    # The end is the oracle that the table shows.
    limits = [rows[-1] for name, rows in place.rows.items() if name in (oracle, STREAMING)]
    found = closed(place.rows[line][-1], limits) if line in place.rows else None
    return None if found is None or found.ends is not None else Cell(f"{found.share:.0%}")


def _best_oracle(one: Compared) -> str | None:
    """The oracle with the lowest mean loss over all perplexities, among those that have most of them."""
    losses: dict[str, list[float]] = {}
    for place in one.perplexity:
        for line, rows in place.rows.items():
            if rows[0].kind == "oracle" and place.dense:
                losses.setdefault(line, []).append(over(rows[-1], place.dense[-1]).value)
    return min(losses, key=lambda line: (-len(losses[line]), sum(losses[line])), default=None)


def _losses(row: Result) -> dict[int, tuple[float, float]]:
    """Loss and tokens of every document; empty where they were not recorded whole."""
    columns = [row.samples.get(name, []) for name in ("documents", "losses", "tokens")]
    found = {document: (loss, count) for document, loss, count in zip(*columns)}
    whole = {len(found)} == set(map(len, columns)) and all(None not in pair and pair[1] > 0 for pair in found.values())
    return found if whole else {}


def _answers(rows: Iterable[Result]) -> list[float]:
    found = [value for r in rows for value in r.samples.get("log_prob", ())]
    return [] if None in found else found


def _counts(places: Sequence[Place]) -> str:
    """What the numbers rest on, and where they were measured."""
    parts, sizes = {}, set()
    for place in places:
        if "accuracy" in {rows[0].what for rows in place.rows.values()}:
            sizes |= {sum(r.n for r in rows) for rows in place.rows.values()}
        elif place.dense:
            of = place.dense[-1]
            parts[place.name] = f"{place.name}: {len(of.samples.get('documents', ()))} documents, {of.n:,} tokens"
    answers = [f"answers: {' or '.join(map(str, sorted(sizes)))} documents each"] if sizes else []
    devices = sorted({r.device for place in places for rows in place.rows.values() for r in rows if r.device})
    return f"{'; '.join([*parts.values(), *answers])}." + (f" Measured on {', '.join(devices)}." if devices else "")
