"""Tables of what sparse attention costs beside dense attention on the same documents, where maps were compared.

Perplexity is told as a ratio to that of dense attention, answers as a difference of log-probabilities. Errors are those
of these paired quantities, over documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from seerattn.report.gap import closed
from seerattn.report.markdown import at
from seerattn.report.names import map_name, map_of
from seerattn.report.parts import Section, Table
from seerattn.report.select import PER_HEAD, arms, budget, group, kind, last_rows_dense, panels, reached, realised
from seerattn.results import statistics
from seerattn.results.record import Result
from seerattn.selection.map_form import PUBLISHED

BRIEF = "In short"
STREAMING = "streaming"


@dataclass(frozen=True)
class Column:
    """A column of one density: the rows of every arm, those of the dense model, and what they amount to."""

    name: str
    density: float
    rows: dict[str, list[Result]]
    dense: list[Result]

    @property
    def head(self) -> str:
        """Its name, the density that was asked for and, in brackets, those realised."""
        found = [f"{share:.3f}" for share in map(realised, self.rows.values()) if share is not None]
        ends = dict.fromkeys((min(found), max(found))) if found else ()
        return f"{self.name} {self.density:g}" + (f" ({' to '.join(ends)})" if ends else "")


@dataclass(frozen=True)
class Measured:
    """What was measured on one model: columns of perplexity, and of answers to questions.

    Attributes:
        model: its name.
        context: tokens of the perplexities.
        perplexity: columns, by text and falling density.
        answers: columns, by task, length and falling density.
    """

    model: str
    context: int
    perplexity: list[Column]
    answers: list[Column]


def over(row: Result, base: Result) -> statistics.Estimate:
    """How much higher a perplexity is than another on the same documents, in percent.

    The error is that of the ratio, over documents; None where the losses of documents were not recorded.
    """
    ratio = statistics.Estimate(row.value / base.value, None)
    ours, theirs = _losses(row), _losses(base)
    tokens = {document: count for document, (_, count) in ours.items()}
    if ours and tokens == {document: count for document, (_, count) in theirs.items()}:
        # The exponential of a mean difference of losses is the ratio of the perplexities.
        differences = [loss - theirs[document][0] for document, (loss, _) in ours.items()]
        ratio = statistics.perplexity(differences, list(tokens.values()))
    return statistics.Estimate(100 * (ratio.value - 1), None if ratio.stderr is None else 100 * ratio.stderr)


def answers_over(rows: Sequence[Result], others: Sequence[Result]) -> statistics.Estimate | None:
    """How much more probable right answers are than others', in nats; None where they were not recorded.

    Args:
        rows: shares of right answers of one arm, by depth, with the log-probability of every answer.
        others: those of another arm to the same questions.
    """
    differences: list[float] = []
    for r in rows:
        base = next((d for d in others if d.cell.get("depth") == r.cell.get("depth")), None)
        ours, theirs = _answers([r]), _answers([] if base is None else [base])
        if not ours or len(ours) != len(theirs):
            return None
        differences += [one - other for one, other in zip(ours, theirs)]
    return statistics.mean(differences) if differences else None


def arm_name(row: Result) -> str:
    """What these tables call an arm: an oracle by its map, gates by their name."""
    form = map_of(row)
    if form is None:
        return row.arm
    return f"oracle, {map_name(form)}" + (" map" if form == PUBLISHED else "") + _per_head(row.selector)


def measured(results: Iterable[Result]) -> list[Measured]:
    """What was measured of every model of which oracles of several maps were; dense last rows are left out."""
    rows = [r for r in results if r.what in ("perplexity", "accuracy") and r.value is not None]
    rows = [r for r in rows if budget(r) == "density" and not last_rows_dense(r)]
    groups: dict[tuple, list[Result]] = {}
    for r in rows:
        groups.setdefault((r.model, r.weights.get("model")), []).append(r)
    found = []
    for (model, _), of_model in groups.items():
        losses = [r for r in of_model if r.what == "perplexity"]
        if len({map_of(r) for r in losses} - {None}) < 2:
            continue
        context = max(r.context for r in losses)
        perplexity = _columns([r for r in losses if r.context == context], lambda r: r.text)
        answers = _columns([r for r in of_model if r.what == "accuracy" and _answers([r])], _question)
        if perplexity:
            found.append(Measured(model, context, perplexity, answers))
    return found


def cost_tables(results: Iterable[Result]) -> list[Table]:
    """For each model of `measured` the short table, the perplexities, the answers and what budgets per head change."""
    tables = []
    for one in measured(results):
        tables += [brief(one), _perplexities(one)]
        tables += [_answers_table(one)] if one.answers else []
        changes = _budgets(one)
        tables += [changes] if changes.body else []
    return tables


def cost_section(results: Iterable[Result]) -> Section | None:
    """The tables as a section of the page."""
    read = (
        "Each way of choosing blocks beside the dense model on the same documents. An oracle chooses by a true map: it "
        "is what gates would reach that had learned that map perfectly."
    )
    tables = cost_tables(results)
    return Section("cost", "Cost beside dense attention", read, tables) if tables else None


def best_oracle(one: Measured) -> str | None:
    """The oracle with the lowest mean loss over all perplexities, among those that have most of them."""
    losses: dict[str, list[float]] = {}
    for column in one.perplexity:
        for arm, rows in column.rows.items():
            if kind(rows[0]) == "oracle" and column.dense:
                losses.setdefault(arm, []).append(over(rows[-1], column.dense[-1]).value)
    return min(losses, key=lambda arm: (-len(losses[arm]), sum(losses[arm])), default=None)


def brief(one: Measured) -> Table:
    """A small table: the dense model, the best oracle, all gates and streaming, at densities that answers have too.

    Of gates that were measured with budgets per head and with equal heads, the line with budgets stands here: that is
    what `TopK` does with them. Answers and the gap are told at the lowest density, answers at the shortest length.
    """
    of_losses, of_answers = ({c.density for c in columns} for columns in (one.perplexity, one.answers))
    common = sorted(of_losses & of_answers or of_losses, reverse=True)
    losses = [c for c in one.perplexity if c.density in common]
    shortest = min((_length(c) for c in one.answers), default=0)
    answers = [c for c in one.answers if c.density == common[-1] and _length(c) == shortest]
    oracle = best_oracle(one)
    shown = [arm for arm in _arms(losses) if _in_brief(arm, losses, oracle)]
    gates = [arm for arm in shown if kind(_rows_of(arm, losses)[0]) == "gate"]
    told = any(not arm.endswith(PER_HEAD) for arm in gates)
    ended = [c for c in losses if c.density == common[-1]]
    head = ["", *(c.head for c in losses), *(f"gap closed, {c.name} {c.density:g}" for c in ended)]
    body = []
    for arm, name in [("dense", "dense"), *((arm, _brief_name(arm, losses, told)) for arm in shown)]:
        cells = [_loss(c, arm, 1) for c in losses]
        cells += [_gap(c, arm, oracle) for c in ended] + [_answer(c, arm, 1) for c in answers]
        body.append([name, *cells])
    notes = [
        "Perplexity over that of the dense model, and log-probability of right answers less its own, in nats; of the "
        "dense model the values themselves. The gap is that from streaming to the oracle of the table."
        + ("" if told or not gates else " All gates with budgets per head."),
        _counts(losses, answers),
    ]
    return Table(f"{BRIEF}: {one.context} tokens, {one.model}", [*head, *(c.head for c in answers)], body, notes)


def _perplexities(one: Measured) -> Table:
    columns = one.perplexity
    body = [[name, *(_loss(c, arm) for c in columns)] for arm, name in _lines(columns)]
    title = f"Perplexity over dense: {one.context} tokens, {one.model}"
    notes = [f"Of the dense model the perplexity itself. {_counts(columns, [])}"]
    return Table(title, ["selector", *(c.head for c in columns)], body, notes)


def _answers_table(one: Measured) -> Table:
    columns = one.answers
    body = [[name, *(_answer(c, arm) for c in columns)] for arm, name in _lines(columns)]
    notes = [
        "Log-probability of the right answer less that of the dense model, in nats; of the dense model itself. "
        + _counts([], columns)
    ]
    title = f"Answers beside dense: {one.model}"
    return Table(title, ["selector", *(c.head for c in columns)], body, notes)


def _budgets(one: Measured) -> Table:
    """What budgets per head change beside equal heads, of all arms that were measured with both."""
    shortest = min(map(_length, one.answers), default=0)
    answers = [c for c in one.answers if _length(c) == shortest]
    columns = [*one.perplexity, *answers]
    body = []
    for arm in _arms(columns):
        changes = [_change(c, arm) for c in columns]
        if any(changes):
            body.append([arm_name(_rows_of(arm, columns)[0]), *changes])
    notes = [
        "Perplexity with budgets over that with equal heads, and log-probability of right answers less that with equal "
        f"heads, in nats. {_counts(one.perplexity, answers)}"
    ]
    title = f"Budgets per head over equal heads: {one.context} tokens, {one.model}"
    return Table(title, ["selector", *(c.head for c in columns)], body, notes)


def _change(column: Column, arm: str) -> str:
    """What budgets change of one cell; "" where it was not measured with both at one density."""
    equal, shared = column.rows.get(arm), column.rows.get(arm + PER_HEAD)
    if not equal or not shared or not (reached(equal) and reached(shared)):
        return ""
    if equal[-1].what == "perplexity":
        return _signed(over(shared[-1], equal[-1]), 2, " %")
    found = answers_over(shared, equal)
    return "" if found is None else _signed(found, 2)


def _columns(rows: Sequence[Result], name: Callable[[Result], str]) -> list[Column]:
    """Columns of one kind of rows; sets of other documents have columns of their own."""
    found: dict[str, list[Result]] = {}
    order: dict[str, tuple] = {}
    for (_, text, _, _), panel in panels(rows).items():
        for title, part in _named(panel, name).items():
            number = sum(other == title or other.startswith(f"{title} (") for other in found)
            title = f"{title} ({number + 1})" if number else title
            found[title] = part
            order[title] = (text, part[0].cell.get("task", ""), part[0].context, number)
    columns = []
    for title in sorted(found, key=order.__getitem__):
        dense = [r for r in found[title] if kind(r) == "dense"]
        sparse = [r for r in found[title] if kind(r) != "dense" and r.density is not None]
        for density in sorted({r.density for r in sparse}, reverse=True):
            of = {arm: part for (arm,), part in group([r for r in sparse if r.density == density], "arm").items()}
            columns.append(Column(title, density, of, dense))
    return columns


def _named(rows: Sequence[Result], name: Callable[[Result], str]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for r in rows:
        found.setdefault(name(r), []).append(r)
    return found


def _question(row: Result) -> str:
    length = f"{row.context // 1024}k" if row.context % 1024 == 0 else f"{row.context}"
    return f"{row.cell['task'].replace('_', '-')} {length}"


def _length(column: Column) -> int:
    return next(rows[0].context for rows in column.rows.values())


def _arms(columns: Sequence[Column]) -> list[str]:
    return arms(r for c in columns for rows in c.rows.values() for r in rows)


def _rows_of(arm: str, columns: Sequence[Column]) -> list[Result]:
    return next(c.rows[arm] for c in columns if arm in c.rows)


def _lines(columns: Sequence[Column]) -> list[tuple[str, str]]:
    """Arms with the names of their lines, the dense model first."""
    return [("dense", "dense"), *((arm, arm_name(_rows_of(arm, columns)[0])) for arm in _arms(columns))]


def _in_brief(arm: str, columns: Sequence[Column], oracle: str | None) -> bool:
    of = kind(_rows_of(arm, columns)[0])
    if of == "gate":
        return arm.endswith(PER_HEAD) or arm + PER_HEAD not in _arms(columns)
    return arm in (oracle, STREAMING)


def _brief_name(arm: str, columns: Sequence[Column], told: bool) -> str:
    """What the short table calls an arm; whether gates have budgets is in their name where not all have."""
    row = _rows_of(arm, columns)[0]
    form = map_of(row)
    if form is not None:
        return f"best oracle: {map_name(form)}" + _per_head(arm)
    return f"gates: {arm if told else arm.removesuffix(PER_HEAD)}" if kind(row) == "gate" else arm


def _per_head(name: str) -> str:
    return PER_HEAD if name.endswith(PER_HEAD) else ""


def _loss(column: Column, arm: str, digits: int = 2) -> str:
    if arm == "dense":
        return f"{column.dense[-1].value:.2f}" if column.dense else ""
    rows = column.rows.get(arm)
    if not rows or not column.dense:
        return ""
    return _signed(over(rows[-1], column.dense[-1]), digits, " %") + at(rows)


def _answer(column: Column, arm: str, digits: int = 2) -> str:
    if arm == "dense":
        found = _answers(column.dense)
        return f"{statistics.mean(found).value:.2f}" if found else ""
    rows = column.rows.get(arm)
    change = answers_over(rows, column.dense) if rows else None
    return "" if change is None else _signed(change, digits) + at(rows)


def _gap(column: Column, arm: str, oracle: str | None) -> str:
    if arm in ("dense", oracle, STREAMING):
        return {oracle: "100%", STREAMING: "0%"}.get(arm, "")
    # The end is the oracle that the table shows.
    ends = [rows[-1] for name, rows in column.rows.items() if name in (oracle, STREAMING)]
    found = closed(column.rows[arm][-1], ends) if arm in column.rows else None
    return "" if found is None or found.ends is not None else f"{found.share:.0%}"


def _signed(found: statistics.Estimate, digits: int, unit: str = "") -> str:
    error = "" if found.stderr is None else f" ± {found.stderr:.{digits}f}"
    return f"{found.value:+.{digits}f}{error}{unit}"


def _losses(row: Result) -> dict[int, tuple[float, float]]:
    """Loss and tokens of every document; empty where they were not recorded whole."""
    columns = [row.samples.get(name, []) for name in ("documents", "losses", "tokens")]
    found = {document: (loss, tokens) for document, loss, tokens in zip(*columns)}
    whole = {len(found)} == set(map(len, columns)) and all(None not in pair and pair[1] > 0 for pair in found.values())
    return found if whole else {}


def _answers(rows: Iterable[Result]) -> list[float]:
    found = [value for r in rows for value in r.samples.get("log_prob", ())]
    return [] if None in found else found


def _counts(losses: Sequence[Column], answers: Sequence[Column]) -> str:
    """What the numbers rest on, and where they were measured."""
    parts = []
    for c in {c.name: c for c in losses if c.dense}.values():
        dense = c.dense[-1]
        parts.append(f"{c.name}: {len(dense.samples.get('documents', ()))} documents, {dense.n:,} tokens")
    sizes = sorted({sum(r.n for r in rows) for c in answers for rows in c.rows.values()})
    if sizes:
        parts.append(f"answers: {' or '.join(map(str, sizes))} documents each")
    devices = sorted({r.device for c in (*losses, *answers) for rows in c.rows.values() for r in rows if r.device})
    measured_on = f" Measured on {', '.join(devices)}." if devices else ""
    paired = "± is the standard error of the paired difference, over documents. Densities were counted."
    return f"{'; '.join(parts)}. {paired}{measured_on}"
