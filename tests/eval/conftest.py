"""A tiny model with two sets of gates, and documents for it; few words for RULER."""

from types import SimpleNamespace

import pytest
from gated_model import documents, gate_folders, model

__all__ = ["documents", "gate_folders", "model"]


@pytest.fixture(scope="module")
def few_words():
    """Sixteen nouns instead of the millions of pairs that RULER sorts at its import, which take half a minute."""
    wonderwords = pytest.importorskip("wonderwords", reason="RULER needs wonderwords")
    kinds = {kind: [f"{kind}{i}" for i in range(16)] for kind in ("nouns", "adjectives", "verbs")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wonderwords, "RandomWord", lambda: SimpleNamespace(_categories=kinds))
        yield
