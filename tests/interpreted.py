"""Launches that Triton's interpreter runs in a reasonable time: it pays by the operation, not by the element."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest


def large_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the gate's kernels read many tokens at once, on the interpreter alone."""
    from seerattn.ops.gate_scores import triton_pool, triton_select

    if os.environ.get("TRITON_INTERPRET") == "1":
        choose = triton_select.choose_launch
        monkeypatch.setattr(triton_select, "choose_launch", lambda *a, **k: replace(choose(*a, **k), pool_step=32))
        monkeypatch.setattr(triton_pool, "STEP", 32)


def patch_language_once_a_launch() -> None:
    """Saves Triton's interpreter half of its time, in which it looks for what it has exchanged already.

    It exchanges the functions of `triton.language` at every launch, and again in every call of a device function, where
    a module that the launch has seen has none left to exchange.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or os.environ.get("TRITON_INTERPRET") != "1":
        return
    exchange, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    seen: set[int] = set()

    def exchange_once(function: Callable) -> Any:
        if id(function.__globals__) in seen:
            return interpreter._LangPatchScope()
        seen.add(id(function.__globals__))
        return exchange(function)

    def launch_anew(self: Any, *arguments: Any, **options: Any) -> None:
        seen.clear()
        launch(self, *arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = exchange_once, launch_anew
