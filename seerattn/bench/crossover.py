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
from seerattn.outputs import check_output
from seerattn.saving import write_whole
from seerattn.texts import fits, parse_json, short


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
        ValueError: the file holds something else than a table.
        OSError: it cannot be written; an older one is as it was.
    """
    check_table(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(table, indent=2) + "\n")


def check_table(path: Path) -> None:
    """Refuses a place for a table that holds something else.

    Raises:
        ValueError: says so.
    """
    check_output(path, "table", "a crossover table", _read_rows)


def _read_rows(path: Path) -> list[Any]:
    values = parse_json(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or not fits(values.get("rows"), list[dict[str, Any]]):
        raise ValueError(f"it must be an object with rows, got {short(values)}")
    return values["rows"]
