"""`Session`: one run of a benchmark. It measures what its results file lacks and survives a variant that fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from seerattn.results.environment import environment
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result


class CheckFailed(RuntimeError):
    """A computation that is not what it should be; it is not timed."""


class Session:
    """What the measurements of one command share.

    Args:
        device: where they run.
        file: where results go; cells that it already holds are not measured again.
        say: told every result and everything that is left out, as it happens.
        time_limit: seconds after which nothing new is begun; None for no limit.

    Attributes:
        failures: what went wrong, one sentence each.
        left_out: cells that the time limit left unmeasured.
    """

    def __init__(
        self,
        device: torch.device,
        file: ResultsFile,
        say: Callable[[str], None] = lambda text: None,
        *,
        time_limit: float | None = None,
    ) -> None:
        self.device, self.file, self.say = device, file, say
        self.failures: list[str] = []
        self.left_out: list[str] = []
        self._refused: set[str] = set()
        self._checks: dict[str, Exception | None] = {}
        self._begin, self._limit = time.monotonic(), time_limit

    @property
    def device_name(self) -> str:
        """As results name it. It belongs to what a benchmark measures, so it also stands in every cell."""
        return environment(self.device)["device"]

    @property
    def out_of_time(self) -> bool:
        return self._limit is not None and time.monotonic() - self._begin > self._limit

    def blank(self, what: str, *, model: str, context: int, impl: str, cell: dict[str, Any], **values: Any) -> Result:
        """A result without a value: what it will be found by."""
        values = {"method": "dense", "kind": "dense", "name": "dense", "text": "random", "unit": "runs"} | values
        cell = {"impl": impl, "device": self.device_name} | cell
        return Result(what=what, value=None, n=0, model=model, context=context, cell=cell, **values)

    def measured(self, blank: Result, run: Callable[[], dict[str, Any]], *, label: str) -> Result | None:
        """`measured_together` for one quantity."""
        return self.measured_together([blank], lambda: {blank.what: run()}, label=label)[0]

    def measured_together(
        self, blanks: Sequence[Result], run: Callable[[], dict[str, dict[str, Any]]], *, label: str
    ) -> list[Result | None]:
        """The finished results of some cells, or new ones from one run that measures them all.

        Args:
            blanks: the cells, which differ in what they measure.
            run: checks and measures; returns fields of the results by what they measure.
            label: what it is, for people.

        Returns:
            None where there is no result: the variant cannot serve these cells, or failed, or time is up. A variant
            that ran out of memory has results without a value.
        """
        found = [self.file.find(blank) for blank in blanks]
        if None not in found:
            return found
        if self.out_of_time:
            self.left_out.append(label)
            return found
        begin = time.perf_counter()
        try:
            fields = run()
        except torch.OutOfMemoryError:
            self.release()
            fields = {blank.what: {"samples": {"error": ["out of memory"]}} for blank in blanks}
        except CheckFailed as error:
            self._fail(str(error))
            return found
        except ValueError as error:
            # The op's own sentence: not installed, or not for this shape.
            self._refuse(f"{blanks[0].cell['impl']}: {_sentence(error)}")
            return found
        except Exception as error:
            # Whatever a compiler or a driver raises must not cost the other variants their measurement.
            self._fail(f"{blanks[0].cell['impl']}: {_sentence(error)}")
            return found
        seconds = round(time.perf_counter() - begin, 3)
        with self.file.together() as cell:
            rows = [cell.setdefault(replace(blank, **fields[blank.what]), seconds) for blank in blanks]
        self.say(f"{label}: {', '.join(map(shown, rows))}")
        return rows

    def check(self, name: str, run: Callable[[], tuple[float, float]], *, oracle: str = "its fp64 oracle") -> None:
        """Compares a variant with its oracle, once a session.

        Args:
            name: what is checked.
            run: returns an error and the bound that it must keep.
            oracle: what it is compared with.

        Raises:
            CheckFailed: the error is larger, or not a number.
        """
        if name not in self._checks:
            try:
                error, bound = run()
                if not error <= bound:
                    raise CheckFailed(f"{name} does not match {oracle}, error {error:.2e}, bound {bound:.2e}")
                self._checks[name] = None
                self.say(f"checked {name}: error {error:.2e}, bound {bound:.2e}")
            except Exception as error:
                self._checks[name] = error
        if self._checks[name] is not None:
            raise self._checks[name]

    def release(self) -> None:
        """Gives cached memory back, before something large or after it failed."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _refuse(self, reason: str) -> None:
        if reason not in self._refused:
            self._refused.add(reason)
            self.say(f"left out, {reason}")

    def _fail(self, reason: str) -> None:
        if reason not in self.failures:
            self.failures.append(reason)
            self.say(f"FAILED {reason}")


UNITS = {
    "attention_ms": "ms",
    "attention_training_ms": "ms with backward",
    "selection_ms": "ms",
    "host_ms": "ms of the host",
    "decode_host_ms": "ms of the host",
    "prefill_ms": "ms",
    "decode_ms": "ms a token",
    "decode_attention_ms": "ms",
    "decode_select_ms": "ms",
    "attention_map_ms": "ms",
    "extra_memory_mib": "MiB beyond the results",
    "ttft_s": "s",
    "serve_first_s": "s to the first token",
    "serve_tokens_per_second": "tokens/s",
    "finetune_layer_ms": "ms with backward",
    "finetune_step_ms": "ms a step",
    "attention_share": "of it attention",
    "peak_memory_gib": "GiB at the peak",
    "tokens_per_second": "tokens/s",
    "distill_hours": "hours",
    "step_s": "s a step",
    "link_gb_per_second": "GB/s",
}


def of_gates(form: str) -> dict[str, str]:
    """What results say of gates with random weights."""
    return {"method": "gate", "kind": "learned", "name": form}


def shown(row: Result) -> str:
    """The value of a result with its unit, for people."""
    if row.value is None:
        return row.samples.get("error", ["not finite"])[0]
    if row.what == "attention_share":
        value = f"{row.value:.0%}"
    else:
        value = f"{row.value:,.0f}" if row.value >= 1000 else f"{row.value:.4g}"
    return f"{value} {UNITS[row.what]}"


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
