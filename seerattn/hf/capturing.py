"""`Capture`: the one way to see the attention of a model, in place of its selectors, for one context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from seerattn.hf.call import Prefill


class Capture:
    """What is shown the attention of a forward in place of its selectors; see `capturing`.

    Shown is each call that a selector could choose for: of more than one query, in a full-attention layer that was
    attached to. Gates learn by it (`GateLosses`, `SparseTraining`), and so does a model show what it computes
    (`watch_attention`).

    Attributes:
        reached: whether a layer took part, as captures count it.
    """

    reached = False

    def attend(self, call: Prefill) -> Tensor | None:
        """Attention of one layer ``[B, H, T, D]``, or None to leave it to the model's own dense attention."""
        return None

    def see(self, call: Prefill, output: Tensor) -> None:
        """Called with what the model's own attention gave, ``[B, T, H, D]``, before the layer goes on."""


CAPTURE: ContextVar[Capture | None] = ContextVar("seerattn_capture", default=None)


@contextmanager
def capturing(capture: Capture) -> Iterator[None]:
    """Shows ``capture`` the attention of the forwards inside the ``with``, in this thread or asyncio task alone.

    A layer that gradient checkpointing runs again, in whatever thread, finds it with the mask of its forward. It is not
    a keyword of the model, which some decoder layers do not pass on.
    """
    token = CAPTURE.set(capture)
    try:
        yield
    finally:
        CAPTURE.reset(token)


@contextmanager
def learning(training: Capture) -> Iterator[None]:
    """Lets the gates of the forward inside the ``with`` learn by ``training``.

    Raises:
        ValueError: on the way out, no layer with a gate was reached.
    """
    training.reached = False
    with capturing(training):
        yield
    if not training.reached:
        raise ValueError("the forward must reach at least one layer with a gate, got none; attach gates first")
