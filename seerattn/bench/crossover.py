"""From which length and density on sparse attention pays on a device: the table that `impl="auto"` decides by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seerattn.bench.attention import Layer, Sparse, share_of
from seerattn.bench.crossover_decode import decode_host, decode_rows
from seerattn.bench.dense import default_backends
from seerattn.bench.inputs import Shape
from seerattn.bench.model import GATE_FORMS, TINY, BenchModel, gate_form
from seerattn.bench.model_runs import random_batch
from seerattn.bench.options import SPARSE, LayerBench, backends, contexts, densities
from seerattn.bench.session import Session, of_gates
from seerattn.bench.timing import pipeline_time
from seerattn.bench.ttft import prefill
from seerattn.hf.attach import set_policy
from seerattn.hf.meters import record_density
from seerattn.ops.crossover import table_path
from seerattn.options import option
from seerattn.outputs import check_output
from seerattn.results.record import Result
from seerattn.saving import write_whole
from seerattn.selection.policies import Policy, TopK
from seerattn.texts import fits, parse_json, short

# A model whose prompts are bound by the host.
HOST_LAYERS, HOST_TOKENS, HOST_TURNS = 8, 128, 5


@dataclass(frozen=True, kw_only=True)
class CrossoverBench(LayerBench):
    """Dense attention, gate with selection, and sparse attention at every length.

    Calls are timed among others like them, host included: short prompts are bound by it.

    Attributes:
        densities: shares of the causal block area. Where a length has too few blocks for one, the diagonal alone is
            computed.
        table: where to write the table; None is the user's cache folder, where every attached model finds it.
        baselines: dense attentions; the fastest counts.
        gates: name of the gate.
        impl: of `block_sparse_attention`.
        keys: of all sequences of a step together, for the times of decoded tokens.
    """

    contexts: tuple[int, ...] = contexts(128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
    densities: tuple[float, ...] = densities(0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
    table: Path | None = option(None, help="Where to write the table; default: the user's cache folder.")
    baselines: tuple[str, ...] = backends()
    gates: str = option("default", help="Form of the gate, with random weights.", choices=(*GATE_FORMS,), flag=False)
    impl: str = option("auto", help="Sparse attention, never dense.", choices=("auto", *SPARSE), flag=False)

    keys: tuple[int, ...] = option(
        (8192, 32768, 131072, 524288, 2097152),
        help="Keys of all sequences together, for decoded tokens.",
        low=200,
        flag=False,
    )

    def place(self, session: Session) -> Path:
        """Where the table goes.

        Raises:
            ValueError: the place holds something else than a table, or the device needs none.
        """
        if self.table is None and session.device.type != "cuda":
            raise ValueError(
                'table must be given on a CPU, where impl="auto" decides by a formula and looks for no table'
            )
        path = self.table or table_path(session.device_name)
        check_table(path)
        return path

    def run(self, session: Session, subject: Shape) -> dict[str, Any]:
        """Measures it.

        Returns:
            The table: "device", "batch", "heads", "kv_heads", "head_dim", "host_ms" (what the host takes longer for a
            sparse layer of a model than for a dense one), and "rows" with "tokens", "dense_ms", "overhead_ms" (gate and
            selection) and "sparse_ms" by density. For decoded tokens "decode_host_ms" (what the host takes for a sparse
            layer) and "decode_rows", the same by keys. What could not be measured in full is missing.
        """
        config = gate_form(self.gates)
        kind = Sparse(self.impl, config.block_q, config.block_k, share_of(config))
        baselines = self.baselines or default_backends(session.device)
        host = self._host(session, subject)
        rows = []
        for tokens in self.lengths:
            layer = Layer(session, subject, tokens, pipeline=True)
            dense = [row for row in map(layer.dense, baselines) if row is not None and row.value is not None]
            # Top-k takes the same time at every density.
            overhead = layer.selection(self.gates, 0.1, config.block_q, config.block_k, "auto")
            sparse = {density: layer.sparse(kind, density) for density in self.densities}
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
        sizes = {"batch": 1, "heads": subject.heads, "kv_heads": subject.kv_heads, "head_dim": subject.head_dim}
        host_ms = {} if host is None or host.value is None else {"host_ms": host.value}
        decoding = self._decoding(session, subject, baselines)
        return {"device": session.device_name, **sizes, **host_ms, "rows": rows, **decoding}

    def _decoding(self, session: Session, subject: Shape, baselines: Sequence[str]) -> dict[str, Any]:
        """What a table tells of decoded tokens: all of it, or nothing."""
        host = decode_host(session, subject, self.gates)
        rows = decode_rows(session, subject, self.keys, baselines, self.gates)
        if not rows or host is None or host.value is None:
            return {}
        return {"decode_host_ms": host.value, "decode_rows": rows}

    def _host(self, session: Session, subject: Shape) -> Result | None:
        """What the host takes longer for a sparse layer than for a dense one, by short prompts of a narrow model."""
        size = replace(TINY, name=str(subject), layers=HOST_LAYERS, whole=HOST_LAYERS, shape=subject)
        policy = TopK(density=0.1)

        def run() -> dict[str, Any]:
            impl = "sparse" if self.impl == "auto" else self.impl
            model = BenchModel(size, session.device, impl).gated(self.gates)
            input_ids = random_batch(size, HOST_TOKENS, session.device)["input_ids"]
            # In turns, and the least of each: whatever else the host does only adds to it.
            ms: dict[Policy | None, list[float]] = {None: [], policy: []}
            for each in (None, policy) * HOST_TURNS:
                set_policy(model, each)
                ms[each] += pipeline_time(lambda: prefill(model, input_ids), session.device, budget_ms=20.0).runs
            with record_density(model) as meter:
                prefill(model, input_ids)
            value = max(0.0, min(ms[policy]) - min(ms[None])) / HOST_LAYERS
            samples = {"dense_ms": ms[None], "sparse_ms": ms[policy]}
            fields = {"n": len(ms[policy]), "realised_density": meter.mean()}
            return fields | {"value": round(value, 5), "samples": samples}

        values = of_gates(self.gates) | {"settings": policy.to_dict(), "density": 0.1, "seed": 0}
        cell = {"dtype": subject.dtype_name, "layers": HOST_LAYERS}
        blank = session.blank("host_ms", model=size.name, context=HOST_TOKENS, impl=self.impl, cell=cell, **values)
        return session.measured(blank, run, label="host, a sparse layer beside a dense one")


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
