"""`HeadBudgets`: which density every head gets where all of them together have a given one.

Heads want different densities: one attends to a few places, another to everything. What each of them wants hardly
depends on the text, so it is read off text once (`seerattn.methods.gate.budgets`) and kept beside the gates.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from reprlib import repr as short  # a value may be of any size
from typing import TypeGuard

from seerattn.selection.map_form import MapForm
from seerattn.selection.policies import Policy, TopK, is_number

# Densities by layer and head; empty for layers without a gate.
Densities = tuple[tuple[float, ...], ...]
# Values are kept to 4 digits, which moves each of them, and so their mean, by less than this share.
_ROUNDING = 1e-3
_MOST = 2**31 - 1


@dataclass(frozen=True)
class HeadBudgets:
    """Densities of heads by length of the prompt, mean density and layer.

    Attributes:
        ladder: mean densities that were read off, ascending, below 1; at 1 every head has 1.
        lengths: of the prompts, in tokens, ascending.
        densities: for every length, rung of the ladder and layer those of the mask heads, kept to 4 digits. Layers
            without a gate have none. Their mean is the rung, or all are equal and above it: a rung below the density
            of the forced blocks at that length cannot be met.
        block_q: query block size in tokens.
        block_k: key block size in tokens.
        target: the map that the choice follows, as `str(MapForm)`: what the gates learned.
        gain: the map of which heads were to miss as little as they can.
        text: digest of the text that it was read off.
        windows: number of windows of that text.

    Raises:
        ValueError: it is no such table.
    """

    ladder: tuple[float, ...]
    lengths: tuple[int, ...]
    densities: tuple[tuple[Densities, ...], ...]
    block_q: int
    block_k: int
    target: str
    gain: str
    text: str
    windows: int

    def __post_init__(self) -> None:
        for name in ("block_q", "block_k", "windows"):
            if not _is_whole(getattr(self, name)):
                got = short(getattr(self, name))
                raise ValueError(f"{name} of budgets must be a whole number of at least 1, got {got}")
        for name in ("target", "gain"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} of budgets must be a map such as sum:2, got {short(getattr(self, name))}")
            object.__setattr__(self, name, str(MapForm.parse(getattr(self, name))))
        if not isinstance(self.text, str):
            raise ValueError(f"text of budgets must be the digest of a text, got {short(self.text)}")
        ladder, lengths = _listed("ladder", self.ladder), _listed("lengths", self.lengths)
        if not all(_is_share(rung) and rung < 1 for rung in ladder) or not _ascends(ladder):
            raise ValueError(f"ladder of budgets must be densities above 0 and below 1, ascending, got {short(ladder)}")
        if not all(map(_is_whole, lengths)) or not _ascends(lengths):
            raise ValueError(f"lengths of budgets must be numbers of tokens, ascending, got {short(lengths)}")
        object.__setattr__(self, "ladder", tuple(float(rung) for rung in ladder))
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "densities", self._checked())

    def _checked(self) -> tuple[tuple[Densities, ...], ...]:
        tables = _listed("densities", self.densities)
        if len(tables) != len(self.lengths):
            raise ValueError(
                f"densities of budgets must have a table for each of {len(self.lengths)} lengths, got {len(tables)}"
            )
        found, form = [], None
        for length, table in zip(self.lengths, tables):
            rows = _listed("densities", table)
            if len(rows) != len(self.ladder):
                raise ValueError(
                    f"densities of budgets must have a row for each of {len(self.ladder)} rungs, got {len(rows)} at "
                    f"{length} tokens"
                )
            rounded = tuple(_rounded(row) for row in rows)
            for rung, row in zip(self.ladder, rounded):
                sizes = tuple(map(len, row))
                form = form or sizes
                if sizes != form:
                    raise ValueError(
                        "densities of budgets must have the same layers and heads everywhere, got "
                        f"{short(form)} and {short(sizes)} heads by layer"
                    )
                _check_mean(row, rung, length)
            found.append(rounded)
        return tuple(found)

    # Asked for with every layer of every call: numbers alone, so that it is the same in every process.
    @cached_property
    def _hash(self) -> int:
        return hash((self.ladder, self.lengths, self.densities))

    def __hash__(self) -> int:
        return self._hash

    @property
    def digest(self) -> str:
        """Short hash of all of it, which tells results of one table from those of another."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def heads(self) -> tuple[int, ...]:
        """Mask heads by layer, 0 for layers without a gate."""
        return tuple(map(len, self.densities[0][0]))

    def at(self, density: float, tokens: int) -> Densities:
        """The densities of heads, by layer, whose mean is ``density`` in a prompt of ``tokens``.

        Between rungs they are interpolated linearly, between lengths linearly in the logarithm; a prompt that is
        shorter or longer than all lengths has those of the nearest.

        Raises:
            ValueError: the density is below the lowest rung.
        """
        self.check(density)
        return _at(self, density, min(max(tokens, self.lengths[0]), self.lengths[-1]))

    def check(self, density: float) -> None:
        """Refuses a density that is not within the table.

        Raises:
            ValueError: it is below the lowest rung, or above 1.
        """
        if not self.ladder[0] <= density <= 1:
            raise ValueError(
                f"density must be {self.ladder[0]:g} to 1, those of the budgets of these gates, got {density:g}; "
                "use TopK(heads='equal'), or calibrate budgets with a lower rung"
            )

    def to_dict(self) -> dict:
        """Plain JSON types, the heads of a layer as one string; `from_dict` restores an equal table."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        texts = [[[" ".join(f"{x:.4g}" for x in heads) for heads in row] for row in table] for table in self.densities]
        return values | {"ladder": list(self.ladder), "lengths": list(self.lengths), "densities": texts}

    @classmethod
    def from_dict(cls, values: dict) -> HeadBudgets:
        """Inverse of `to_dict`.

        Raises:
            ValueError: it is none: names what is unknown, missing or wrong.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"budgets must be an object of JSON, got {short(values)}")
        names = [field.name for field in fields(cls)]
        unknown, missing = [key for key in values if key not in names], [name for name in names if name not in values]
        if unknown or missing:
            raise ValueError(f"budgets must have {', '.join(names)}, got {short(unknown or list(values))}")
        tables = [
            [
                [_read(heads) for heads in _listed("densities", row, empty=True)]
                for row in _listed("densities", table)
            ]
            for table in _listed("densities", values["densities"])
        ]  # fmt: skip
        return cls(**{**values, "densities": tables})


def shares_density(policy: Policy | None) -> TypeGuard[TopK]:
    """Whether a policy has one density, which budgets are to share among heads."""
    return isinstance(policy, TopK) and policy.heads == "calibrated" and is_number(policy.density)


def share_density(policy: Policy, budgets: HeadBudgets | None, tokens: int) -> Policy:
    """A policy with the density of every layer and head, where budgets are to share its one density among them.

    Args:
        policy: any; all but `TopK` with one density and ``heads="calibrated"`` stay as they are.
        budgets: of the gates, or None where they have none.
        tokens: keys of the call. "same_k" takes the length of the prompt as it does for its number; "row_share", whose
            choice must not depend on what comes later, the longest of the budgets, unless the policy tells the length.

    Raises:
        ValueError: the density is below the lowest rung of the budgets.
    """
    if budgets is None or not shares_density(policy):
        return policy
    if policy.rule == "same_k":
        return _shared(policy, budgets, policy.prompt_tokens(tokens))
    return _shared(policy, budgets, policy.length or budgets.lengths[-1])


@lru_cache(maxsize=256)
def _shared(policy: TopK, budgets: HeadBudgets, tokens: int) -> TopK:
    return replace(policy, density=budgets.at(policy.density, tokens))


@lru_cache(maxsize=256)
def _at(budgets: HeadBudgets, density: float, tokens: int) -> Densities:
    after = bisect_right(budgets.lengths, tokens)
    shorter = budgets.lengths[after - 1]
    row = _at_length(budgets, density, after - 1)
    if shorter == tokens:
        return row
    longer = budgets.lengths[after]
    return _between(row, _at_length(budgets, density, after), math.log(tokens / shorter) / math.log(longer / shorter))


def _at_length(budgets: HeadBudgets, density: float, length: int) -> Densities:
    ladder, rows = budgets.ladder, budgets.densities[length]
    above = bisect_right(ladder, density)
    low, row = ladder[above - 1], rows[above - 1]
    if low == density:
        return row
    high, dense = (ladder[above], rows[above]) if above < len(ladder) else (1.0, _full(row))
    return _between(row, dense, (density - low) / (high - low))


def _full(row: Densities) -> Densities:
    return tuple((1.0,) * len(heads) for heads in row)


def _between(low: Densities, high: Densities, share: float) -> Densities:
    # The form keeps ends and equal values exact.
    return tuple(tuple(a + (b - a) * share for a, b in zip(*heads)) for heads in zip(low, high))


def _rounded(row: object) -> Densities:
    layers = [_listed("densities", heads, empty=True) for heads in _listed("densities", row, empty=True)]
    wrong = [value for heads in layers for value in heads if not _is_share(value)]
    if wrong:
        raise ValueError(f"densities of budgets must be numbers above 0, at most 1, got {short(wrong[0])}")
    return tuple(tuple(float(f"{value:.4g}") for value in heads) for heads in layers)


def _check_mean(row: Densities, rung: float, length: int) -> None:
    values = [value for heads in row for value in heads]
    if not values:
        raise ValueError("densities of budgets must be of one head at least, got none")
    mean = math.fsum(values) / len(values)
    if abs(mean - rung) > _ROUNDING * rung and not (min(values) == max(values) > rung):
        raise ValueError(
            f"densities of budgets must have the mean {rung:g} at {length} tokens, or be those of forced blocks alone, "
            f"got {mean:.4g}; calibrate them again"
        )


def _read(text: object) -> list[float]:
    if not isinstance(text, str):
        raise ValueError(f"densities of budgets must be strings of numbers, one a layer, got {short(text)}")
    try:
        return [float(word) for word in text.split()]
    except ValueError:
        raise ValueError(f"densities of budgets must be strings of numbers, one a layer, got {short(text)}") from None


def _listed(name: str, values: object, *, empty: bool = False) -> tuple:
    if not isinstance(values, (list, tuple)) or not (values or empty):
        raise ValueError(f"{name} of budgets must be a list with something in it, got {short(values)}")
    return tuple(values)


def _ascends(values: Sequence[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST


def _is_share(value: object) -> bool:
    # NaN compares with nothing.
    return is_number(value) and 0 < value <= 1
