"""What a server counts, in the text format of Prometheus."""

from __future__ import annotations

from collections import Counter
from typing import Literal

Outcome = Literal["answered", "refused", "failed", "left"]
OUTCOMES: tuple[Outcome, ...] = ("answered", "refused", "failed", "left")
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1)


class Histogram:
    """How often values were at most so large."""

    def __init__(self, edges: tuple[float, ...]) -> None:
        self._edges = edges
        self._counts = [0] * len(edges)
        self._sum = 0.0
        self._n = 0

    def add(self, value: float) -> None:
        """Counts a value."""
        self._sum += value
        self._n += 1
        for number, edge in enumerate(self._edges):
            self._counts[number] += value <= edge

    def lines(self, name: str) -> list[str]:
        """The lines of a metric of this name."""
        buckets = [f'{name}_bucket{{le="{edge:g}"}} {count}' for edge, count in zip(self._edges, self._counts)]
        return [
            *buckets,
            f'{name}_bucket{{le="+Inf"}} {self._n}',
            f"{name}_sum {self._sum:g}",
            f"{name}_count {self._n}",
        ]


class Metrics:
    """Counts of one server."""

    def __init__(self) -> None:
        self._outcomes: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._density = Histogram(_SHARES)
        self._first = Histogram(_SECONDS)
        self._whole = Histogram(_SECONDS)

    def ended(self, outcome: Outcome) -> None:
        """Counts a request that gave no whole answer."""
        self._outcomes[outcome] += 1

    def answered(self, *, prompt: int, new: int, density: float, first: float, whole: float) -> None:
        """Counts an answer: tokens, density of its prompt, seconds to its first and its last token."""
        self._outcomes["answered"] += 1
        self._tokens["prompt"] += prompt
        self._tokens["answer"] += new
        self._density.add(density)
        self._first.add(first)
        self._whole.add(whole)

    def text(self, active: int) -> str:
        """All of it, with the number of requests that are under way."""
        lines = _about("requests_total", "counter", "Requests that ended, by how.")
        lines += [f'seerattn_requests_total{{outcome="{one}"}} {self._outcomes[one]}' for one in OUTCOMES]
        lines += _about("requests_active", "gauge", "Requests under way or waiting.")
        lines += [f"seerattn_requests_active {active}"]
        lines += _about("tokens_total", "counter", "Tokens of requests that were answered.")
        lines += [f'seerattn_tokens_total{{of="{one}"}} {self._tokens[one]}' for one in ("prompt", "answer")]
        for name, help, histogram in (
            ("prompt_density", "Share of the attention blocks of a prompt that was computed.", self._density),
            ("first_token_seconds", "From a request to the first token of its answer.", self._first),
            ("request_seconds", "From a request to the last token of its answer.", self._whole),
        ):
            lines += [*_about(name, "histogram", help), *histogram.lines(f"seerattn_{name}")]
        return "\n".join(lines) + "\n"


def _about(name: str, kind: str, help: str) -> list[str]:
    return [f"# HELP seerattn_{name} {help}", f"# TYPE seerattn_{name} {kind}"]
