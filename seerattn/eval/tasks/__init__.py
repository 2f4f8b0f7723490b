"""Tasks: what is measured of a model, for every method in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seerattn.eval.tasks.continuation import Continuation
from seerattn.eval.tasks.harness import HarnessTask
from seerattn.eval.tasks.map_recall import MapRecall
from seerattn.eval.tasks.perplexity import Perplexity
from seerattn.eval.tasks.retrieval import KeyValue, MultiKey, PassKey, VariableTracking
from seerattn.eval.tasks.task import Job, Task
from seerattn.options import read_options

TASKS: dict[str, type[Task]] = {
    of.id: of for of in (Perplexity, PassKey, KeyValue, MultiKey, VariableTracking, MapRecall, Continuation)
}


def make_task(id: str, options: Mapping[str, Any]) -> Task:
    """A task by its id, or any of lm-evaluation-harness by its name there.

    Raises:
        ValueError: options that it does not take, or no such task where the harness is not installed.
    """
    named = {} if id in TASKS else {"name": id}
    return read_options(kind_of_task(id), {**named, **options}, where=f"options of {id}")


def kind_of_task(id: str) -> type[Task]:
    """The class of a task."""
    return TASKS.get(id, HarnessTask)


__all__ = ["TASKS", "Job", "Task", "kind_of_task", "make_task"]
