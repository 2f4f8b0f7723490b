"""Comparison: every way of choosing blocks at equal realised density, and at equal time, on the same text.

A cell is one way of choosing blocks, at one density or share of the time, on one task at one context. Its knob is tuned
on the first sequences of the task, then it is measured; a cell that comes out elsewhere than it was tuned to is tuned
again on all of its sequences. Everything found is in the results file, knobs included, so a comparison that is started
again does only what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch

from seerattn.data.retrieval import RetrievalDocument
from seerattn.data.windows import Window, cut_windows, digest, token_documents
from seerattn.eval.arms import DENSE, Arm, Budget, EvalModel, Gates, TunedArm
from seerattn.eval.families import gate_family, make_family
from seerattn.eval.needle import Needle, evaluate_needle
from seerattn.eval.perplexity import attention_times, evaluate_perplexity
from seerattn.eval.recall import evaluate_recall, run_dense
from seerattn.eval.recipe import ModelEntry, Recipe, SelectorEntry, TaskEntry
from seerattn.eval.tune import Curve, realised_density
from seerattn.methods.family import Family
from seerattn.methods.gate.thresholds import Calibrator, threshold_level
from seerattn.results.appending import NotWritten
from seerattn.results.environment import Stopwatch
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TUNED_WITHIN = 0.003  # of a density, on the sequences that the knob is tuned on
EQUAL_WITHIN = 0.01  # of a density, on all of them
TIME_WITHIN = 0.05  # of a time, relative
TIMED_FORWARDS = 3
CALIBRATION_WINDOWS = 2  # of each document


@dataclass(frozen=True, eq=False)
class Job:
    """A task at a context, with its text.

    Attributes:
        task: the task.
        context: tokens of a sequence.
        inputs: token ids of all sequences that are measured.
        settings: what identifies the text in results.
        windows: the sequences of perplexity and recall.
        needles: the cells of a retrieval task with their documents.
    """

    task: TaskEntry
    context: int
    inputs: list[list[int]]
    settings: dict[str, Any]
    windows: list[Window] = field(default_factory=list)
    needles: dict[Needle, list[RetrievalDocument]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.task.task} on {self.task.text} at {self.context}"


@dataclass(frozen=True, eq=False)
class Cell:
    """One way of choosing blocks at one budget in a job; dense has no budget.

    Attributes:
        job: the task at a context.
        entry: the way of choosing blocks.
        budget: what is made equal.
        asked: the density, or the share of the dense attention's time.
        last_rows_dense: query-block rows at the end that keep every block.
    """

    job: Job
    entry: SelectorEntry
    budget: Budget = "density"
    asked: float | None = None
    last_rows_dense: int = 0

    def __str__(self) -> str:
        asked = "" if self.asked is None else f" {self.asked:g}" + (" of the time" if self.budget == "time" else "")
        rows = f", last {self.last_rows_dense} rows dense" if self.last_rows_dense else ""
        return f"{self.entry.name}{asked}{rows}, {self.job}"

    @property
    def tokens(self) -> int:
        """Tokens that a measurement of the cell runs through the model."""
        return len(self.job.inputs) * self.job.context


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        cell: the cell.
        rows: its results, found or measured.
        note: a sentence, such as that its density cannot be reached.
        failure: why there are no results.
    """

    cell: Cell
    rows: list[Result] = field(default_factory=list)
    note: str | None = None
    failure: str | None = None


def make_jobs(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, limit: int = 0) -> list[Job]:
    """Reads and encodes the text of all tasks; recall last, so that it finds knobs that perplexity has settled.

    Args:
        recipe: the recipe.
        tokenizer: the model's.
        limit: at most so many documents in each; 0 for all.

    Raises:
        ValueError: text that is missing, or too short for a context.
    """
    jobs = []
    read = lru_cache(partial(token_documents, tokenizer=tokenizer))
    for task in sorted(recipe.tasks, key=lambda task: task.task == "recall"):
        if task.task in ("perplexity", "recall"):
            docs = min(task.max_docs or limit, limit or task.max_docs) or None
            tokens = task.windows * max(task.contexts) or None
            documents = read(task.data, limit=docs, tokens=tokens)
            settings = {"windows": task.windows, "min_tokens": 0, "data": digest(documents)}
        else:
            documents = read(task.data, limit=task.max_docs or None)
            settings = {"data": digest(documents)}
        for context in task.contexts:
            if task.task in ("perplexity", "recall"):
                count, bos = task.windows or None, tokenizer.bos_token_id
                windows = cut_windows(documents, context=context, count=count, bos_token_id=bos)
                inputs = [window.input_ids for window in windows]
                jobs.append(Job(task, context, inputs, settings, windows=windows))
            else:
                bos = tokenizer.bos_token_id
                needles = {n: n.documents(tokenizer, documents, bos) for n in task.needles(context, limit)}
                # One of each depth first, as knobs are tuned on the first ones.
                inputs = [document.input_ids for together in zip(*needles.values()) for document in together]
                jobs.append(Job(task, context, inputs, settings, needles=needles))
    return jobs


def make_cells(recipe: Recipe, jobs: Sequence[Job]) -> list[Cell]:
    """All cells in the order in which they run.

    Recall has no cells with dense last rows: it says how well blocks are chosen.
    """
    cells = []
    for job in jobs:
        recall = job.task.task == "recall"
        for entry in recipe.selectors:
            if entry.selector == "dense":
                cells += [] if recall else [Cell(job, entry)]
                continue
            asked = [("density", d) for d in recipe.densities] + [("time", t) for t in recipe.times]
            rows = (0,) if recall else recipe.last_rows_dense
            cells += [Cell(job, entry, budget, value, n) for budget, value in asked for n in rows]
    return cells


def gates_of(recipe: Recipe, model: ModelEntry) -> list[Gates]:
    """The folders of gates that a recipe uses with a model, each once."""
    folders = [entry.file("gates", model.name) for entry in recipe.selectors if entry.selector == "gate"]
    return [Gates(folder.name, folder) for folder in dict.fromkeys(folders)]


class Comparison:
    """Runs the cells of a recipe on one model.

    Args:
        subject: the model, with `gates_of` loaded.
        model: its entry in the recipe.
        recipe: the recipe.
        jobs: the text, as of `make_jobs` with the model's tokenizer.
        output: where results go; cells that it already holds are not measured again.
    """

    def __init__(
        self, subject: EvalModel, model: ModelEntry, recipe: Recipe, jobs: Sequence[Job], output: ResultsFile
    ) -> None:
        self._subject, self._model, self._recipe, self._output = subject, model, recipe, output
        self.cells = make_cells(recipe, jobs)
        self._families: dict[tuple[str, int], Family] = {}
        self._calibrators: dict[tuple[Path, int], tuple[Calibrator, str]] = {}
        self._curves: dict[tuple[str, Budget, str], Curve] = {}
        self._dense_ms: dict[str, float] = {}

    def run(self) -> Iterator[Outcome]:
        """Measures what is missing, cell by cell in the order of `cells`; a cell that raises is an outcome as well."""
        with self._subject.held():
            for job in dict.fromkeys(cell.job for cell in self.cells):
                cells = [cell for cell in self.cells if cell.job is job]
                if job.task.task == "recall":
                    yield from self._run_recall(job, cells)
                else:
                    for cell in cells:
                        yield self._attempt(cell)

    def _attempt(self, cell: Cell) -> Outcome:
        try:
            return self._measure(cell)
        except NotWritten:
            raise
        # Whatever a method raises, out of memory included, the other cells go on.
        except Exception as error:
            return self._failed(cell, error)

    def _measure(self, cell: Cell) -> Outcome:
        if cell.entry.selector == "dense" or cell.job.task.task == "perplexity":
            # Perplexities are compared with that of the dense model, which has no notes.
            draft = self._output.draft()
            rows = self._rows(cell.job, [DENSE], draft)
            self._output.adopt(draft)
        if cell.entry.selector == "dense":
            return Outcome(cell, rows)
        arm, knob = self._tuned(cell)
        draft = self._output.draft()
        rows = self._rows(cell.job, [arm], draft)
        if _is_off(cell, rows, knob) and len(cell.job.inputs) > self._recipe.tuning_windows:
            arm, knob = self._tuned(cell, all_inputs=True)
            draft = self._output.draft()
            rows = self._rows(cell.job, [arm], draft)
        note = knob.cell.get("note")
        self._output.adopt(draft, note)
        return Outcome(cell, rows, note)

    def _rows(self, job: Job, arms: Sequence[Arm | TunedArm], output: ResultsFile) -> list[Result]:
        """Measures arms in a job, and returns the results that are theirs."""
        text = {"text": job.task.text, "settings": job.settings, "batch": self._recipe.batch}
        if job.task.task == "perplexity":
            rows = evaluate_perplexity(self._subject, arms, {job.context: job.windows}, output, timed=True, **text)
            return [row for row in rows if row.selector != "dense" or arms == [DENSE]]
        if job.task.task == "recall":
            return evaluate_recall(self._subject, arms, {job.context: job.windows}, output, **text)
        return evaluate_needle(self._subject, arms, list(job.needles), [], output, prepared=job.needles, **text)

    def _run_recall(self, job: Job, cells: Sequence[Cell]) -> Iterator[Outcome]:
        """All arms in one pass of the dense model; one by one if one of them raises."""
        arms: dict[Cell, tuple[TunedArm, Result]] = {}
        failed: dict[Cell, Outcome] = {}
        for cell in cells:
            try:
                arms[cell] = self._tuned(cell)
            except NotWritten:
                raise
            except Exception as error:
                failed[cell] = self._failed(cell, error)
        draft = self._output.draft()
        try:
            self._rows(job, [arm for arm, _ in arms.values()], draft)
        except Exception:
            draft = self._output.draft()
            for cell, (arm, _) in arms.items():
                try:
                    self._rows(job, [arm], draft)
                except Exception as error:
                    failed[cell] = self._failed(cell, error)
        self._output.adopt(draft)
        for cell in cells:
            if cell in failed:
                yield failed[cell]
            else:
                arm, knob = arms[cell]
                yield Outcome(cell, self._rows(job, [arm], self._output), knob.cell.get("note"))

    def _tuned(self, cell: Cell, *, all_inputs: bool = False) -> tuple[TunedArm, Result]:
        """The arm of a cell with its knob, and the result that the knob is: found, or tuned now.

        Dense last rows come on top of the budget, for every way of choosing blocks alike, so they share the knob.
        """
        job, every = cell.job, len(cell.job.inputs)
        family, gates = self._family(cell.entry, job.context)
        arm = TunedArm(family, None, cell.asked, cell.budget, gates=gates)
        counts = (every,) if all_inputs else (every, min(self._recipe.tuning_windows, every))
        blanks = [self._blank_knob(arm, job, count) for count in counts]
        knob = next(filter(None, map(self._output.find, blanks)), None)
        if knob is None:
            knob = self._tune(arm, job, counts[-1], blanks[-1])
        return replace(arm, knob=knob.value, last_rows_dense=cell.last_rows_dense), knob

    def _blank_knob(self, arm: TunedArm, job: Job, count: int) -> Result:
        settings = {"tuned_on": _digest(job, count), "sequences": count}
        if arm.budget == "time":
            settings["batch"] = self._recipe.batch
        return self._subject.result(
            arm, what="knob", unit="sequences", context=job.context, text=job.task.text, cell=settings
        )

    def _tune(self, arm: TunedArm, job: Job, count: int, blank: Result) -> Result:
        """Finds the knob of an arm on the first sequences of a job."""
        batch, sequences = self._recipe.batch, job.inputs[:count]
        groups = [sequences[begin : begin + batch] for begin in range(0, count, batch)]
        where = f"by {arm.family.name} at {job.context} tokens"
        watch = Stopwatch(self._subject.device)
        curve = self._curve(arm.family, arm.budget, blank.cell["tuned_on"], groups)
        samples: dict[str, list] = {}
        if arm.budget == "density":
            tuned = curve.tune_density(arm.asked, TUNED_WITHIN)
            density, far = tuned.reached, abs(tuned.reached - arm.asked) > EQUAL_WITHIN
            note = f"density {arm.asked:g} cannot be reached {where}: the nearest is {tuned.reached:.3f}"
        else:
            dense = self._dense_time(blank.cell["tuned_on"], groups)
            tuned = curve.tune(arm.asked * dense, TIME_WITHIN * arm.asked * dense)
            density, far = None, not tuned.met
            samples = {"dense_ms": [dense], "ms": [tuned.reached]}
            index, _ = attention_times(self._subject, replace(arm, knob=tuned.knob), groups[:1])
            note = (
                f"{arm.asked:g} of the time of dense attention ({dense:.3g} ms a sequence) cannot be reached {where}: "
                f"the nearest is {tuned.reached / dense:.3f}, and choosing blocks alone takes {index[0] / dense:.3f}"
            )
        knobs, values = zip(*curve.measured)
        row = replace(
            blank,
            value=tuned.knob,
            n=count,
            realised_density=density,
            samples=samples | {"knobs": list(knobs), "values": list(values)},
            cell=blank.cell | ({"note": note} if far else {}),
        )
        return self._output.append(row, watch.seconds())

    def _curve(self, family: Family, budget: Budget, tuned_on: str, groups: Sequence[Sequence[list[int]]]) -> Curve:
        """What was measured of a family on these sequences so far, which all its budgets of a kind share."""

        def density(knob: float) -> float:
            return realised_density(self._subject, family.at(knob), groups)

        def milliseconds(knob: float) -> float:
            return self._time(TunedArm(family, knob, 0.0, "time"), groups)

        measure = density if budget == "density" else milliseconds
        return self._curves.setdefault((family.name, budget, tuned_on), Curve(family, measure))

    def _dense_time(self, tuned_on: str, groups: Sequence[Sequence[list[int]]]) -> float:
        if tuned_on not in self._dense_ms:
            self._dense_ms[tuned_on] = self._time(DENSE, groups)
        return self._dense_ms[tuned_on]

    def _time(self, arm: Arm | TunedArm, groups: Sequence[Sequence[list[int]]]) -> float:
        """Median milliseconds a sequence of choosing blocks and attention."""
        often = -(-TIMED_FORWARDS // len(groups))
        times = attention_times(self._subject, arm, [*groups] * often)
        return median(index + attention for index, attention in zip(*times))

    def _family(self, entry: SelectorEntry, context: int) -> tuple[Family, Gates | None]:
        """The family of an entry, which for thresholds by head depends on the context, and its gates."""
        if entry.selector != "gate":
            if (entry.name, 0) not in self._families:
                plan = entry.file("plan", self._model.name)
                made = make_family(entry.selector, name=entry.name, options=entry.options, plan=plan)
                self._families[entry.name, 0] = made
            return self._families[entry.name, 0], None
        folder = entry.file("gates", self._model.name)
        gates = Gates(folder.name, folder)
        if (entry.name, context) not in self._families:
            policy, calibrated = entry.options.get("policy", "top_k"), (None, None)
            if policy == "head_thresholds":
                calibrated = self._calibrator(gates, context)
            self._families[entry.name, context] = gate_family(
                self._subject.gates(gates),
                name=entry.name,
                policy=policy,
                calibrator=calibrated[0],
                calibration=calibrated[1],
                budgets=self._subject.budgets(gates),
            )
        return self._families[entry.name, context], gates

    def _calibrator(self, gates: Gates, context: int) -> tuple[Calibrator, str]:
        """What gates score on the calibration text at a context, and the digest of that text."""
        if (gates.path, context) not in self._calibrators:
            tokens, bos = CALIBRATION_WINDOWS * context, self._subject.bos_token_id
            documents = token_documents(self._recipe.calibration, self._subject.tokenizer, tokens=tokens)
            windows = cut_windows(documents, context=context, count=CALIBRATION_WINDOWS, bos_token_id=bos)
            loaded = self._subject.gates(gates)
            calibrator = Calibrator(loaded, goal="density", on=threshold_level(loaded))
            run_dense(self._subject, calibrator.see, windows, batch=self._recipe.batch)
            self._calibrators[gates.path, context] = calibrator, digest(documents)
        return self._calibrators[gates.path, context]

    def _failed(self, cell: Cell, error: Exception) -> Outcome:
        """Writes down why a cell has no results; it is tried again when the comparison is started again."""
        if self._subject.device.type == "cuda":
            torch.cuda.empty_cache()
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        dense, gate = cell.entry.selector == "dense", cell.entry.selector == "gate"
        about = {} if dense else {"budget": cell.budget}
        about |= {"share": cell.asked} if cell.budget == "time" else {}
        blank = self._subject.result(
            DENSE,
            what="failure",
            unit="cells",
            context=cell.job.context,
            text=cell.job.task.text,
            cell=cell.job.settings | about | {"task": cell.job.task.task},
        )
        row = replace(
            blank,
            samples={"error": [reason]},
            selector="gate" if gate else cell.entry.name,
            gates=cell.entry.name if gate else None,
            density=cell.asked if cell.budget == "density" else None,
            policy=None if dense else {"last_rows_dense": cell.last_rows_dense},
        )
        known = self._output.find(row)
        if known is None or known.samples != row.samples:
            self._output.append(row)
        return Outcome(cell, failure=reason)


@lru_cache
def _digest(job: Job, count: int) -> str:
    """Digest of the first sequences of a job, which every cell asks for."""
    return digest(job.inputs[:count])


def _is_off(cell: Cell, rows: Sequence[Result], knob: Result) -> bool:
    """Whether a cell came out at another density than the one it was tuned to.

    A density that cannot be reached comes out where its knob was, and tuning again would not help. Dense last rows are
    on top of the density, so a cell with some is not asked.
    """
    if cell.budget == "time" or cell.last_rows_dense:
        return False
    realised = fmean(row.realised_density for row in rows if row.what in ("perplexity", "accuracy"))
    return abs(realised - cell.asked) > EQUAL_WITHIN and abs(realised - knob.realised_density) > TUNED_WITHIN
