"""Launches that Triton's interpreter runs in a reasonable time: it pays by the operation, not by the element."""

import os
from dataclasses import replace

import pytest


def large_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the gate's kernels read many tokens at once, on the interpreter alone."""
    from seerattn.ops.gate_scores import triton_pool, triton_select

    if os.environ.get("TRITON_INTERPRET") == "1":
        choose = triton_select.choose_launch
        monkeypatch.setattr(triton_select, "choose_launch", lambda *a, **k: replace(choose(*a, **k), pool_step=32))
        monkeypatch.setattr(triton_pool, "STEP", 32)
