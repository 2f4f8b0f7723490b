"""What the task files beside it need and lm-evaluation-harness has no metric for."""

from __future__ import annotations

from datasets import Dataset


def answers_found(doc: dict, results: list[str]) -> dict[str, float]:
    """The share of a document's answers that the text written for it holds, letters of either case."""
    written = results[0].lower()
    return {"found": sum(answer.lower() in written for answer in doc["answers"]) / len(doc["answers"])}


def one_question_each(documents: Dataset) -> Dataset:
    """A document for every question of paragraphs that have several."""
    return Dataset.from_list(
        [{"text": document["text"], **question} for document in documents for question in document["qas"]]
    )
