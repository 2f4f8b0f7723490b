"""Tri-shape: an A-shape whose last query rows are dense (MInference's repository)."""

from __future__ import annotations

from dataclasses import dataclass

from seerattn.methods.a_shape import AShape
from seerattn.options import option


@dataclass(frozen=True, kw_only=True)
class TriShape(AShape):
    """Tri-shape; its setting is ``n_local`` in tokens, the dense last rows stay."""

    id = "tri_shape"
    title = "tri-shape"
    kind = "static"

    n_last: int = option(100, help="Dense query rows at the end.", low=0)
