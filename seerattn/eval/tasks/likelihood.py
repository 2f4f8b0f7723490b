"""The right answer of a task that writes answers, as the text that the model would have to go on with.

Small models fail long tasks whatever their attention does, and then a score says nothing of it. How likely the right
answer is still does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lm_eval.api.task import Task as LmEvalTask


class Likelihood(NamedTuple):
    """Of a right answer after its prompt.

    Attributes:
        log_prob_per_token: mean log-probability of its tokens, nats.
        first_choice: 1 where each of its tokens is the most probable one, so that a model that writes would write it.
    """

    log_prob_per_token: float
    first_choice: float


# Metrics, and the filter of answers that they are taken after.
LIKELIHOODS = [(name, "none") for name in Likelihood._fields]


def _listed(answers: Sequence[str]) -> str:
    return " ".join(f"{number}. {answer}" for number, answer in enumerate(answers, 1))


# Of these tasks of RULER all answers are asked for, and in these forms are examples in their prompts. Where others have
# several answers, each is right.
_ALL: dict[str, Callable[[Sequence[str]], str]] = {
    "niah_multivalue": ", ".join,
    "niah_multiquery": ", ".join,
    "ruler_fwe": " ".join,
    "ruler_vt": " ".join,
    "ruler_cwe": _listed,
}


def right_answer(task: LmEvalTask, document: Mapping[str, Any], *, chat_template: bool) -> str:
    """How a prompt goes on if the answer is right: a delimiter and the target, as the harness joins them.

    Args:
        task: of lm-evaluation-harness, one that writes answers.
        document: one of its documents.
        chat_template: whether prompts are in one. An answer that is a turn of its own has no delimiter then.

    Raises:
        ValueError: the document has no answer.
    """
    target = task.doc_to_target(document)
    if isinstance(target, list | tuple):
        answers = [str(answer) for answer in target]
        target = _ALL.get(task.config.task, lambda several: several[0])(answers) if answers else ""
    if not str(target).strip():
        raise ValueError(f"documents must have an answer for its likelihood, got one of {task.config.task} without")
    if task.doc_to_prefix(document):
        return f" {target}"
    return str(target) if chat_template else f"{task.config.target_delimiter}{target}"
