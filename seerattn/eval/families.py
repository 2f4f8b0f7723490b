"""Families by name: what a recipe may compare, with the options that each of them takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

from seerattn.gate.attn_gate import AttnGate
from seerattn.gate_selector import GateSelector
from seerattn.methods.family import Family, SelectorAt
from seerattn.methods.gate.thresholds import Calibrator, threshold_level
from seerattn.methods.head_rules import Plan
from seerattn.methods.oracle import oracle_name
from seerattn.selection.budgets import HeadBudgets
from seerattn.selection.map_form import MapForm
from seerattn.selection.policies import Policy, Threshold, TopK, TopP
from seerattn.texts import fits, short, visible

GatePolicy = Literal["top_k", "equal_top_k", "row_share", "threshold", "head_thresholds", "top_p"]
GATE_POLICIES: tuple[str, ...] = get_args(GatePolicy)


class Source(NamedTuple):
    """Where the family of a name is made.

    Attributes:
        module: imported when the family is asked for.
        plan: whether it needs a plan, and so which command makes one.
    """

    module: str
    plan: bool = False

    def maker(self, name: str) -> Callable[..., Family]:
        """The function that makes the family."""
        return getattr(import_module(f"seerattn.methods.{self.module}"), f"{name}_family")


SOURCES = {
    "oracle": Source("oracle"),
    "streaming": Source("streaming"),
    "a_shape": Source("shapes"),
    "tri_shape": Source("shapes"),
    "random": Source("random"),
    "pooled": Source("mean_pooled"),
    "vertical_slash": Source("minference.patterns"),
    "minference": Source("minference.patterns", plan=True),
    "moa": Source("moa.spans", plan=True),
    "xattention": Source("xattention.estimate"),
    "xattention_profile": Source("xattention.estimate", plan=True),
    "flexprefill": Source("flexprefill"),
}
SELECTORS = ("dense", "gate", *SOURCES)


def check_options(selector: str, options: Mapping[str, Any]) -> None:
    """Refuses options that a selector does not take, and values of another kind than the default's.

    Raises:
        ValueError: names those that it takes.
    """
    known = _options(selector)
    unknown = set(options) - set(known)
    if unknown:
        raise ValueError(
            f"options of {selector} must be among {', '.join(known) or 'none'}, "
            f"got {', '.join(sorted(map(visible, map(str, unknown))))}"
        )
    wrong = [name for name in options if not fits(options[name], known[name])]
    if wrong:
        raise ValueError(
            f"options of {selector} must be of the kind that they have by default, "
            f"got {wrong[0]} {short(options[wrong[0]])}"
        )


def _options(selector: str) -> dict[str, Any]:
    """The types of the options that a selector takes."""
    if selector == "dense":
        return {}
    if selector == "gate":
        return {"policy": str}
    maker = SOURCES[selector].maker(selector)
    hints = get_type_hints(maker)
    return {p.name: hints[p.name] for p in inspect.signature(maker).parameters.values() if p.kind is p.KEYWORD_ONLY}


def default_name(selector: str, options: Mapping[str, Any]) -> str:
    """What results call a selector with these options, which were checked.

    Raises:
        ValueError: the target of an oracle is no map.
    """
    return oracle_name(MapForm.parse(options["target"])) if "target" in options and selector == "oracle" else selector


def make_family(
    selector: str,
    *,
    name: str,
    options: Mapping[str, Any],
    plan: Path | None = None,
    model: dict[str, Any] | None = None,
) -> Family:
    """The family of a name among `SOURCES`.

    Args:
        selector: the name.
        name: what results call it.
        options: of its function.
        plan: the file of those that need one.
        model: `describe_model` of the model, which a plan must be of.

    Raises:
        ValueError: an option that it does not take or of a wrong kind; no plan where one is needed, or the reverse; a
            plan that is damaged, of another method or of another model.
    """
    source = SOURCES[selector]
    check_options(selector, options)
    if source.plan != (plan is not None):
        raise ValueError(
            f"{selector} must have a plan, got none; make one with seerattn plan {selector} and name it under plan"
            if source.plan
            else f"{selector} must have no plan, got {plan}; take it out"
        )
    arguments = () if plan is None else (_load(selector, plan, model),)
    try:
        family = source.maker(selector)(*arguments, **options)
        family.at(family.densest)(0)
    except ArithmeticError as error:
        raise ValueError(f"options of {selector} must be sizes that can be computed with, got {error}") from error
    return replace(family, name=name)


def _load(selector: str, path: Path, model: dict[str, Any] | None) -> Plan:
    if not path.is_file():
        raise ValueError(f"plan of {selector} must be a file, got {path}; make it with seerattn plan {selector}")
    return Plan.load(path, method=selector, model=model)


def gate_family(
    gates: Mapping[int, AttnGate],
    *,
    name: str,
    policy: GatePolicy = "top_k",
    calibrator: Calibrator | None = None,
    calibration: str | None = None,
    budgets: HeadBudgets | None = None,
) -> Family:
    """Learned gates with a policy, the knob being the one of the policy.

    Args:
        gates: the gate of each gated layer; others are dense.
        name: what results call it.
        policy: "top_k" and "row_share" are the two rules of `TopK`, which share a density among heads as the budgets of
            the gates say, and "equal_top_k" gives every head the same; "threshold" is one threshold for all heads on
            raw scores where gates normalise them, else on their softmax; "head_thresholds" one a head, which give every
            head the same density on the calibration text, that density being the knob; "top_p" leaves out the
            mass that is the knob, ``1 - p``.
        calibrator: has seen text at the context that is measured; needed by "head_thresholds".
        calibration: digest of that text.
        budgets: of the gates, None where they have none.
    """
    config = next(iter(gates.values())).config
    level = threshold_level(gates)
    shared = budgets if policy in ("top_k", "row_share") else None
    least = 1e-3 if shared is None else shared.ladder[0]
    ends: dict[str, tuple[float, float, Literal["linear", "log"]]] = {
        "top_k": (least, 1.0, "linear"),
        "equal_top_k": (1e-3, 1.0, "linear"),
        "row_share": (least, 1.0, "linear"),
        # Normalised scores estimate logarithms of probabilities, so both are of probabilities.
        "threshold": (1.0, 1e-38, "log") if level == "softmax" else (1.0, -50.0, "linear"),
        "head_thresholds": (calibrator.least_density() if calibrator else 0.0, 1.0, "linear"),
        "top_p": (1 - 1e-4, 1e-9, "log"),
    }
    sparsest, densest, scale = ends[policy]

    def policy_at(knob: float) -> Policy:
        if policy in ("top_k", "equal_top_k", "row_share"):
            return TopK(density=knob, rule="row_share" if policy == "row_share" else "same_k")
        if policy == "top_p":
            return TopP(p=1 - knob)
        if policy == "threshold":
            return Threshold(threshold=knob, on=level)
        return Threshold(threshold=calibrator.thresholds(knob, per_head=True), on=level)

    def at(knob: float) -> SelectorAt:
        chosen = policy_at(knob)
        return lambda layer: GateSelector(gates[layer], chosen, budgets=shared) if layer in gates else None

    settings = {"policy": policy} | ({"calibration": calibration} if calibration else {})
    settings |= {} if shared is None else {"budgets": shared.digest}
    sizes = {"block_q": config.block_q, "block_k": config.block_k}
    return Family(name, at, sparsest, densest, scale, **sizes, settings=settings)
