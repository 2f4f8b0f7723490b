"""`MapForm`: what a block map says of the attention between a query block and a key block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

Keys = Literal["max", "sum"]

# Beyond it a finite power tells a tile of 128 rows within half a percent as the largest of them alone.
MAX_POWER = 1024


@dataclass(frozen=True)
class MapForm:
    """How the attention probabilities of a tile become one number.

    What query row ``i`` gives to a key block is ``r_i``; a tile is the power mean of that over its query rows,
    ``(mean_i r_i^power)^(1 / power)``. Every row of a map is then divided by its sum.

    Attributes:
        keys: ``r_i`` is the "max" or the "sum" of the row's probabilities over the keys of the block.
        power: 1 averages over rows, larger ones lean to the rows that give most, ``math.inf`` takes the largest.

    Raises:
        ValueError: there is no such map.
    """

    keys: Keys
    power: float

    def __post_init__(self) -> None:
        if self.keys not in get_args(Keys):
            raise ValueError(f"keys must be max or sum, got {self.keys!r:.40}")
        number = isinstance(self.power, Real) and not isinstance(self.power, bool)
        if not (number and (1 <= self.power <= MAX_POWER or self.power == math.inf)):
            raise ValueError(
                f"power must be a number of 1 to {MAX_POWER}, or inf for the largest row, got {self.power!r:.40}"
            )
        object.__setattr__(self, "power", float(self.power))

    def __str__(self) -> str:
        """The form as `parse` reads it, such as "sum:2" or "max:inf"."""
        return f"{self.keys}:{repr(self.power).removesuffix('.0')}"

    @classmethod
    def parse(cls, text: str) -> MapForm:
        """Reads "sum:2" or "max:inf".

        Raises:
            ValueError: it is something else.
        """
        keys, _, power = text.partition(":")
        try:
            return cls(keys, float(power))
        except ValueError as error:
            raise ValueError(f"a map must be keys:power such as sum:2 or max:inf, got {text!r:.40}: {error}") from None


# The target of arXiv 2410.13276, section 4: the largest probability of a tile.
PUBLISHED = MapForm("max", math.inf)
# The share of a block in the probability of its rows.
MASS = MapForm("sum", 1)
