"""MoA, "Mixture of Sparse Attention" (arXiv 2406.14909): every head its own elastic span, chosen by a profile.

Which span every head gets is MoA's integer programme (section 4.3), solved by HiGHS; `moa_profile` has what it knows. A
*unit* is a KV group of a layer, whose heads share a rule; a *choice* is the number of a rule for every unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

from seerattn.extras import check_extra
from seerattn.methods.head_rules import HeadRules
from seerattn.methods.method import SelectorAt, Selectors
from seerattn.methods.moa.profile import (
    BLOCK,
    Profile,
    SpanRule,
    area_density,
    row_density,
    rule_space,
    short_rules,
)
from seerattn.selection.block_indices import BlockIndices, num_query_blocks
from seerattn.selection.selector import AttentionContext, Selector

RULES_A_LAYER = 2
GRID_POINTS = 5
# A density may fall so far below its bound.
SLACK = 0.9
# Solved exactly up to so many variables (12 units take 0.1 to 0.7 s), else to 1 %: 256 units of 48 rules, as in an 8B
# model, take 5 to 16 s to 1 % and up to minutes to 0.1 %.
_EXACT_VARIABLES = 4096
_GAP = 0.01
# HiGHS stops 1e-6 short of the optimum whatever it is told, so objectives are of this size.
_SIZE = 1e4


@dataclass(frozen=True)
class MoaSelector:
    """One sink block and a causal band of each head's own width, whatever the blocks hold (section 3 and appendix).

    The pattern is one of blocks already: nothing is covered beyond it. Heads of a KV group share their rule, which the
    published code reaches by taking groups apart.

    Attributes:
        rules: one for every KV head.
        length: tokens of the whole prompt where it is known before its last chunk. None takes the keys of the call.
    """

    rules: tuple[SpanRule, ...]
    length: int | None = None

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
        """See `Selector.select`."""
        q_len, k_len = q.shape[2], k.shape[2]
        if k.shape[1] != len(self.rules):
            raise ValueError(
                f"rules must be one for each of {k.shape[1]} KV heads in layer {context.layer}, got {len(self.rules)}"
            )
        start, tokens = k_len - q_len, max(self.length or 0, k_len)
        rows = start // BLOCK + torch.arange(num_query_blocks(start, q_len, BLOCK), device=q.device)
        columns = torch.arange(-(-k_len // BLOCK), device=q.device)
        distance = rows[:, None] - columns
        bands = torch.tensor([rule.band(tokens) for rule in self.rules], device=q.device)
        mask = (distance < bands[:, None, None]) | (columns == 0)
        mask = mask.expand(q.shape[0], *mask.shape)
        return BlockIndices.from_mask(mask, block_q=BLOCK, block_k=BLOCK, q_start=start, q_len=q_len)


@dataclass(frozen=True, eq=False)
class Limit:
    """Bounds of a sum over units: ``low <= sum values[unit, rule of unit] <= high``."""

    values: np.ndarray
    low: float
    high: float


def solve(cost: np.ndarray, limits: Sequence[Limit], layers: np.ndarray) -> np.ndarray | None:
    """One rule for every unit, at most two different ones in a layer, of the least total cost.

    Args:
        cost: ``[units, rules]``.
        limits: that the choice must keep.
        layers: int ``[units]``, ascending from 0.

    Returns:
        The choice, int ``[units]``; None where no choice keeps the limits. The same for the same arguments.
    """
    check_extra("eval", "a search of MoA")
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    units, rules = cost.shape
    count = int(layers.max()) + 1
    # One variable for each unit and rule, then one for each layer and rule: whether the layer has it.
    of_layer = sparse.csr_matrix((np.ones(units), (np.arange(units), layers)), shape=(units, count))
    one_a_unit = sparse.kron(sparse.eye(units), np.ones((1, rules)))
    few_a_layer = sparse.kron(sparse.eye(count), np.ones((1, rules)))
    known_to_layer = sparse.kron(of_layer, sparse.eye(rules))
    sums = sparse.csr_matrix(np.array([limit.values for limit in limits]).reshape(len(limits), units * rules))
    matrix = sparse.bmat(
        [[one_a_unit, None], [sparse.eye(units * rules), -known_to_layer], [None, few_a_layer], [sums, None]]
    )
    low = [np.ones(units), np.full(units * rules, -np.inf), np.zeros(count), [limit.low for limit in limits]]
    high = [np.ones(units), np.zeros(units * rules), np.full(count, RULES_A_LAYER), [limit.high for limit in limits]]
    scale = _SIZE / (np.abs(cost).max(1).sum() or 1.0)
    found = milp(
        np.concatenate((cost.ravel() * scale, np.zeros(count * rules))),
        constraints=LinearConstraint(matrix.tocsr(), np.concatenate(low), np.concatenate(high)),
        integrality=1,
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0 if units * rules <= _EXACT_VARIABLES else _GAP},
    )
    if found.x is None and found.status == 2:
        return None
    if found.status != 0:
        raise RuntimeError(f"the solver gave up: {found.message}")
    return found.x[: units * rules].reshape(units, rules).argmax(1)


def value(costs: np.ndarray, choice: np.ndarray) -> float:
    """Total of ``costs [units, rules]`` over a choice."""
    return float(costs[np.arange(len(choice)), choice].sum())


def pareto_choices(
    costs: Sequence[np.ndarray],
    limits: Sequence[Limit],
    layers: np.ndarray,
    advance: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """Choices none of which is better than another at every length, by epsilon constraints.

    Args:
        costs: for each objective ``[units, rules]``; the last one is minimised while the others are bounded by
            `GRID_POINTS` levels each, from their own optimum to their worst at an optimum of another.
        limits: see `solve`.
        layers: see `solve`.
        advance: told the number of programmes solved, of `programmes`.

    Raises:
        ValueError: no choice keeps the limits.
    """

    def solved(cost: np.ndarray, more: Sequence[Limit] = ()) -> np.ndarray | None:
        choice = solve(cost, [*limits, *more], layers)
        if advance is not None:
            advance(1)
        return choice

    best = [solved(cost) for cost in costs]
    if any(choice is None for choice in best):
        raise ValueError("limits must leave a choice, got some that no choice keeps")
    table = np.array([[value(cost, choice) for cost in costs] for choice in best])
    levels = [np.linspace(table[:, i].min(), table[:, i].max(), GRID_POINTS) for i in range(len(costs) - 1)]
    # A little of the other objectives, so that of equal choices the better one is found.
    cost = costs[-1] + 1e-3 * sum(costs[:-1])
    found = [*best]
    if len(costs) > 1:
        for bounds in product(*levels):
            choice = solved(cost, [Limit(c, -np.inf, bound + 1e-9) for c, bound in zip(costs, bounds)])
            found += [] if choice is None else [choice]
    found = list({tuple(choice): choice for choice in found}.values())
    values = np.array([[value(cost, choice) for cost in costs] for choice in found])
    dominated = [((values <= row).all(1) & (values < row - 1e-12).any(1)).any() for row in values]
    return [choice for choice, worse in zip(found, dominated) if not worse]


def programmes(objectives: int) -> int:
    """Programmes that `pareto_choices` solves."""
    return objectives + (GRID_POINTS ** (objectives - 1) if objectives > 1 else 0)


def bound_limits(lengths: Sequence[int], layers: np.ndarray, density: float) -> tuple[list[SpanRule], list[Limit]]:
    """MoA's rules, and the limits of its own programme.

    The mean over heads of `row_density` is at most ``density``, and at least 0.9 of it, at every length of the profile
    and at twice the longest.

    Args:
        lengths: of the profile, in tokens.
        layers: see `solve`.
        density: bound, in (0, 1].

    Raises:
        ValueError: no choice keeps the limits.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density:g}")
    lengths = (*lengths, 2 * max(lengths))
    rules = _distinct(rule_space(lengths[:-1]), lengths)
    tables = [_by_rule(row_density, rules, length, len(layers)) for length in lengths]
    limits = [Limit(table, SLACK * density - 1e-9, density + 1e-9) for table in tables]
    if solve(np.zeros_like(tables[0]), limits, layers) is None:
        least = min(max(table[0, r] for table in tables) * len(layers) for r in range(len(rules)))
        raise ValueError(
            f"density must be one that MoA's rules can meet to a tenth at {', '.join(map(str, lengths))} tokens, "
            f"got {density:g}; about {least:.2f} to 1 can be met"
        )
    return rules, limits


def bounded_plans(
    profile: Profile, density: float, advance: Callable[[int], None] | None = None
) -> list[dict[int, tuple[SpanRule, ...]]]:
    """Pareto-optimal plans of MoA's own programme, see `bound_limits`.

    Args:
        profile: of the model.
        density: bound, in (0, 1].
        advance: told the number of programmes solved, of `programmes`.

    Raises:
        ValueError: no plan meets the bound.
    """
    rules, limits = bound_limits(profile.lengths, profile.unit_layers, density)
    choices = pareto_choices(profile.losses(rules), limits, profile.unit_layers, advance)
    return [profile.spans(choice, rules) for choice in choices]


def bounded_selectors(plan: HeadRules, *, length: int | None = None) -> Selectors:
    """MoA at any density, from the profile of a plan.

    The setting bounds the share of the causal area that is computed at one length, averaged over heads. At every bound
    the programme is solved again for one objective, the loss at the longest length of the profile; `short_rules` join
    MoA's own. In place of a bound for every length, densities at the profile's lengths and at twice the longest must
    be alike in what exceeds the forced blocks: within a tenth, or .02 where that is more. As nothing but the one bound
    then depends on the setting, the density at ``length`` cannot fall when it rises, up to the solver's gap of 1 % for
    models of more than about 60 KV heads.

    Args:
        plan: made by MoA's profile of the model.
        length: tokens at which the density is bounded; by default the longest of the profile.

    Raises:
        ValueError: the plan holds no profile, or a length of less than two blocks.
    """
    profile = Profile.of(plan)
    longest = profile.lengths[-1]
    length = longest if length is None else length
    if length <= BLOCK:
        raise ValueError(f"length must be more than one block of {BLOCK} tokens, got {length}")
    lengths = tuple(sorted({*profile.lengths, 2 * longest, length}))
    rules = _distinct([*rule_space(profile.lengths), *short_rules(profile.lengths)], lengths)
    layers = profile.unit_layers
    *others, main = profile.losses(rules)
    excess = {n: _excess(_by_rule(area_density, rules, n, len(layers)), n) for n in lengths}
    alike = [limit for n in lengths if n != length for limit in _alike(excess[n], excess[length])]
    area = _by_rule(area_density, rules, length, len(layers))
    # Shorter lengths, and then a higher density, decide between choices that are equal at the longest.
    cost = main + 1e-3 * sum(others, np.zeros_like(main)) - 1e-5 * area

    @cache
    def at(bound: float) -> SelectorAt:
        choice = solve(cost, [*alike, Limit(area, -np.inf, bound + 1e-9)], layers)
        if choice is None:
            raise ValueError(f"density must be at least that of the forced blocks, {sparsest:.4f}, got {bound:g}")
        return selectors(profile.spans(choice, rules))

    sparsest = area_density(1, length)
    settings = {"plan": plan.digest, "length": length}
    return Selectors(at, sparsest, 1.0, settings=settings)


def planned(plan: HeadRules) -> SelectorAt:
    """The selectors of the rules that a plan chose, None for its layers without full attention.

    Raises:
        ValueError: the plan is of another method or damaged.
    """
    profile = Profile.of(plan)
    group = plan.model["heads"] // profile.kv_heads
    try:
        spans = {
            layer: tuple(SpanRule(float(r["alpha"]), float(r["beta"])) for r in plan.rules[layer][::group])
            for layer in profile.layers
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"rules of a plan must have alpha and beta, got one with a wrong {error}") from error
    return selectors(spans)


def selectors(spans: dict[int, tuple[SpanRule, ...]]) -> SelectorAt:
    """From the rules of each layer to its selector."""
    chosen: dict[int, Selector] = {layer: MoaSelector(rules) for layer, rules in spans.items()}
    return chosen.get


def _distinct(rules: Sequence[SpanRule], lengths: Sequence[int]) -> list[SpanRule]:
    """The first of all rules that are the same at these lengths."""
    bands = {tuple(min(rule.band(n), -(-n // BLOCK)) for n in lengths): rule for rule in reversed(rules)}
    return list(reversed(bands.values()))


def _by_rule(density: Callable[[int, int], float], rules: Sequence[SpanRule], length: int, units: int) -> np.ndarray:
    """``[units, rules]`` whose sum over a choice is the mean density."""
    return np.tile([density(rule.band(length), length) / units for rule in rules], (units, 1))


def _excess(table: np.ndarray, length: int) -> np.ndarray:
    """The share that is computed of what is not forced."""
    forced = area_density(1, length)
    return (table - forced / len(table)) / (1 - forced)


def _alike(excess: np.ndarray, reference: np.ndarray, room: float = 0.02) -> Iterator[Limit]:
    yield Limit(excess - SLACK * reference, -room, np.inf)
    yield Limit(excess - reference / SLACK, -np.inf, room)
