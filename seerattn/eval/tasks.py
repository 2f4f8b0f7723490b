"""RULER, LongBench and every other task of lm-evaluation-harness, with a guard line beside each score.

Perplexity and recall can look well while a task loses. So every task is run by the dense model, too, and the guard
compares the two document by document: the difference, its paired standard error and a two-sided test. Prompts are
prefilled through the selector under test; the tokens generated after them attend to everything.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from seerattn.eval.arms import DENSE, Arm, EvalModel, TunedArm
from seerattn.hf.loading import read_tokenizer
from seerattn.results import statistics
from seerattn.results.environment import Stopwatch
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result
from seerattn.results.significance import guard

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

_LOCAL = Path(__file__).parent / "local_tasks"
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
    task: Task
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
    names: Sequence[str],
    *,
    tokenizer: str,
    data_dir: Path | None = None,
    lengths: Sequence[int] = (4096,),
    limit: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[list[LoadedTask], dict[str, str]]:
    """Finds tasks and reads or makes their documents.

    Args:
        names: tasks, groups and tags of the harness, such as "ruler" or "longbench_qasper", and those that come with
            this package for files: "local" and the tasks of that group.
        tokenizer: name or folder of the tokenizer that RULER measures its lengths with.
        data_dir: folder of the files of local tasks.
        lengths: tokens of documents that are made (RULER), answers included.
        limit: the first so many documents of each task; None for all.
        trust_remote_code: whether code that comes with the tokenizer may run.

    Returns:
        The tasks, and for each one without data a sentence that says so.

    Raises:
        ValueError: a name that is unknown, no data at all, or the harness is not installed.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("tasks must have lm-evaluation-harness, got none; pip install 'seerattn[tasks]'")
    if data_dir is not None and not data_dir.is_dir():
        raise ValueError(f"data-dir must be a folder, got {data_dir}")
    if not names:
        raise ValueError("tasks must be names with commas between, such as ruler,longbench, got none")
    loaded, missing = [], {}
    with _quiet(), _silent_nltk(), _trusting(trust_remote_code):
        manager = _manager(names, {"tokenizer": tokenizer, "max_seq_lengths": list(lengths)})
        specs = [spec for name in names for spec in _leaves(manager, name)]
        for spec in {str(spec): spec for spec in specs}.values():
            name = spec if isinstance(spec, str) else spec["task"]
            # Documents are drawn from Python's own generator: the same ones, whichever other tasks are asked for.
            _seed()
            try:
                # As the one member of a group, a task of the index may have settings of its own.
                group = {"group": "chosen", "task": [_settings(manager, spec, data_dir)]}
                for found, task in manager.load([group])["tasks"].items():
                    loaded += _prepare(found, task, limit)
            # A task's data comes from anywhere: from no Hub, no such file, a resource of NLTK, a script.
            except (OSError, LookupError, ValueError, RuntimeError, ImportError) as error:
                reason = " ".join(str(error).split())[:200]
                missing[name] = f"task {name} must have its data, got none: {reason}"
    if not loaded:
        raise ValueError("; ".join(missing.values()))
    return loaded, missing


def _manager(names: Sequence[str], metadata: dict[str, Any]) -> TaskManager:
    """Tasks of the long-context folders and our own, or of all folders if that is not enough."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    root = Path(lm_eval.tasks.__file__).parent
    folders = [path for path in (root / folder for folder in _FOLDERS) if path.is_dir()]
    manager = TaskManager(include_defaults=False, include_path=[_LOCAL, *folders], metadata=metadata)
    # A tag may have tasks in other folders.
    if all(name in manager.all_subtasks or name in manager.all_groups for name in names):
        return manager
    manager = TaskManager(include_path=[_LOCAL], metadata=metadata)
    for name in names:
        if name not in manager.all_tasks:
            raise ValueError(
                f"tasks must be tasks or groups of lm-evaluation-harness {version('lm_eval')}, or local, got {name}"
            )
    return manager


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


def _prepare(name: str, task: Task, limit: int | None) -> list[LoadedTask]:
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


def evaluate_tasks(
    subject: EvalModel,
    arms: Sequence[Arm | TunedArm],
    tasks: Sequence[LoadedTask],
    output: ResultsFile,
    *,
    context: int,
    batch: int = 1,
    chat_template: bool = False,
    progress: Callable[[str, int], Callable[[int], None]] | None = None,
) -> list[Result]:
    """Measures the score of every arm in every task, and guards it against the dense model's.

    Args:
        subject: the model.
        arms: what to measure. The dense model is measured in any case.
        tasks: from `load_tasks`.
        output: where results go; tasks that an arm has finished are not run again.
        context: tokens of a prompt with its answer; longer prompts lose their middle.
        batch: prompts that are generated from together.
        chat_template: puts prompts into the tokenizer's chat template.
        progress: called with a description and a number of requests, returns what is told of finished ones.

    Returns:
        "task_score" of each task, arm and metric and, but for dense, "task_guard": the score minus the dense one's. A
        guard whose difference is significant at the level of 5 % says so in ``cell["note"]``.

    Raises:
        ValueError: a context too short for an answer, or a chat template that does not exist.
    """
    for loaded in tasks:
        if max(loaded.generated + 1, loaded.length or 0) > context:
            raise ValueError(
                f"context must hold {loaded} and its answers of {loaded.generated} tokens, got {context}; "
                "use a longer context or shorter lengths"
            )
    if subject.tokenizer.eos_token_id is None and any(loaded.generated for loaded in tasks):
        raise ValueError(f"the tokenizer must have an end-of-sequence token to generate, got none with {subject.name}")
    if chat_template and getattr(subject.tokenizer, "chat_template", None) is None:
        raise ValueError(f"chat-template must be in the tokenizer, got none with {subject.name}; leave the option out")
    rows = []
    runner = _Runner(subject, context, batch, chat_template)
    for loaded in tasks:
        dense: list[Result] = []
        for arm in [DENSE, *(arm for arm in arms if arm != DENSE)]:
            blanks = [runner.blank(arm, loaded, *metric) for metric in loaded.metrics]
            with output.together() as cell:
                found = [cell.find(blank) for blank in blanks]
                if None in found:
                    watch = Stopwatch(subject.device)
                    start = progress and (lambda total, label=f"{arm}, {loaded}": progress(label, total))
                    scores, density = runner.run(arm, loaded, start)
                    found = [
                        cell.setdefault(_filled(blank, scores[metric], len(loaded.chosen), density), watch.seconds())
                        for blank, metric in zip(blanks, loaded.metrics, strict=True)
                    ]
                rows += found
                dense = dense or found
                if arm != DENSE:
                    rows += [cell.setdefault(guard(*pair), pair[0].seconds) for pair in zip(found, dense, strict=True)]
    return rows


class _Runner:
    """Runs tasks of the harness on a subject's model."""

    def __init__(self, subject: EvalModel, context: int, batch: int, chat_template: bool) -> None:
        with _quiet():
            from seerattn.eval.harness import MiddleCutModel

            self.model = MiddleCutModel(subject.model, subject.tokenizer, max_length=context, batch_size=batch)
        self.subject, self.context, self.chat_template = subject, context, chat_template

    def blank(self, arm: Arm | TunedArm, loaded: LoadedTask, metric: str, chosen: str) -> Result:
        """A score without its value."""
        cell = {
            "task": loaded.name,
            "metric": metric,
            "task_version": str(loaded.task.VERSION),
            "harness": version("lm_eval"),
            "documents": len(loaded.chosen),
            "data": loaded.digest,
            "chat_template": self.chat_template,
        }
        return self.subject.result(
            arm,
            what="task_score",
            unit="documents",
            context=loaded.length or self.context,
            text=loaded.name,
            cell=cell | ({} if chosen == "none" else {"filter": chosen}),
        )

    def run(
        self, arm: Arm | TunedArm, loaded: LoadedTask, progress: Callable[[int], Callable[[int], None]] | None
    ) -> tuple[dict[tuple[str, str], Score], float]:
        """Scores by metric and filter, and the realised density of the task's prompts."""
        import lm_eval.api.task
        from lm_eval.evaluator import evaluate

        self.model.progress = progress
        # The harness shows a bar of its own, for the moment in which it makes requests of documents.
        bar = _replaced(lm_eval.api.task, "tqdm", lambda documents, **options: documents)
        with _quiet(), bar, self.subject.attached(arm) as run:
            _seed()
            results = evaluate(
                self.model,
                {"tasks": {loaded.name: loaded.task}},
                samples={loaded.name: loaded.chosen},
                apply_chat_template=self.chat_template,
                bootstrap_iters=1000,
            )
            density = run.density()
        values, samples = results["results"][loaded.name], results["samples"][loaded.name]
        return {pair: _score(*pair, values, samples) for pair in loaded.metrics}, density


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

    with _replaced(nltk, "download", partial(nltk.download, print_error_to=io.StringIO())):
        yield


@contextmanager
def _trusting(allowed: bool) -> Iterator[None]:
    """RULER reads its tokenizer with whatever code comes with it. Here that runs where it may, as everywhere."""
    from lm_eval.tasks.ruler import common_utils

    reader = SimpleNamespace(from_pretrained=lambda name, **_: read_tokenizer(name, trust_remote_code=allowed))
    with _replaced(common_utils, "AutoTokenizer", reader):
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
