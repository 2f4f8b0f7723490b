"""Records of version 0.1, which named a way of choosing blocks freely, as records of this version."""

from __future__ import annotations

from typing import Any

# By how free names began; longer ones first, as one may begin with another.
_METHODS = {
    "dense": ("dense", "dense"),
    "oracle": ("oracle", "oracle"),
    "gate": ("gate", "learned"),
    "streaming": ("streaming", "static"),
    "a_shape": ("a_shape", "static"),
    "tri_shape": ("tri_shape", "static"),
    "random": ("random", "static"),
    "pooled": ("mean_pooled", "training-free"),
    "vertical_slash": ("vertical_slash", "training-free"),
    "minference": ("minference", "training-free"),
    "moa": ("moa", "training-free"),
    "xattention": ("xattention", "training-free"),
    "flexprefill": ("flexprefill", "training-free"),
}
# Options that one method alone had.
_OPTIONS = (
    ({"share"}, "oracle"),
    ({"seed"}, "random"),
    ({"n_init"}, "a_shape"),
    ({"columns"}, "vertical_slash"),
    ({"plan", "variant"}, "minference"),
    ({"plan", "length"}, "moa"),
    ({"stride"}, "xattention"),
    ({"tau"}, "flexprefill"),
)
_WHATS = {"pooled_ms": "attention_map_ms", "knob": "setting"}
_PER_HEAD = ", budgets per head"

# In the order in which lines of 0.1 had them, for the one that an interruption cut.
EARLIER_FIELDS: dict[str, Any] = (
    {"what": str, "value": float | None, "n": int, "unit": str, "model": str, "selector": str, "context": int}
    | {"text": str, "stderr": float | None, "gates": str | None, "weights": dict[str, str]}
    | {"policy": dict[str, Any] | None, "density": float | None, "realised_density": float | None}
    | {"seed": int | None, "cell": dict[str, Any], "samples": dict[str, list], "versions": dict[str, str]}
    | {"device": str, "git": str | None, "command": str, "seconds": float | None, "timestamp": str}
    | {"part": list[int] | None}
)


def _told_apart(selector: str, settings: dict[str, Any]) -> tuple[str, str, str]:
    """Id, kind and name of a method by how its name began, or by options that no other one had."""
    start = next((start for start in _METHODS if selector.replace("-", "_").startswith(start)), None)
    if start is not None:
        return *_METHODS[start], _METHODS[start][0] + selector[len(start) :]
    found = next((method for keys, method in _OPTIONS if keys <= settings.keys()), None)
    if found is None:
        # A name that tells nothing stands for itself.
        return selector, "training-free", selector
    return *_METHODS[found], selector


def is_earlier(values: dict[str, Any]) -> bool:
    """Whether the values of a line are those of a record of 0.1."""
    return "selector" in values and "method" not in values


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a record of this version that says what one of 0.1 said.

    Raises:
        ValueError: the line is no record of 0.1 either.
    """
    values = dict(values)
    selector, gates = values.pop("selector"), values.pop("gates", None)
    settings, cell = values.pop("policy", None) or {}, values.get("cell", {})
    if not all(isinstance(of, dict) for of in (settings, cell)) or not isinstance(selector, str):
        raise ValueError("selector, policy and cell must be text and objects, got something else")
    settings, cell = dict(settings), dict(cell)
    method, kind, name = ("gate", "learned", gates) if gates is not None else _told_apart(selector, settings)
    if "knob" in settings:
        settings["setting"] = settings.pop("knob")
    form = selector.removesuffix(_PER_HEAD).removeprefix("oracle").strip()
    if method == "oracle" and ":" in form:
        settings["target"] = form
    if "budgets" in cell:
        settings["budgets"] = cell.pop("budgets")
    values["what"] = _WHATS.get(values.get("what"), values.get("what"))
    samples = values.get("samples")
    if isinstance(samples, dict) and "knobs" in samples:
        values["samples"] = {"settings" if name == "knobs" else name: of for name, of in samples.items()}
    known = {"method": method, "kind": kind, "name": name, "settings": settings, "cell": cell}
    return values | known
