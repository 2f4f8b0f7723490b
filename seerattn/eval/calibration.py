"""Calibration: fits gates to text, measures on other text what they realise, and saves what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from seerattn.data.windows import Window
from seerattn.eval.choice import Choice
from seerattn.eval.tasks.map_recall import RecallMeter
from seerattn.hf.config import save_settings
from seerattn.hf.eval_model import EvalModel
from seerattn.methods.gate import Gate, fixed_selectors
from seerattn.methods.gate.budgets import LADDER, BudgetCalibrator, budget_lengths, check_ladder
from seerattn.methods.gate.thresholds import Calibrator, Goal, Level, threshold_level
from seerattn.results import statistics
from seerattn.results.environment import Stopwatch
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result
from seerattn.selection.budgets import shares_density
from seerattn.selection.map_form import MapForm
from seerattn.selection.policies import Policy, Threshold, TopK

Progress = Callable[[str, int], Callable[[int], None]]


def split_windows(windows: Sequence[Window]) -> tuple[list[Window], list[Window]]:
    """Windows of every second document to calibrate on, and those of the others to check on.

    Raises:
        ValueError: there is only one document.
    """
    order = list(dict.fromkeys(window.document for window in windows))
    if len(order) < 2:
        raise ValueError("data must hold two documents at least, one to calibrate on and one to check, got one")
    first = set(order[::2])
    return [w for w in windows if w.document in first], [w for w in windows if w.document not in first]


@dataclass(frozen=True, eq=False)
class Text:
    """What gates are fitted to and checked on.

    Attributes:
        windows: text, of two documents at least; every second document calibrates, the others check.
        context: tokens of a window.
        name: what results call it.
        settings: limits of the data, with its digest under "data".
        batch: windows of equal length that run together.
    """

    windows: Sequence[Window]
    context: int
    name: str
    settings: dict[str, Any]
    batch: int = 1


def calibrate_thresholds(
    model: EvalModel,
    method: Gate,
    text: Text,
    output: ResultsFile,
    *,
    goal: Goal,
    value: float,
    per_head: bool = True,
    on: Level | None = None,
    save: bool = True,
    progress: Progress | None = None,
) -> list[Result]:
    """Finds thresholds of gates on half of the documents, measures them on the other half, and saves the policy.

    Args:
        model: the model.
        method: the gates.
        text: see `Text`.
        output: where results go.
        goal: "density" or "recall".
        value: of the goal, in (0, 1].
        per_head: one threshold a layer and head, or one for all; of gates with budgets those that give every head its
            share of a density.
        on: what thresholds are compared with; None is raw scores for gates that normalise them, else their softmax.
        save: write the policy into the folder, in place of the one that is there.
        progress: called with a description and a number of windows, returns what is told of finished windows.

    Returns:
        "calibrated_density" and "calibrated_recall" on the text that was not used to calibrate.
    """
    loaded = model.gates(method.gates)
    on = threshold_level(loaded.gates) if on is None else on
    budgets = loaded.budgets if goal == "density" and not per_head else None
    densities = None if budgets is None else budgets.at(value, text.context)
    fitting, checking = split_windows(text.windows)
    watch = Stopwatch(model.device)
    calibrator = Calibrator(loaded.gates, goal=goal, on=on)
    advance = progress("calibrating", len(fitting)) if progress else None
    model.observe(fitting, calibrator.see, batch=text.batch, advance=advance)
    policy = Threshold(threshold=calibrator.thresholds(value, per_head=per_head, densities=densities), on=on)
    choice = _with_policy(model, method, policy)
    if budgets is not None:
        settings = {**choice.selectors.settings, "budgets": budgets.digest}
        choice = replace(choice, selectors=replace(choice.selectors, settings=settings))
    # Checked on the map that the gates learned, as calibrated.
    target = next(iter(loaded.gates.values())).config.target
    meter = _recall(model, {"gate": choice}, checking, text, target, progress)
    if save:
        save_settings(method.gates, policy=policy.to_dict())
    about = text.settings | {"goal": goal, "goal_value": value, "per_head": per_head}
    quantities = {"calibrated_density": "density", "calibrated_recall": "target_recall"}
    with output.together() as cell:
        return _rows(model, choice, meter, "gate", quantities, text, about, cell, watch)


def calibrate_budgets(
    model: EvalModel,
    method: Gate,
    text: Text,
    output: ResultsFile,
    *,
    ladder: Sequence[float] = LADDER,
    gain: MapForm | None = None,
    save: bool = True,
    progress: Progress | None = None,
) -> list[Result]:
    """Makes budgets of gates from half of the documents, measures them on the other half, and saves them.

    Args:
        model: the model; the gates have the new budgets from here on.
        method: the gates.
        text: see `Text`; lengths of the budgets are 2048, 4096, ... up to its context.
        output: where results go.
        ladder: mean densities of the budgets.
        gain: the map of which heads are to miss as little as they can, by default the target of the gates.
        save: write the budgets into the folder, in place of those that are there.
        progress: called with a description and a number of windows, returns what is told of finished windows.

    Returns:
        At the context, for each rung that exceeds the forced blocks, and for calibrated and equal heads:
        "budget_density" and "budget_recall" of the map ``gain``, on the text that was not used to calibrate.

    Raises:
        ValueError: the ladder is none, there is one document alone, no rung exceeds the forced blocks, or the policy
            that was saved with the gates has a lower density than all rungs.
    """
    check_ladder(ladder)
    loaded = model.gates(method.gates)
    if shares_density(loaded.policy) and loaded.policy.density < min(ladder):
        raise ValueError(
            f"ladder must begin at the density of the policy saved with the gates, {loaded.policy.density:g}, or below "
            f"it, got {min(ladder):g}; add a rung or save another policy"
        )
    fitting, checking = split_windows(text.windows)
    watch = Stopwatch(model.device)
    calibrator = BudgetCalibrator(loaded.gates, lengths=budget_lengths(text.context), gain=gain)
    least = calibrator.least_density(text.context)
    if max(ladder) <= least:
        raise ValueError(
            f"ladder must exceed the density of the forced blocks, {least:.3f} at this context, got at most "
            f"{max(ladder):g}; use a longer context or add a rung"
        )
    advance = progress("calibrating", len(fitting)) if progress else None
    model.observe(fitting, calibrator.see, batch=text.batch, advance=advance)
    model.set_budgets(method.gates, calibrator.budgets(ladder, text=text.settings.get("data", "")))
    choices = {
        f"{heads} {rung:g}": _with_policy(model, method, TopK(density=rung, heads=heads))
        for rung in ladder
        if rung > least
        for heads in ("calibrated", "equal")
    }
    meter = _recall(model, choices, checking, text, calibrator.gain, progress)
    if save:
        save_settings(method.gates, budgets=model.gates(method.gates).budgets.to_dict())
    rows = []
    with output.together() as cell:
        for name, choice in choices.items():
            about = text.settings | {"heads": name.split()[0], "gain": str(calibrator.gain)}
            quantities = {"budget_density": "density", "budget_recall": "target_recall"}
            rows += _rows(model, choice, meter, name, quantities, text, about, cell, watch)
    return rows


def _with_policy(model: EvalModel, method: Gate, policy: Policy) -> Choice:
    """Gates under a policy that is no setting of theirs."""
    selectors = fixed_selectors(model.gates(method.gates), policy)
    density = policy.density if isinstance(policy, TopK) and isinstance(policy.density, float) else None
    return Choice(method, selectors, None, density, "density" if density is not None else "own")


def _recall(
    model: EvalModel,
    choices: dict[str, Choice],
    windows: Sequence[Window],
    text: Text,
    target: MapForm,
    progress: Progress | None,
) -> RecallMeter:
    """Recall of choices on windows that nothing was fitted to."""
    block_q, block_k = next(iter(choices.values())).method.block_sizes
    selectors = {name: choice.selector_at for name, choice in choices.items()}
    meter = RecallMeter(selectors, block_q=block_q, block_k=block_k, target=target)
    advance = progress("checking", len(windows)) if progress else None
    model.observe(windows, meter.see, batch=text.batch, advance=advance)
    return meter


def _rows(
    model: EvalModel,
    choice: Choice,
    meter: RecallMeter,
    name: str,
    quantities: dict[str, str],
    text: Text,
    about: dict[str, Any],
    output: ResultsFile,
    watch: Stopwatch,
) -> list[Result]:
    density = float(meter.table(name, "density")[1].mean())
    rows = []
    for what, quantity in quantities.items():
        found = meter.table(name, quantity)[1]
        estimate = statistics.mean(found.flatten(1).mean(1).tolist())
        blank = choice.result(model, what=what, unit="sequences", context=text.context, text=text.name, cell=about)
        row = replace(blank, **estimate._asdict(), n=len(found), realised_density=density)
        rows.append(output.setdefault(row, watch.seconds()))
    return rows
