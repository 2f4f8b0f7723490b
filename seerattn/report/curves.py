"""Records of training runs: what they are told from, and how figures call them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seerattn.texts import check_kinds, parse_json, read_decompressed, short, visible

# A sparsity that ends so much higher than it began was meant to.
RISE = 0.05
# What every record of training has.
_FIELDS = {"step", "loss", "tokens_per_second"}
_KINDS: dict[str, Any] = {"step": int, "arm": str, "layer_loss": dict[str, float]}
_KINDS |= dict.fromkeys(("loss", "gate_loss", "sparsity"), float | None)
_KINDS |= {"layer_gate_loss": dict[str, float] | None}


@dataclass(frozen=True)
class Curve:
    """The records of one run.

    Attributes:
        name: what the figure calls it.
        records: one for every few steps: "step", "loss" (of the language model), "gate_loss", "layer_gate_loss",
            "sparsity", and more; None where a run has none of it.
    """

    name: str
    records: list[dict]

    @property
    def sparsity(self) -> float:
        """Sparsity at the end; 0 for a run without gates."""
        return self.records[-1].get("sparsity") or 0.0

    @property
    def label(self) -> str:
        """The name, and where sparsity rises during the run how far."""
        found = [r["sparsity"] for r in self.records if r.get("sparsity") is not None]
        rises = found and found[-1] - found[0] > RISE
        return f"{self.name}, sparsity {found[0]:.2g} to {found[-1]:.2g}" if rises else self.name

    def values(self, field: str) -> dict[int, float]:
        """Values of a field by step."""
        return {r["step"]: r[field] for r in self.records if r.get(field) is not None}


def is_curves(path: Path) -> bool:
    """Whether a file holds records of training, of one run or of several, and not results."""
    if ".jsonl" not in path.suffixes or not path.is_file():
        return False
    try:
        record = parse_json(read_decompressed(path).split(b"\n", 1)[0], constants=True)
    except ValueError:
        return False
    return isinstance(record, dict) and record.keys() >= _FIELDS


def as_finetuning(record: Mapping) -> dict:
    """A record of training with the names of fine-tuning.

    Distillation has no other loss than that of the gates, and calls it "loss", that of the layers "layer_loss".
    """
    record = dict(record)
    if "layer_loss" in record:
        record |= {"gate_loss": record.get("loss"), "loss": None, "layer_gate_loss": record.pop("layer_loss")}
    return record


def read_curves(paths: Sequence[Path]) -> list[Curve]:
    """Reads the records of runs; a half-written last line is ignored.

    A record without a name of its run ("arm") is one of the run whose folder the file lies in.

    Raises:
        ValueError: a line is no record.
    """
    found: dict[str, list[dict]] = {}
    for path in paths:
        *lines, _ = read_decompressed(path).split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                record = _parse(line)
            except ValueError as error:
                raise ValueError(
                    f"{path} must hold a record of training in every line, line {number} is none: {error}"
                ) from error
            name = record.get("arm", path.absolute().parent.name)
            found.setdefault(visible(name), []).append(as_finetuning(record))
    return [Curve(name, records) for name, records in found.items()]


def _parse(line: bytes) -> dict:
    record = parse_json(line, constants=True)
    if not isinstance(record, dict):
        raise ValueError(f"it must be an object, got {short(record)}")
    check_kinds(record, _KINDS)
    if "step" not in record:
        raise ValueError("it must have a step, got none")
    layers = record.get("layer_loss") or record.get("layer_gate_loss") or {}
    if not all(map(str.isdecimal, layers)):
        raise ValueError(f"losses of layers must be named by their numbers, got {short(list(layers))}")
    return record
