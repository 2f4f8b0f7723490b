"""What the op returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionMaps(NamedTuple):
    """What one walk over the probabilities yields.

    Attributes:
        out: ``[B, H, T, D]`` in the dtype of q, zero at padding; None without v.
        maps: for every form that was asked for fp32 ``[B, H, Nq, Nk]``, rows sum to 1; rows without a query are zero.
    """

    out: Tensor | None
    maps: tuple[Tensor, ...]

    @property
    def map(self) -> Tensor:
        """The map, where one form was asked for."""
        (only,) = self.maps
        return only
