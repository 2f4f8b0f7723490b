"""Results: one JSON line a measured value, appended as it is measured, read by tables and plots.

A line says what was measured, on what, how, and with which software and machine. Its `Result.key` names the cell it
fills, so an interrupted evaluation that is started again measures only what is missing.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch

from seerattn.outputs import check_output
from seerattn.results.appending import Appended
from seerattn.results.environment import environment
from seerattn.results.record import Result, could_be_cut, parse_line, to_line
from seerattn.texts import OPENERS, read_decompressed


class ResultsFile:
    """A file of results that is appended to. Results that were measured together are there together, or none of them.

    Nothing is created before the first `append`. What an interruption left at the end, a line that was cut off or a
    part of a group, is ignored, and removed when writing goes on. One process writes at a time.

    Args:
        path: the file, not a compressed one; None keeps results in memory only.
        device: what the measurements run on.

    Raises:
        ValueError: the file holds something else, or cannot be written.
        OSError: another process is writing it.
    """

    def __init__(self, path: Path | None, device: torch.device | str = "cpu") -> None:
        self.path = path
        self._by_key: MutableMapping[str, Result] = {}
        self._provenance = environment(device)
        if path is not None and path.suffix in OPENERS:
            raise ValueError(
                f"output must be a plain file, such as {path.with_suffix('')}, to be appended to, got {path}; "
                "decompress it first, or name another one"
            )
        if path is not None:
            # Locked before it is read, or another process may write in between.
            self._file = Appended(path)
            found = check_output(path, "output", "results", _scan)
            if found is not None:
                self._file.begin(size=found.size, whole=found.whole)
                self._by_key |= {result.key: result for result in found.results}

    def find(self, result: Result) -> Result | None:
        """The finished result of the same cell, if there is one."""
        return self._by_key.get(result.key)

    def append(self, result: Result, seconds: float | None = None) -> Result:
        """Writes a result, stamped with the environment.

        Returns:
            The result as it stands in the file.

        Raises:
            OSError: it could not be written; the file holds what it held before.
        """
        stamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
        result = replace(result, **self._provenance, seconds=seconds, timestamp=stamp)
        self._write([result])
        return result

    def draft(self) -> ResultsFile:
        """A file in memory that finds what this one holds; `adopt` writes what it was given."""
        draft = ResultsFile(None)
        draft._provenance, draft._by_key = self._provenance, ChainMap({}, self._by_key)
        return draft

    def adopt(self, draft: ResultsFile, note: str | None = None) -> None:
        """Writes the results of a draft as one, with a sentence for the reader if there is something to say."""
        results = list(draft._by_key.maps[0].values())
        # The note of a guard says that its difference is significant, and nothing else.
        noted = [r if r.what == "task_guard" else replace(r, cell=r.cell | {"note": note}) for r in results]
        self._write(noted if note else results)

    @contextmanager
    def together(self) -> Iterator[ResultsFile]:
        """A draft that is adopted when the ``with`` ends, and dropped if it raises."""
        draft = self.draft()
        yield draft
        self.adopt(draft)

    def setdefault(self, result: Result, seconds: float | None = None) -> Result:
        """The finished result of the same cell, or else this one, appended."""
        return self.find(result) or self.append(result, seconds)

    def _write(self, results: Sequence[Result]) -> None:
        if self.path is not None and results:
            count = len(results)
            parts = [[number, count] if count > 1 else None for number in range(1, count + 1)]
            lines = [to_line(replace(result, part=part)) for result, part in zip(results, parts)]
            self._file.append("".join(lines).encode())
        self._by_key.update({result.key: result for result in results})


class _Scan(NamedTuple):
    """What a results file holds: its results, its bytes, and those up to the end of the last whole group."""

    results: list[Result]
    size: int
    whole: int


def _scan(path: Path) -> _Scan:
    content = read_decompressed(path)
    results: list[Result] = []
    starts = [0]
    *lines, rest = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            results.append(parse_line(line.decode("utf-8")))
        except ValueError as error:
            raise ValueError(f"{path} must hold a result in every line, line {number} is none: {error}") from error
        starts.append(starts[-1] + len(line) + 1)
    if rest and not could_be_cut(rest.decode("utf-8", errors="replace")):
        raise ValueError(f"{path} must hold a result in every line, line {len(lines) + 1} is none, nor part of one")
    kept = len(results) - _unfinished(results)
    return _Scan(results[:kept], len(content), starts[kept])


def _unfinished(results: Sequence[Result]) -> int:
    """How many results at the end are the first ones of a group whose last ones are missing."""
    number, count = (results and results[-1].part) or (0, 0)
    first = [result.part for result in results[len(results) - number :]]
    # Where somebody took lines out of a file, those that are left stand for themselves.
    return number if number < count and first == [[n, count] for n in range(1, number + 1)] else 0


def read_results(paths: Sequence[Path]) -> list[Result]:
    """Reads results files, plain or compressed as .gz, .bz2 or .xz.

    What an interruption left at the end, half a line or a part of a group, is ignored.

    Raises:
        ValueError: a file is missing or a line is not a result.
    """
    results = []
    for path in paths:
        if not path.is_file():
            raise ValueError(f"results must be files of JSON lines, got {path}, which is none")
        results += _scan(path).results
    return results
