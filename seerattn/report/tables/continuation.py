"""Long outputs: how each way of decoding goes on where the dense model does."""

from __future__ import annotations

import json
from collections.abc import Sequence

from seerattn.report import select
from seerattn.report.names import name_of
from seerattn.report.parts import Cell, Table, plain
from seerattn.results.record import Result

ID, TITLE = "continuation", "Long outputs"
READ = (
    "The dense model wrote a text after each prompt. Every method was given it token by token: its perplexity, beside "
    "that of the dense model, and how often its first choice is the dense model's. Then each wrote an answer of its "
    "own, greedily: how many tokens it has before it parts from the dense model's, and how many in all. Answers that "
    "get longer are a sign that something is missed. ± is the standard error over prompts, of perplexities that of the "
    "paired difference."
)
_HEAD = ["method", "tokens read", "density", "perplexity", "less dense", "same first choice", "alike", "answer"]
# Cell entries that say how, not what was asked.
_METHOD = ("block_q", "block_k", "budget", "tokens", "note")


def tables(results: Sequence[Result]) -> list[Table]:
    """A table of each text, context and kind of output."""
    rows = [r for r in results if r.what.startswith(("continuation_", "answer_")) and r.cell.get("phase") == "decode"]
    rows = [r for r in rows if r.cell.get("task") == ID]
    return [_table(of) for _, of in sorted(select.group(rows, _place).items())]


def _place(r: Result) -> tuple:
    rest = {name: value for name, value in sorted(r.cell.items()) if name not in _METHOD}
    return r.model, r.text, r.context, json.dumps([rest, r.weights.get("model"), r.seed])


def _table(rows: Sequence[Result]) -> Table:
    body = []
    for of_line in select.by_line(rows).values():
        for asked, cell in sorted(select.group(of_line, select.asked).items(), key=lambda part: -(part[0] or 0)):
            of = {r.what: r for r in cell}
            dense = cell[0].kind == "dense"
            whole = of.get("continuation_perplexity")
            body.append(
                [
                    name_of(cell[0]),
                    "all" if dense else f"{asked:g}",
                    "" if dense or whole is None else f"{whole.realised_density:.3f}",
                    _shown(whole, ".3f", error=False),
                    _shown(of.get("continuation_difference"), "+.3f"),
                    _shown(of.get("continuation_agreement"), ".3f"),
                    _shown(of.get("answer_common"), ".1f"),
                    _shown(of.get("answer_length"), ".1f"),
                ]
            )
    row, prompts = rows[0], max(r.n for r in rows)
    warm, asked = row.cell.get("temperature"), row.cell.get("instruction")
    text = f"drawn at temperature {warm:g}" if warm else "its greedy answer"
    notes = [f"{prompts} prompts, at most {row.cell['answer_tokens']} tokens each. The dense model's text is {text}."]
    notes += [f"Behind the text of a prompt stands, in the chat template: “{asked}”"] if asked else []
    if len({tuple(r.samples["dense_losses"]) for r in rows if "dense_losses" in r.samples}) > 1:
        notes.append("Methods ran apart, and each run drew a text of its own. “less dense” compares both on one text.")
    kind = f"{'answers to an instruction' if asked else 'plain text'}, {f'temperature {warm:g}' if warm else 'greedy'}"
    return plain(f"Long outputs: {row.context:,} tokens, {row.text}, {row.model}, {kind}", _HEAD, body, notes)


def _shown(row: Result | None, form: str, *, error: bool = True) -> Cell:
    if row is None:
        return Cell("")
    value = "not finite" if row.value is None else format(row.value, form)
    return Cell(value, format(row.stderr, form.lstrip("+")) if error and row.stderr is not None else "")
