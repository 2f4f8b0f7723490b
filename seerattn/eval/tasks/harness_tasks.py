"""Tasks of lm-evaluation-harness with their documents: found by name, read or made."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from seerattn.eval.tasks.ruler import RulerDocuments, replaced

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
    with quiet(), _silent_nltk(), ruler.making():
        manager = _manager(name, {"tokenizer": called, "max_seq_lengths": list(lengths)})
        for spec in {str(spec): spec for spec in _leaves(manager, name)}.values():
            task = spec if isinstance(spec, str) else spec["task"]
            # Documents are drawn from Python's own generator: the same ones, whichever other tasks are asked for.
            seed()
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


def seed() -> None:
    """Makes the generators that the harness draws from begin anew."""
    random.seed(_SEED)
    np.random.seed(_SEED)


@contextmanager
def quiet() -> Iterator[None]:
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
