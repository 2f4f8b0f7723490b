"""From which length and density on sparse attention pays on a device: the table that `impl="auto"` decides by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seerattn.bench.attention import Layer, Sparse, share_of
from seerattn.bench.inputs import Shape
from seerattn.bench.model import gate_form
from seerattn.bench.session import Session
from seerattn.saving import write_whole


def bench_crossover(
    session: Session,
    shape: Shape,
    *,
    lengths: Sequence[int],
    densities: Sequence[float],
    baselines: Sequence[str],
    form: str,
    impl: str,
) -> dict[str, Any]:
    """Measures dense attention, gate with selection, and sparse attention at every length.

    Calls are timed among others like them, host included: short prompts are bound by it.

    Args:
        session: what runs the measurements.
        shape: the heads of the layer.
        lengths: tokens.
        densities: shares of the causal block area. Where a length has too few blocks for one, the diagonal alone is
            computed.
        baselines: dense attentions; the fastest counts.
        form: name of the gate.
        impl: of `block_sparse_attention`.

    Returns:
        The table: "device", "heads", "kv_heads", "head_dim", and "rows" with "tokens", "dense_ms", "overhead_ms"
        (gate and selection) and "sparse_ms" by density. Lengths that could not be measured in full are missing.
    """
    config = gate_form(form)
    kind = Sparse(impl, config.block_q, config.block_k, share_of(config))
    rows = []
    for tokens in sorted(lengths):
        layer = Layer(session, shape, tokens, pipeline=True)
        dense = [row for row in map(layer.dense, baselines) if row is not None and row.value is not None]
        # Top-k takes the same time at every density.
        overhead = layer.selection(form, 0.1, config.block_q, config.block_k, "auto")
        sparse = {density: layer.sparse(kind, density) for density in densities}
        session.release()
        measured = [overhead, *sparse.values()]
        if dense and all(row is not None and row.value is not None for row in measured):
            rows.append(
                {
                    "tokens": tokens,
                    "dense_ms": min(row.value for row in dense),
                    "overhead_ms": overhead.value,
                    "sparse_ms": {str(float(density)): row.value for density, row in sparse.items()},
                }
            )
    sizes = {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    return {"device": session.device_name, **sizes, "rows": rows}


def save_table(table: dict[str, Any], path: Path) -> None:
    """Writes a table, whole or not at all.

    Raises:
        OSError: it cannot be written; an older one is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(table, indent=2) + "\n")
