"""`seerattn calibrate`: fits gates to text and saves what was found with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from seerattn.cli.evaluate import OutputOption
from seerattn.cli.options import from_options
from seerattn.cli.progress import progress_bars
from seerattn.cli.terminal import print_table, say
from seerattn.data.windows import cut_windows, digest, token_documents
from seerattn.eval.calibration import Text, calibrate_budgets, calibrate_thresholds
from seerattn.eval.tasks.perplexity import Perplexity
from seerattn.hf.eval_model import Loading
from seerattn.methods.gate import Gate
from seerattn.methods.gate.budgets import LADDER, check_ladder
from seerattn.options import check_options, option
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result
from seerattn.selection.map_form import MapForm


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What gates are fitted to.

    Attributes:
        budgets: find the densities of heads that miss least together, in place of thresholds.
        density: density that thresholds are to meet.
        recall: recall of the target map that they are to meet, in place of a density.
        per_head: one threshold a head, or one for all.
        on: what thresholds are compared with; "auto" is raw scores for gates that normalise them, else their softmax.
        ladder: mean densities of budgets, from the lowest that is wanted.
        gain: map of which budgets miss least, "" for the target of the gates.
    """

    model: str = option(help="Base model: a folder or the name of one on the Hub.")
    gates: Path = option(help="Folder of the gates.")
    data: tuple[str, ...] = option(help="Text: files, folders or datasets, of two documents at least.", repeat=True)
    budgets: bool = option(False, help="Find the densities of heads that miss least together.")
    density: float | None = option(None, help="Find thresholds that meet a density.", above=0, high=1)
    recall: float | None = option(None, help="Find thresholds that meet a recall of the target.", above=0, high=1)
    contexts: int = option(4096, help="Tokens of a window.", low=2)
    per_head: bool = option(True, help="One threshold a head, or one for all.", flag=False)
    on: Literal["auto", "score", "softmax"] = option("auto", help="What thresholds are compared with.", flag=False)
    ladder: tuple[float, ...] = option(LADDER, help="Mean densities of budgets.", above=0, below=1, flag=False)
    gain: str = option("", help="Map of which budgets miss least, keys:power; default: the gates' own.", flag=False)
    windows: int = option(1, help="Windows of each document, from its start; 0 for all.", low=0, flag=False)
    max_docs: int = option(0, help="Use the first so many documents; 0 for all.", low=0, flag=False)
    batch: int = option(1, help="Windows that run together.", low=1, flag=False)
    text: str = option("", help="What results call the text; default: the name of the data.", flag=False)

    def __post_init__(self) -> None:
        check_options(self)
        if [self.budgets, self.density is not None, self.recall is not None].count(True) != 1:
            raise ValueError("one of budgets, density and recall must be given, got none or several")
        if not self.budgets and (self.gain or self.ladder != LADDER):
            raise ValueError("ladder and gain must come with budgets, got them for thresholds; leave them out")
        if self.gain:
            MapForm.parse(self.gain)
        if not self.gates.is_dir():
            raise ValueError(f"gates must be a folder, got {self.gates}")
        check_ladder(self.ladder)


@from_options
def calibrate(
    calibration: Calibration,
    loading: Loading,
    output: OutputOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Save nothing with the gates.")] = False,
) -> None:
    """Fit gates to text: share densities among heads (--budgets), or find thresholds for a density or a recall.

    Every second document calibrates, the others check; what was found is saved with the gates. With budgets
    `TopK(density=...)` gives every head its share of that density, at all densities and lengths.
    """
    asked, context = calibration, calibration.contexts
    file = ResultsFile(output, loading.place)
    model = loading.load(asked.model, context=context)
    method = Gate(gates=asked.gates)
    model.gates(method.gates)
    count = asked.windows or None
    documents = token_documents(
        asked.data, model.tokenizer, limit=asked.max_docs or None, tokens=count and count * context
    )
    windows = cut_windows(documents, context=context, count=count, bos_token_id=model.bos_token_id)
    skipped = len(documents) - len({window.document for window in windows})
    if skipped:
        say(f"{skipped} of {len(documents)} documents are shorter than {context} tokens and left out")
    settings = {"windows": asked.windows, "min_tokens": 0, "data": digest(documents)}
    text = Text(windows, context, Perplexity(data=asked.data, text=asked.text).called, settings, asked.batch)
    with progress_bars() as progress:
        common = {"save": not dry_run, "progress": progress}
        if asked.budgets:
            gain = MapForm.parse(asked.gain) if asked.gain else None
            rows = calibrate_budgets(model, method, text, file, ladder=asked.ladder, gain=gain, **common)
        else:
            goal = "recall" if asked.density is None else "density"
            rows = calibrate_thresholds(
                model,
                method,
                text,
                file,
                goal=goal,
                value=asked.recall if asked.density is None else asked.density,
                per_head=asked.per_head,
                on=None if asked.on == "auto" else asked.on,
                **common,
            )
    _print(rows)
    if output is not None:
        say(f"results are in {output}")


def _print(rows: list[Result]) -> None:
    """A line for each policy that was measured: its density and its recall."""
    lines: dict[tuple[str, str], dict[str, Result]] = {}
    for row in rows:
        asked = "" if row.density is None else f"{row.density:g}"
        what = row.what.rpartition("_")[2]
        lines.setdefault((asked, row.cell.get("heads", "")), {})[what] = row
    body = [[*place, str(found["density"].n), *(_value(found[what]) for what in ("density", "recall"))]
            for place, found in lines.items()]  # fmt: skip
    print_table(["density", "heads", "n", "realised", "recall"], body, texts=("heads",))


def _value(row: Result) -> str:
    value = "not finite" if row.value is None else f"{row.value:.4g}"
    return value if row.stderr is None else f"{value} ± {row.stderr:.2g}"
