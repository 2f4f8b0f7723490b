"""RULER, LongBench and every other task of lm-evaluation-harness, with a significance test beside each score.

Perplexity and recall can look well while a task loses. So every task is run by the dense model, too, and the guard
compares the two document by document: the difference, its paired standard error and a two-sided test. Prompts are
prefilled through the selector under test; the tokens after them attend to everything, whether the model writes them or
they are the right answer, of which the likelihood is taken.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import random
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from seerattn.eval.choice import DENSE, Choice
from seerattn.eval.tasks.likelihood import LIKELIHOODS, right_answer
from seerattn.eval.tasks.ruler import WITH_ESSAYS, RulerDocuments, replaced
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
    from lm_eval.api.task import Task as LmEvalTask
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase

_LOCAL = Path(__file__).parent / "local"
# Long-context tasks of the harness by folder. Reading these takes .2 s; all folders take 17 s.
_FOLDERS = ("ruler", "longbench", "longbench2", "babilong", "infinitebench", "longproc", "scrolls")
_SUFFIXES = (".jsonl.gz", ".jsonl", ".json.gz", ".json")
_SEED = 1234


@dataclass(frozen=True, eq=False)
class LoadedTask:
    """A task with its documents.

    Attributes:
        name: what the harness calls it.
        task: the harness's own object.
        length: tokens of its documents, where they were made at a length (RULER).
        chosen: indices of the documents that are asked.
    """

    name: str
    task: LmEvalTask
    length: int | None
    chosen: list[int]

    def __str__(self) -> str:
        return self.name if self.length is None else f"{self.name} at {self.length}"

    @cached_property
    def digest(self) -> str:
        """Short hash of the chosen documents, which tells data of the same name apart."""
        state = hashlib.sha256()
        for index in self.chosen:
            state.update(json.dumps(self.task.eval_docs[index], sort_keys=True, default=str).encode())
        return state.hexdigest()[:12]

    @property
    def metrics(self) -> list[tuple[str, str]]:
        """Metrics and the filters of answers that they are taken after. RULER calls its metric by the length."""
        names = list(self.task.aggregation()) if self.length is None else [str(self.length)]
        # LongBench tasks say theirs twice, the second time as "score".
        names = [name for name in names if name != "score" or len(names) == 1]
        return [(name, chosen.name) for chosen in self.task._filters for name in names]

    @property
    def generated(self) -> int:
        """Tokens that are generated for an answer at most; 0 if none are."""
        if self.task.OUTPUT_TYPE != "generate_until":
            return 0
        return (self.task.config.generation_kwargs or {}).get("max_gen_toks", 256)


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


def load_tasks(
    name: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    data_dir: Path | None = None,
    lengths: Sequence[int] = (4096,),
    limit: int | None = None,
    essays: Sequence[str] = (),
    documents: Path | None = None,
) -> tuple[list[LoadedTask], dict[str, str]]:
    """Finds tasks and reads or makes their documents.

    Args:
        name: a task, group or tag of the harness, such as "ruler" or "longbench_qasper", or of those that come with
            this package for files: "local" and the tasks of that group.
        tokenizer: RULER measures its lengths with it.
        data_dir: folder of the files of local tasks.
        lengths: tokens of documents that are made (RULER), answers included.
        limit: the first so many documents of each task; None for all.
        essays: text in place of RULER's essays.
        documents: folder that keeps documents that are made, None without.

    Returns:
        The tasks, and for each one without data a sentence that says so.

    Raises:
        ValueError: a name that is unknown.
    """
    loaded, missing = [], {}
    called = getattr(tokenizer, "name_or_path", "") or "tokenizer"
    ruler = RulerDocuments(tokenizer, lengths, essays, documents)
    with _quiet(), _silent_nltk(), ruler.making():
        manager = _manager(name, {"tokenizer": called, "max_seq_lengths": list(lengths)})
        for spec in {str(spec): spec for spec in _leaves(manager, name)}.values():
            task = spec if isinstance(spec, str) else spec["task"]
            # Documents are drawn from Python's own generator: the same ones, whichever other tasks are asked for.
            _seed()
            try:
                # As the one member of a group, a task of the index may have settings of its own.
                settings = _settings(manager, spec, data_dir)
                kept = ruler.kept(task, limit)
                group = {"group": "chosen", "task": [settings | ({"custom_dataset": kept} if kept else {})]}
                for found, made in manager.load([group])["tasks"].items():
                    prepared = _prepare(found, made, limit)
                    if kept is None and prepared[0].length is not None:
                        ruler.keep(task, [made.eval_docs[index] for one in prepared for index in one.chosen])
                    loaded += prepared
            # A task's data comes from anywhere: from no Hub, no such file, a resource of NLTK, a script.
            except (OSError, LookupError, ValueError, RuntimeError, ImportError) as error:
                reason = " ".join(str(error).split())[:200]
                missing[task] = f"task {task} must have its data, got none: {reason}"
    return loaded, missing


def _manager(name: str, metadata: dict[str, Any]) -> TaskManager:
    """Tasks of the long-context folders and our own, or of all folders if that is not enough."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    root = Path(lm_eval.tasks.__file__).parent
    folders = [path for path in (root / folder for folder in _FOLDERS) if path.is_dir()]
    manager = TaskManager(include_defaults=False, include_path=[_LOCAL, *folders], metadata=metadata)
    # A tag may have tasks in other folders.
    if name in manager.all_subtasks or name in manager.all_groups:
        return manager
    if _is_written(name, root):
        manager = TaskManager(include_path=[_LOCAL], metadata=metadata)
    if name not in manager.all_tasks:
        raise ValueError(
            f"task must be one of this package or of lm-evaluation-harness {version('lm_eval')}, or local, got {name}"
        )
    return manager


def _is_written(name: str, root: Path) -> bool:
    """Whether some definition of a task holds a name: seen in a second, so that a misspelt one is refused soon."""
    definitions = (path for path in root.rglob("*") if path.suffix in ("", ".yaml", ".yml") and path.is_file())
    return any(name in path.read_text(encoding="utf-8", errors="replace") for path in definitions)


def _leaves(manager: TaskManager, name: str) -> list[str | dict]:
    """The single tasks that a name stands for, not loaded yet: one without data must not take the others with it."""
    if name in manager.all_groups:
        children = manager.task_index[name].cfg["task"]
        children = [children] if isinstance(children, str) else children
        return [leaf for one in children for leaf in (_leaves(manager, one) if isinstance(one, str) else [one])]
    if name in manager.all_tags:
        return [leaf for one in sorted(manager.task_index[name].tags) for leaf in _leaves(manager, one)]
    return [name]


def _settings(manager: TaskManager, spec: str | dict, data_dir: Path | None) -> dict:
    """A task with its settings: a local one reads the file that its definition names by stem."""
    entry = manager.task_index.get(spec) if isinstance(spec, str) else None
    if entry is None or entry.yaml_path is None or entry.yaml_path.parent != _LOCAL:
        return {"task": spec} if isinstance(spec, str) else spec
    stem = entry.cfg["dataset_kwargs"]["data_files"]["test"]
    if data_dir is None:
        raise ValueError(f"it is read from the file {stem}.jsonl.gz; give its folder as data-dir")
    paths = [path for path in (data_dir / (stem + suffix) for suffix in _SUFFIXES) if path.is_file()]
    if not paths:
        raise ValueError(f"{data_dir} has no {stem} with one of {', '.join(_SUFFIXES)}")
    return {"task": spec, "dataset_kwargs": {"data_files": {"test": str(paths[0])}}}


def _prepare(name: str, task: LmEvalTask, limit: int | None) -> list[LoadedTask]:
    """The task with the first documents, once for each length that there are documents of."""
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEED)
    by_length: dict[int | None, list[int]] = {}
    for index in range(len(task.eval_docs)):
        by_length.setdefault(task.eval_docs[index].get("max_length"), []).append(index)
    if not by_length:
        raise ValueError("it has no document")
    return [LoadedTask(name, task, length, indices[:limit]) for length, indices in by_length.items()]


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
        with _quiet():
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
            found = zip(*(self.harnessed.likelihoods[index] for index in self.job.loaded.chosen), strict=True)
            for metric, documents in zip(LIKELIHOODS, map(list, found), strict=True):
                scores[metric] = Score(*statistics.mean(documents), documents)
        return scores, density


def _evaluate(model: Any, loaded: LoadedTask, chat_template: bool) -> dict[str, Any]:
    """What the harness finds of a task with a model."""
    import lm_eval.api.task
    from lm_eval.evaluator import evaluate

    # The harness shows a bar of its own, for the moment in which it makes requests of documents.
    bar = replaced(lm_eval.api.task, "tqdm", lambda documents, **options: documents)
    with _quiet(), bar:
        _seed()
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
    with _quiet():
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


def _seed() -> None:
    random.seed(_SEED)
    np.random.seed(_SEED)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the harness and what it uses from telling of their defaults."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "jieba")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using slow pure-python SequenceMatcher")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _silent_nltk() -> Iterator[None]:
    """RULER asks NLTK for a model of sentences at import. Without a network it does without, where it needs none."""
    import nltk

    with replaced(nltk, "download", partial(nltk.download, print_error_to=io.StringIO())):
        yield
