"""A record: one measured value with all that it was measured on, as a line of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache
from typing import Any, Literal, get_args, get_type_hints

from seerattn.results.migration import EARLIER_FIELDS, is_earlier, upgraded
from seerattn.texts import check_kinds, fits, map_texts, parse_json, short

# What a method looks at: the true map, what it learned of it, the prompt alone, or neither.
Kind = Literal["dense", "oracle", "learned", "training-free", "static"]
KINDS: tuple[str, ...] = get_args(Kind)

# What a result says of how it came about; two results that differ in nothing else fill the same cell.
_PROVENANCE = ("value", "n", "stderr", "realised_density", "samples", "versions", "device", "git", "command")
_PROVENANCE += ("seconds", "timestamp", "part")

# Kinds of what readers of records know by name, where it is there at all.
_CELL: dict[str, Any] = (
    dict.fromkeys(("task", "metric", "filter", "note", "dtype", "device", "impl", "work", "launch", "clock"), str)
    | dict.fromkeys(("block_q", "block_k", "rows_alike", "mask_heads", "layers", "layer", "batch", "at_once"), int)
    | {"tokens": int, "phase": str}
    | {"budget": str, "depth": float, "share": float | str, "target_share": float, "map": bool}
    | {"training": dict[str, Any]}
)
_SAMPLES: dict[str, Any] = (
    dict.fromkeys(("losses", "tokens", "scores", "log_prob"), list[float | None])
    | dict.fromkeys(("p", "dense", "score"), list[float | None])
    | dict.fromkeys(("agreed", "common", "lengths", "dense_losses", "answer_density"), list[float | None])
    | {"index": list[float], "attention": list[float], "skipped": list[float], "head_density": list[list[float]]}
    | {"documents": list[int], "error": list[str]}
)
_TRAINING: dict[str, Any] = {
    "name": str,
    "sparsity": float | None,
    "target_share": float | None,
    "target_every": int | None,
    "annealed": Any,
}
_SETTINGS: dict[str, Any] = {"last_rows_dense": int, "setting": float, "target": str, "budgets": str}
# What a quantity is nothing without: of its cell, of its samples.
_NEEDED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "accuracy": (("task",), ()),
    "task_score": (("task", "metric"), ()),
    "task_guard": (("task", "metric"), ("p", "dense", "score")),
}
# Of a measurement by `seerattn bench`, which says the device in its cell; with blocks, and of a whole model.
_BENCH, _BENCH_BLOCKS, _BENCH_MODEL = ("impl",), ("block_q", "block_k", "share"), ("layers",)
_BENCH_SPARSE = ("attention_ms", "selection_ms", "ttft_s", "serve_first_s", "serve_tokens_per_second")
_BUDGETS = ("density", "time", "own", "tokens")
# Of what others are divided by, or drawn on a logarithmic axis.
_POSITIVE = ("perplexity", "attention_ms", "selection_ms", "attention_map_ms", "ttft_s", "finetune_layer_ms")
_POSITIVE += ("continuation_perplexity",)
_POSITIVE += ("finetune_step_ms", "tokens_per_second", "distill_hours", "serve_first_s", "serve_tokens_per_second")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measured value.

    Attributes:
        what: the quantity, such as "perplexity", "accuracy" or "target_recall".
        value: the value; None where it is not finite, which JSON cannot hold.
        n: how many samples it rests on, in `unit`.
        unit: what `n` counts: "tokens", "documents", "sequences".
        stderr: standard error of the value, None where it is not known.
        model: name or folder of the base model.
        method: id of the way of choosing blocks, see `seerattn.methods`.
        kind: what that method looks at, among `KINDS`.
        name: what tables call its line: of gates their name, of others the id and what tells variants apart.
        weights: fingerprints of the model's and the gates' weights, see `fingerprint`.
        settings: what else defines the method: its options, the "setting" that was tuned, the digest of a plan or of
            budgets, query-block rows at the end that keep every block ("last_rows_dense").
        density: density that was asked for, None if none was.
        realised_density: counted, forced blocks included, averaged over layers, heads and documents.
        context: tokens of the context.
        text: kind of text.
        seed: seed of generated documents, None where nothing is drawn.
        cell: everything else that sets this value apart: layer, head, depth, limits of the data, dtype, "budget" (what
            was asked for, a density, a share of the time of dense attention or tokens that each decoded one may read)
            and "share" or "tokens". A "note" there is a sentence for the reader and sets nothing apart.
        samples: what a reader needs to compare rows sample by sample, such as the summed loss of each document.
        versions: of seerattn, torch, transformers and python.
        device: the accelerator or processor.
        git: commit of the source, "+" appended if files were changed; None outside of a checkout.
        command: the command line.
        seconds: wall time of the measurement; values measured together share it.
        timestamp: UTC, ISO 8601.
        part: place in a group of results that were written as one, from 1, and the size of that group; None alone.
    """

    what: str
    value: float | None
    n: int
    unit: str
    model: str
    method: str
    kind: Kind
    name: str
    context: int
    text: str
    stderr: float | None = None
    weights: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    density: float | None = None
    realised_density: float | None = None
    seed: int | None = None
    cell: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    git: str | None = None
    command: str = ""
    seconds: float | None = None
    timestamp: str = ""
    part: list[int] | None = field(default=None, compare=False)

    @property
    def key(self) -> str:
        """Canonical JSON of what was asked for: equal for two measurements of the same cell."""
        asked = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _PROVENANCE}
        asked["cell"] = {name: value for name, value in self.cell.items() if name != "note"}
        return json.dumps(asked, sort_keys=True)

    @property
    def line(self) -> str:
        """Name of the line this value belongs to in a table or figure; blocks of another size than 64 are told."""
        blocks = self.cell.get("block_k", 64)
        return self.name if self.kind == "learned" or blocks == 64 else f"{self.name} {blocks}"

    def sampled(self, name: str) -> list:
        """The samples of a name, of a record that is to be computed with.

        Raises:
            ValueError: it has none, as where somebody took them out.
        """
        if name not in self.samples:
            raise ValueError(f"results must hold the {name} of every {self.what}, got one of {self.line} without")
        return self.samples[name]


def to_line(result: Result) -> str:
    """The result as a line of JSON."""
    return json.dumps(_finite(asdict(result))) + "\n"


def parse_line(line: str | bytes) -> Result:
    """Reads what `to_line` wrote.

    Raises:
        ValueError: it is something else; says what.
    """
    values = parse_json(line)
    if not isinstance(values, dict):
        raise ValueError(f"it must be an object, got {short(values)}")
    values = upgraded(values) if is_earlier(values) else values
    hints = _hints()
    unknown, missing = sorted(values.keys() - hints), [name for name in _required() if name not in values]
    if unknown or missing:
        raise ValueError(f"it must have fields of this version, got {short(unknown)}, without {missing}")
    check_kinds(values, hints)
    cell, samples = values.get("cell", {}), values.get("samples", {})
    for known, of, where in (
        (_CELL, cell, "cell."),
        (_SAMPLES, samples, "samples."),
        (_TRAINING, cell.get("training", {}), "cell.training."),
        (_SETTINGS, values.get("settings", {}), "settings."),
    ):
        check_kinds(of, known, where)
    _check_whole(values, cell, samples)
    return Result(**values)


def _check_whole(values: Mapping[str, Any], cell: Mapping[str, Any], samples: Mapping[str, Any]) -> None:
    """Refuses a record without what its quantity needs, or at odds with itself."""
    needed, of_samples = _NEEDED.get(values["what"], ((), ()))
    if "device" in cell:
        needed += _BENCH
        if values["what"] in _BENCH_SPARSE and values["kind"] != "dense":
            needed += _BENCH_BLOCKS
            if values.get("density") is None:
                raise ValueError(f"a record of {short(values['what'])} with blocks must have a density, got none")
        if values["what"] == "ttft_s":
            needed += _BENCH_MODEL
    # The share of a budget of time is a number, and says nothing of lists.
    if "block_k" in cell or isinstance(cell.get("share"), str):
        needed += ("block_q", "block_k")
    if cell.get("task") == "passkey" and values["what"] == "accuracy":
        needed += ("depth",)
    lacking = [f"cell.{name}" for name in needed if name not in cell]
    lacking += [
        f"cell.training.{name}" for name in ("training" in cell and _TRAINING) or () if name not in cell["training"]
    ]
    lacking += [f"samples.{name}" for name in of_samples if name not in samples]
    if lacking:
        raise ValueError(f"a record of {short(values['what'])} must have {', '.join(lacking)}, got none")
    if cell.get("budget", "density") not in _BUDGETS:
        raise ValueError(f"cell.budget must be one of {', '.join(_BUDGETS)}, got {short(cell['budget'])}")
    if cell.get("budget") == "time" and not fits(cell.get("share"), float):
        raise ValueError(f"cell.share must be a number where the budget is time, got {short(cell.get('share'))}")
    if cell.get("budget") == "tokens" and not fits(cell.get("tokens"), int):
        raise ValueError(f"cell.tokens must be a number where they are the budget, got {short(cell.get('tokens'))}")
    value = values["value"]
    if value is not None and value <= 0 and values["what"] in _POSITIVE:
        raise ValueError(f"value of {short(values['what'])} must be above 0, got {value}")
    if values["what"] == "accuracy" and not (value is not None and 0 <= value <= 1 <= values["n"]):
        raise ValueError(f"value of 'accuracy' must be a share of some documents, got {value} of {values['n']}")
    if values["what"] == "task_guard" and any(len(samples[name]) != 1 for name in ("p", "dense", "score")):
        raise ValueError("samples of 'task_guard' must be one p, one dense score and one score, got other numbers")
    if not all(samples.get("head_density", ())):
        raise ValueError("samples.head_density must have a density in every layer, got a layer without")
    for name in ("n", "context"):
        if values[name] < 0:
            raise ValueError(f"{name} must be at least 0, got {values[name]}")
    part = values.get("part")
    if part is not None and not (len(part) == 2 and 1 <= part[0] <= part[1]):
        raise ValueError(f"part must be a place in a group and the group's size, got {short(part)}")


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(Result)


@cache
def _required() -> list[str]:
    """The fields that have no default."""
    return [f.name for f in fields(Result) if f.default is MISSING and f.default_factory is MISSING]


def _finite(value: Any) -> Any:
    """The value with None for NaN and infinities, which are not JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def with_texts(result: Result, f: Callable[[str], str]) -> Result:
    """The result with ``f`` of every text in it, samples aside but for errors."""
    texts = {x.name: map_texts(getattr(result, x.name), f) for x in fields(Result) if x.name not in ("what", "samples")}
    errors = {name: map_texts(result.samples[name], f) for name in ("error",) if name in result.samples}
    return replace(result, **texts, samples=result.samples | errors)


def could_be_cut(line: str) -> bool:
    """Whether a text may be the beginning of a line that `to_line` wrote and an interruption cut."""
    return any(_could_be_cut(line, order) for order in (_hints(), EARLIER_FIELDS))


def _could_be_cut(line: str, order: Mapping[str, Any]) -> bool:
    place, decoder = 0, json.JSONDecoder()
    for number, (name, hint) in enumerate(order.items()):
        head = f"{', ' if number else '{'}{json.dumps(name)}: "
        if len(line) - place < len(head):
            return head.startswith(line[place:]) or line[place:] == "}"
        if not line.startswith(head, place):
            return False
        try:
            value, place = decoder.raw_decode(line, place + len(head))
        except (ValueError, RecursionError):
            return True
        # The beginning of a number is a number, too.
        if not set(line[place:]) - set("0123456789.eE+-"):
            return True
        if not fits(value, hint):
            return False
    return line[place:] == "}"
