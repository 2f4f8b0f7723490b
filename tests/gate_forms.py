"""Forms of gates for tests whose oracles know plain poolings and the published target."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from seerattn.bench.model import PLAIN_FORM
from seerattn.gate import AttnGateConfig


def plain(**changes: Any) -> AttnGateConfig:
    """8 x 8 sub-blocks of plain poolings, taught by the published target, with some fields changed."""
    return replace(PLAIN_FORM, **changes)
