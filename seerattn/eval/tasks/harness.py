"""RULER, LongBench and every other task of lm-evaluation-harness, with a significance test beside each score.

Perplexity and recall can look well while a task loses. So every task is run by the dense model, too, and the guard
compares the two document by document: the difference, its paired standard error and a two-sided test. Prompts are
prefilled through the selector under test; the tokens after them attend to everything, whether the model writes them or
they are the right answer, of which the likelihood is taken.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from seerattn.eval.choice import DENSE, Choice
from seerattn.eval.tasks.harness_tasks import LoadedTask, load_tasks, quiet, seed
from seerattn.eval.tasks.likelihood import LIKELIHOODS, right_answer
from seerattn.eval.tasks.ruler import WITH_ESSAYS, replaced
from seerattn.eval.tasks.task import Job, Progress, Setup, Task
from seerattn.extras import check_extra
from seerattn.hf.eval_model import EvalModel
from seerattn.options import option
from seerattn.results import statistics
from seerattn.results.environment import Stopwatch
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result
from seerattn.results.significance import guard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Score(NamedTuple):
    """What a model reaches in one metric of a task.

    Attributes:
        value: as the harness aggregates it.
        stderr: its standard error, None where it is not known.
        documents: score of each document where their mean is the value; empty otherwise.
    """

    value: float
    stderr: float | None
    documents: list[float]


@dataclass(frozen=True, eq=False)
class HarnessJob(Job):
    """A task of the harness with its documents.

    Attributes:
        loaded: the task.
        chat_template: puts prompts into the tokenizer's chat template.
        writes: whether answers are generated, of a task that has some generated.
        likelihood: whether the likelihood of right answers is taken, of such a task.
        about: what else identifies scores in results.
        encoded: token ids of texts, as they become known.
    """

    loaded: LoadedTask | None = None
    chat_template: bool = False
    writes: bool = True
    likelihood: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)
    encoded: dict[tuple[str, bool | None], array] = field(default_factory=dict)

    beside_dense = True

    def __str__(self) -> str:
        return str(self.loaded)

    @property
    def written(self) -> list[tuple[str, str]]:
        """Metrics of the harness and their filters."""
        return self.loaded.metrics if self.writes else []

    @property
    def metrics(self) -> list[tuple[str, str]]:
        """All metrics and filters."""
        return [*self.written, *(LIKELIHOODS if self.likelihood else [])]

    def measure(
        self,
        model: EvalModel,
        choices: Sequence[Choice],
        output: ResultsFile,
        *,
        batch: int = 1,
        progress: Progress | None = None,
    ) -> list[Result]:
        """Measures the score of every choice, and guards it against the dense model's, which is measured first.

        Returns:
            "task_score" of each choice and metric and, but for dense, "task_guard": the score minus the dense one's. A
            guard whose difference is significant at the level of 5 % says so in ``cell["note"]``.
        """
        runner = _Runner(model, self, batch)
        rows, dense = [], []
        for choice in [DENSE, *(choice for choice in choices if not choice.is_dense)]:
            blanks = [runner.blank(choice, *metric) for metric in self.metrics]
            with output.together() as cell:
                found = [cell.find(blank) for blank in blanks]
                if None in found:
                    watch = Stopwatch(model.device)
                    start = progress and (lambda total, label=f"{choice}, {self}": progress(label, total))
                    scores, density = runner.run(choice, start)
                    count, seconds = len(self.loaded.chosen), watch.seconds()
                    found = [
                        cell.setdefault(_filled(blank, scores[metric], count, density), seconds)
                        for blank, metric in zip(blanks, self.metrics, strict=True)
                    ]
                if choice.is_dense:
                    dense = found
                    rows += found if any(one.is_dense for one in choices) else []
                else:
                    pairs = zip(found, dense, strict=True)
                    rows += [*found, *(cell.setdefault(guard(*pair), pair[0].seconds) for pair in pairs)]
        return rows


@dataclass(frozen=True, eq=False)
class UnavailableJob(Job):
    """A task of the harness whose data is not here: what asks for it fails with the reason.

    Attributes:
        reason: why.
    """

    reason: str = ""

    def measure(self, model: EvalModel, choices: Sequence[Choice], output: ResultsFile, **options: Any) -> list[Result]:
        raise ValueError(self.reason)


class _Runner:
    """Runs a task of the harness on a model."""

    def __init__(self, model: EvalModel, job: HarnessJob, batch: int) -> None:
        with quiet():
            from seerattn.eval.tasks.harness_model import MiddleCutModel

            self.harnessed = MiddleCutModel(
                model.model,
                model.tokenizer,
                max_length=job.context,
                batch_size=batch,
                writes=job.writes,
                answer=partial(right_answer, job.loaded.task, chat_template=job.chat_template)
                if job.likelihood
                else None,
                encoded=job.encoded,
            )
        self.model, self.job = model, job

    def blank(self, choice: Choice, metric: str, chosen: str) -> Result:
        """A score without its value."""
        loaded = self.job.loaded
        cell = {
            "task": loaded.name,
            "metric": metric,
            "task_version": str(loaded.task.VERSION),
            "harness": version("lm_eval"),
            "documents": len(loaded.chosen),
            "data": loaded.digest,
            "chat_template": self.job.chat_template,
            **self.job.about,
        }
        return choice.result(
            self.model,
            what="task_score",
            unit="documents",
            context=loaded.length or self.job.context,
            text=loaded.name,
            cell=cell | ({} if chosen == "none" else {"filter": chosen}),
        )

    def run(
        self, choice: Choice, progress: Callable[[int], Callable[[int], None]] | None
    ) -> tuple[dict[tuple[str, str], Score], float]:
        """Scores by metric and filter, and the realised density of the task's prompts."""
        self.harnessed.progress = progress
        with choice.on(self.model) as run:
            results = _evaluate(self.harnessed, self.job.loaded, self.job.chat_template)
            density = run.density()
        name = self.job.loaded.name
        values, samples = results["results"][name], results["samples"][name]
        scores = {pair: _score(*pair, values, samples) for pair in self.job.written}
        if self.job.likelihood:
            # The harness counts the chosen documents, whatever their places among all are.
            asked = range(len(self.job.loaded.chosen))
            found = zip(*(self.harnessed.likelihoods[number] for number in asked), strict=True)
            for metric, documents in zip(LIKELIHOODS, map(list, found), strict=True):
                scores[metric] = Score(*statistics.mean(documents), documents)
        return scores, density


def _evaluate(model: Any, loaded: LoadedTask, chat_template: bool) -> dict[str, Any]:
    """What the harness finds of a task with a model."""
    import lm_eval.api.task
    from lm_eval.evaluator import evaluate

    # The harness shows a bar of its own, for the moment in which it makes requests of documents.
    bar = replaced(lm_eval.api.task, "tqdm", lambda documents, **options: documents)
    with quiet(), bar:
        seed()
        return evaluate(
            model,
            {"tasks": {loaded.name: loaded.task}},
            samples={loaded.name: loaded.chosen},
            apply_chat_template=chat_template,
            bootstrap_iters=1000,
        )


@dataclass(frozen=True, kw_only=True)
class HarnessTask(Task):
    """Any task or group of lm-evaluation-harness, such as "ruler" or "longbench_qasper", and "local" ones of files.

    Prompts are prefilled by the method under test; the tokens after them attend to everything. ``contexts`` are the
    lengths of documents that are made (RULER), answers included.

    Raises:
        ValueError: answers are neither generated nor is their likelihood taken.
    """

    id = "harness"

    name: str = option(help="What the harness calls it.")
    data_dir: Path | None = option(None, help="Folder with the files of local tasks.")
    longest: int = option(0, help="Longer prompts lose their middle; 0 for all that the model can take.", low=0)
    chat_template: bool = option(False, help="Put prompts into the model's chat template.")
    likelihood: bool = option(False, help="Also measure how likely right answers are, where answers are generated.")
    generate: int | None = option(
        None, help="Tokens of a generated answer at most; 0 takes likelihoods alone; default: the task's.", low=0
    )
    essays: tuple[str, ...] = option((), help="Text in place of the essays of RULER, which need a network.")
    documents: Path | None = option(None, help="Folder that keeps the documents of RULER, which take long to make.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generate == 0 and not self.likelihood:
            raise ValueError("likelihood must be true where no answer is generated, got generate=0 without it")

    def check(self) -> None:
        check_extra("tasks", f"task {self.name}, which is none of this package,")
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise ValueError(f"data_dir must be a folder, got {self.data_dir}")
        for source in self.essays:
            if not Path(source).exists():
                raise ValueError(f"essays must exist, got {source}")

    def jobs(self, setup: Setup) -> list[Job]:
        tokenizer, made = setup.tokenizer, self.contexts or setup.contexts
        most = self.longest or setup.longest or max(made)
        limits = [number for number in (self.max_docs, setup.limit) if number]
        loaded, missing = load_tasks(
            self.name,
            tokenizer=tokenizer,
            data_dir=self.data_dir,
            lengths=made,
            limit=min(limits, default=None),
            essays=self.essays,
            documents=self.documents,
        )
        gone = [UnavailableJob(name, name, most, [], reason=reason) for name, reason in missing.items()]
        return [*(self._job(tokenizer, one, most) for one in loaded), *gone]

    def _job(self, tokenizer: PreTrainedTokenizerBase, loaded: LoadedTask, longest: int) -> HarnessJob:
        if max(loaded.generated + 1, loaded.length or 0) > longest:
            raise ValueError(
                f"longest must hold {loaded} and its answers of {loaded.generated} tokens, got {longest}; "
                "use a longer one or shorter contexts"
            )
        if tokenizer.eos_token_id is None and loaded.generated:
            raise ValueError("the tokenizer must have an end-of-sequence token to generate, got none")
        if self.chat_template and getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("chat_template must be in the tokenizer, got none; leave the option out")
        about = {}
        if self.essays and loaded.name in WITH_ESSAYS:
            about["essays"] = "+".join(Path(source).name.split(".")[0] for source in self.essays)
        if self.generate and loaded.generated > self.generate:
            loaded.task.set_config(key="generation_kwargs", value={"max_gen_toks": self.generate}, update=True)
            about["generated"] = self.generate
        prompts = _prompts(tokenizer, loaded, longest, self.chat_template)
        options = {
            "loaded": loaded,
            "chat_template": self.chat_template,
            "writes": self.generate != 0 or not loaded.generated,
            "likelihood": self.likelihood and loaded.generated > 0,
            "about": about,
        }
        settings = {"data": loaded.digest, "chat_template": self.chat_template}
        return HarnessJob(loaded.name, loaded.name, longest, prompts, settings, **options)


def _prompts(
    tokenizer: PreTrainedTokenizerBase, loaded: LoadedTask, longest: int, chat_template: bool
) -> list[list[int]]:
    """Token ids of the prompts, as the model will see them."""
    with quiet():
        from seerattn.eval.tasks.harness_model import PromptRecorder

        recorder = PromptRecorder(tokenizer, max_length=longest)
    _evaluate(recorder, loaded, chat_template)
    return recorder.prompts


def _score(metric: str, chosen: str, values: dict, samples: list[dict]) -> Score:
    value, stderr = values[f"{metric},{chosen}"], values.get(f"{metric}_stderr,{chosen}")
    documents = [
        sample.get(metric)
        for sample in sorted(samples, key=lambda sample: sample["doc_id"])
        if sample["filter"] == chosen
    ]
    # Some metrics are no mean of documents: a perplexity, a correlation.
    plain = all(isinstance(score, int | float) for score in documents)
    if plain and math.isclose(value, float(np.mean(documents)), rel_tol=1e-9, abs_tol=1e-12):
        return Score(float(value), statistics.mean(documents).stderr, [float(score) for score in documents])
    return Score(float(value), stderr if isinstance(stderr, float) else None, [])


def _filled(blank: Result, score: Score, documents: int, density: float) -> Result:
    return replace(
        blank,
        value=score.value,
        stderr=score.stderr,
        n=len(score.documents) or documents,
        realised_density=density,
        samples={"scores": score.documents},
    )
