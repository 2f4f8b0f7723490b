"""What an implementation of pooled attention returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionMaps(NamedTuple):
    """What one walk over the probabilities yields; None where it was not asked for."""

    out: Tensor | None
    target: Tensor | None
    mass: Tensor | None
