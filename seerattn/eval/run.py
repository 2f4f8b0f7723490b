"""Carrying out an experiment: every method at equal realised density, or at equal time, on the same text.

A cell is one method, at one density or share of the time, on one task at one context. Its setting is tuned on the first
sequences of the task, then it is measured; a cell that comes out elsewhere than it was tuned to is tuned again on all
of its sequences. Everything found is in the results file, settings included, so an experiment that is started again
does only what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from statistics import fmean, median

import torch

from seerattn.data.windows import digest
from seerattn.eval.choice import DENSE, UNITS, Choice
from seerattn.eval.experiment import Experiment
from seerattn.eval.tasks import Job
from seerattn.eval.tasks.perplexity import attention_times
from seerattn.eval.tasks.task import Setup
from seerattn.eval.tune import Curve, realised_density
from seerattn.hf.eval_model import EvalModel
from seerattn.methods.method import Budget, Method, Selectors
from seerattn.results.appending import NotWritten
from seerattn.results.environment import Stopwatch
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result

TUNED_WITHIN = 0.003  # of a density, on the sequences that the setting is tuned on
EQUAL_WITHIN = 0.01  # of a density, on all of them
TIME_WITHIN = 0.05  # of a time, relative
TIMED_FORWARDS = 3


@dataclass(frozen=True, eq=False)
class Cell:
    """One method at one budget in a job; dense has no budget.

    Attributes:
        job: the task at a context.
        method: the method.
        budget: what is made equal.
        asked: the density, the share of the dense attention's time, or the tokens that a decoded one may read; None of
            a setting of its own.
        last_rows_dense: query-block rows at the end that keep every block.
    """

    job: Job
    method: Method
    budget: Budget = "density"
    asked: float | None = None
    last_rows_dense: int = 0

    def __str__(self) -> str:
        asked = "" if self.asked is None else f" {self.asked:g}{UNITS.get(self.budget, '')}"
        rows = f", last {self.last_rows_dense} rows dense" if self.last_rows_dense else ""
        return f"{self.method}{asked}{rows}, {self.job}"


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


def make_jobs(experiment: Experiment, setup: Setup) -> list[Job]:
    """Reads and encodes the text of all tasks; those of one pass last, so that they find settings that others settled.

    Args:
        experiment: the experiment.
        setup: what their text is made with.

    Raises:
        ValueError: text that is missing, or too short for a context.
    """
    jobs = [job for task in experiment.tasks for job in task.jobs(setup)]
    return sorted(jobs, key=lambda job: job.together)


def make_cells(experiment: Experiment, jobs: Sequence[Job]) -> list[Cell]:
    """All cells in the order in which they run.

    What is measured in one pass of the dense model has no cells with dense last rows: it says how well blocks are
    chosen.
    """
    cells = []
    for job in jobs:
        for method in experiment.methods:
            if method.kind == "dense":
                cells += [Cell(job, method)] if job.has_dense else []
                continue
            asked: list[tuple[Budget, float | None]] = [("tokens", n) for n in job.decode_tokens]
            if not asked:
                asked = [("density", d) for d in experiment.densities]
                asked += [("time", t) for t in experiment.times] + [("own", None)]
            rows = (0,) if job.together else experiment.last_rows_dense
            cells += [
                Cell(job, method, budget, value, n) for budget, value in asked if budget in method.budgets for n in rows
            ]
    return cells


class Runner:
    """Runs the cells of an experiment.

    Args:
        model: its model.
        experiment: the experiment.
        jobs: the text, as of `make_jobs` with the model's tokenizer.
        output: where results go; cells that it already holds are not measured again.
    """

    def __init__(self, model: EvalModel, experiment: Experiment, jobs: Sequence[Job], output: ResultsFile) -> None:
        self._model, self._experiment, self._output = model, experiment, output
        self.cells = make_cells(experiment, jobs)
        self._selectors: dict[tuple[str, int], Selectors] = {}
        self._curves: dict[tuple[str, Budget, str], Curve] = {}
        self._dense_ms: dict[str, float] = {}
        self._digests: dict[tuple[Job, int], str] = {}

    def run(self) -> Iterator[Outcome]:
        """Measures what is missing, cell by cell in the order of `cells`; a cell that raises is an outcome as well."""
        with self._model.held():
            for job in dict.fromkeys(cell.job for cell in self.cells):
                cells = [cell for cell in self.cells if cell.job is job]
                if job.together:
                    yield from self._run_together(job, cells)
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
        dense = cell.method.kind == "dense"
        if dense or cell.job.beside_dense:
            # Others are compared with the dense model, which has no notes.
            draft = self._output.draft()
            rows = self._rows(cell.job, [DENSE], draft)
            self._output.adopt(draft)
        if dense:
            return Outcome(cell, rows)
        choice, setting = self._tuned(cell)
        draft = self._output.draft()
        rows = self._rows(cell.job, [choice], draft)
        if setting is not None and _is_off(cell, rows, setting) and self._count(cell.job) < len(cell.job.sequences):
            choice, setting = self._tuned(cell, all_inputs=True)
            draft = self._output.draft()
            rows = self._rows(cell.job, [choice], draft)
        note = None if setting is None else setting.cell.get("note")
        self._output.adopt(draft, note)
        return Outcome(cell, rows, note)

    def _rows(self, job: Job, choices: Sequence[Choice], output: ResultsFile) -> list[Result]:
        return job.measure(self._model, choices, output, batch=self._experiment.batch)

    def _run_together(self, job: Job, cells: Sequence[Cell]) -> Iterator[Outcome]:
        """All choices in one pass of the dense model; one by one if one of them raises."""
        chosen: dict[Cell, tuple[Choice, Result | None]] = {}
        failed: dict[Cell, Outcome] = {}
        for cell in cells:
            try:
                chosen[cell] = self._tuned(cell)
            except NotWritten:
                raise
            except Exception as error:
                failed[cell] = self._failed(cell, error)
        draft = self._output.draft()
        try:
            self._rows(job, [choice for choice, _ in chosen.values()], draft)
        except Exception:
            draft = self._output.draft()
            for cell, (choice, _) in chosen.items():
                try:
                    self._rows(job, [choice], draft)
                except Exception as error:
                    failed[cell] = self._failed(cell, error)
        self._output.adopt(draft)
        for cell in cells:
            if cell in failed:
                yield failed[cell]
            else:
                choice, setting = chosen[cell]
                note = None if setting is None else setting.cell.get("note")
                yield Outcome(cell, self._rows(job, [choice], self._output), note)

    def _count(self, job: Job) -> int:
        """Sequences that settings are tuned on."""
        return min(self._experiment.tuning_windows, len(job.sequences))

    def _tuned(self, cell: Cell, *, all_inputs: bool = False) -> tuple[Choice, Result | None]:
        """The choice of a cell with its setting, and the result that the setting is: found, or tuned now.

        Dense last rows come on top of the budget, for every method alike, so they share the setting. A method at a
        setting of its own is not tuned.
        """
        job, every = cell.job, len(cell.job.sequences)
        if cell.budget == "tokens":
            return Choice(cell.method, cell.method.decoders(self._model), cell.asked, cell.asked, "tokens"), None
        selectors = self._selectors_of(cell.method, job.context)
        choice = Choice(cell.method, selectors, None, cell.asked, cell.budget)
        if cell.budget == "own":
            own = replace(choice, setting=None, last_rows_dense=cell.last_rows_dense)
            return own, None
        counts = (every,) if all_inputs else (every, self._count(job))
        blanks = [self._blank_setting(choice, job, count) for count in counts]
        setting = next(filter(None, map(self._output.find, blanks)), None)
        if setting is None:
            setting = self._tune(choice, job, counts[-1], blanks[-1])
        return replace(choice, setting=setting.value, last_rows_dense=cell.last_rows_dense), setting

    def _blank_setting(self, choice: Choice, job: Job, count: int) -> Result:
        about = {"tuned_on": self._digest(job, count), "sequences": count}
        if choice.budget == "time":
            about["batch"] = self._experiment.batch
        return choice.result(
            self._model, what="setting", unit="sequences", context=job.context, text=job.text, cell=about
        )

    def _digest(self, job: Job, count: int) -> str:
        """Digest of the first sequences of a job, which every cell asks for."""
        if (job, count) not in self._digests:
            self._digests[job, count] = digest(job.sequences[:count])
        return self._digests[job, count]

    def _tune(self, choice: Choice, job: Job, count: int, blank: Result) -> Result:
        """Finds the setting of a choice on the first sequences of a job."""
        groups = _groups(job.sequences[:count], self._experiment.batch)
        where = f"by {choice.method} at {job.context} tokens"
        watch = Stopwatch(self._model.device)
        curve = self._curve(choice, blank.cell["tuned_on"], groups)
        samples: dict[str, list] = {}
        if choice.budget == "density":
            tuned = curve.tune_density(choice.asked, TUNED_WITHIN)
            density, far = tuned.reached, abs(tuned.reached - choice.asked) > EQUAL_WITHIN
            note = f"density {choice.asked:g} cannot be reached {where}: the nearest is {tuned.reached:.3f}"
        else:
            dense = self._dense_time(blank.cell["tuned_on"], groups)
            tuned = curve.tune(choice.asked * dense, TIME_WITHIN * choice.asked * dense)
            density, far = None, not tuned.met
            samples = {"dense_ms": [dense], "ms": [tuned.reached]}
            index, _ = attention_times(self._model, replace(choice, setting=tuned.setting), groups[:1])
            note = (
                f"{choice.asked:g} of the time of dense attention ({dense:.3g} ms a sequence) cannot be reached "
                f"{where}: the nearest is {tuned.reached / dense:.3f}, and choosing blocks alone takes "
                f"{index[0] / dense:.3f}"
            )
        settings, values = zip(*curve.measured)
        row = replace(
            blank,
            value=tuned.setting,
            n=count,
            realised_density=density,
            samples=samples | {"settings": list(settings), "values": list(values)},
            cell=blank.cell | ({"note": note} if far else {}),
        )
        return self._output.append(row, watch.seconds())

    def _curve(self, choice: Choice, tuned_on: str, groups: Sequence[Sequence[list[int]]]) -> Curve:
        """What was measured of a method on these sequences so far, which all its budgets of a kind share."""
        selectors = choice.selectors

        def density(setting: float) -> float:
            return realised_density(self._model, selectors.at(setting), groups)

        def milliseconds(setting: float) -> float:
            return self._time(replace(choice, setting=setting), groups)

        measure = density if choice.budget == "density" else milliseconds
        return self._curves.setdefault((str(choice.method), choice.budget, tuned_on), Curve(selectors, measure))

    def _dense_time(self, tuned_on: str, groups: Sequence[Sequence[list[int]]]) -> float:
        if tuned_on not in self._dense_ms:
            self._dense_ms[tuned_on] = self._time(DENSE, groups)
        return self._dense_ms[tuned_on]

    def _time(self, choice: Choice, groups: Sequence[Sequence[list[int]]]) -> float:
        """Median milliseconds a sequence of choosing blocks and attention."""
        often = -(-TIMED_FORWARDS // len(groups))
        times = attention_times(self._model, choice, [*groups] * often)
        return median(index + attention for index, attention in zip(*times))

    def _selectors_of(self, method: Method, context: int) -> Selectors:
        if (str(method), context) not in self._selectors:
            self._selectors[str(method), context] = method.selectors(self._model, context=context)
        return self._selectors[str(method), context]

    def _failed(self, cell: Cell, error: Exception) -> Outcome:
        """Writes down why a cell has no results; it is tried again when the experiment is started again."""
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        method, dense = cell.method, cell.method.kind == "dense"
        about = {} if dense else {"budget": cell.budget}
        about |= {"share": cell.asked} if cell.budget == "time" else {}
        about |= {"tokens": cell.asked} if cell.budget == "tokens" else {}
        blank = DENSE.result(
            self._model,
            what="failure",
            unit="cells",
            context=cell.job.context,
            text=cell.job.text,
            cell=cell.job.settings | about | {"task": cell.job.task},
        )
        row = replace(
            blank,
            samples={"error": [reason]},
            method=method.id,
            kind=method.kind,
            name=str(method),
            density=cell.asked if cell.budget == "density" else None,
            settings={} if dense else {"last_rows_dense": cell.last_rows_dense},
        )
        known = self._output.find(row)
        if known is None or known.samples != row.samples:
            self._output.append(row)
        return Outcome(cell, failure=reason)


def _groups(sequences: Sequence[list[int]], batch: int) -> list[list[list[int]]]:
    """Sequences that run together: neighbours of equal length, so many at a time."""
    found = []
    for _, same in groupby(sequences, key=len):
        alike = list(same)
        found += [alike[begin : begin + batch] for begin in range(0, len(alike), batch)]
    return found


def _is_off(cell: Cell, rows: Sequence[Result], setting: Result) -> bool:
    """Whether a cell came out at another density than the one it was tuned to.

    A density that cannot be reached comes out where its setting was, and tuning again would not help. Dense last rows
    are on top of the density, so a cell with some is not asked.
    """
    if cell.budget != "density" or cell.last_rows_dense:
        return False
    realised = fmean(row.realised_density for row in rows if row.what in ("perplexity", "accuracy", "task_score"))
    return abs(realised - cell.asked) > EQUAL_WITHIN and abs(realised - setting.realised_density) > TUNED_WITHIN
