"""Attention that skips by the running maximum (BLASST, arXiv 2512.12087), in full lists and in those of a perfect gate.

    python research/kernels/skipping.py --out rows.jsonl                          # 32k and 128k tokens, about a minute
    python research/kernels/skipping.py --tokens 32768 --launches --out rows.jsonl # launches of the kernel that skips
    TRITON_INTERPRET=1 python research/kernels/skipping.py --rehearse              # tiny, on a CPU, to the very end

Every kind is checked against fp64 before its first time: which blocks it computed, and what came out. Inputs are made
uneven (`seerattn.bench.inputs.uneven_qkv`), since of random ones next to nothing is skipped; they are no model's, so a
time belongs to the share that was skipped, which stands in the record, and to no threshold. A threshold of 1e-30 skips
nothing and shows what looking costs. Lists of a density hold the best blocks of the map that gates learn, sum:4.
Llama-3.1-8B's attention: batch 1, 32 query heads, 8 KV heads, head dim 128, bf16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from seerattn.bench.attention import Sparse, require_dense, require_sparse
from seerattn.bench.check import check_skipping
from seerattn.bench.dense import dense_attention
from seerattn.bench.inputs import Shape, uneven_qkv
from seerattn.bench.session import Session
from seerattn.bench.timing import device_time
from seerattn.methods.oracle import OracleSelector
from seerattn.ops.attention_map import attention_map
from seerattn.ops.block_sparse_attention import block_sparse_attention, triton_kernel
from seerattn.ops.block_sparse_attention.triton_kernel import Launch
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result
from seerattn.selection import BlockIndices, TopK
from seerattn.selection.map_form import MapForm

NOTHING = 1e-30
TARGET = MapForm("sum", 4)
# Query block, key block, and launches of what skips in them.
LAUNCHES = {
    (64, 64): [
        Launch(64, 64, 4, 1, 128),
        Launch(64, 64, 4, 1),
        Launch(64, 64, 4, 2),
        Launch(64, 64, 4, 2, 128),
        Launch(64, 64, 8, 1),
    ],
    (128, 64): [Launch(128, 64, 8, 2), Launch(128, 64, 8, 2, 128), Launch(128, 64, 8, 1, 128)],
    (128, 128): [Launch(128, 128, 8, 1), Launch(128, 128, 8, 2), Launch(128, 128, 8, 1, 168)],
    (64, 128): [Launch(64, 128, 4, 1), Launch(64, 128, 4, 2), Launch(64, 128, 8, 1)],
}


@contextmanager
def launched(launch: Launch | None) -> Iterator[None]:
    """Calls that skip take this launch."""
    chosen = nullcontext()
    if launch is not None:
        chosen = mock.patch.object(triton_kernel, "choose_skipping_launch", lambda **_: launch)
    with chosen:
        yield


class Lengths:
    """The measurements at one length.

    Args:
        session: what runs and records them.
        shape: the heads of the layer.
        tokens: length of the prompt.
    """

    def __init__(self, session: Session, shape: Shape, tokens: int) -> None:
        self.session, self.shape, self.tokens = session, shape, tokens
        self.qkv = uneven_qkv(shape, tokens, session.device)
        self._cell = {"dtype": shape.dtype_name, "clock": "device", "inputs": "uneven"}

    def dense(self, name: str) -> Result | None:
        """Dense attention of a backend."""

        def run() -> dict[str, Any]:
            require_dense(self.session, self.shape, name)
            return device_time(dense_attention(name, *self.qkv), self.session.device).fields()

        return self._measured(name, run, {}, f"dense {name}", realised_density=1.0)

    def full(self, block_q: int, block_k: int) -> BlockIndices:
        """Lists of every causal block, a KV group's each."""
        sizes = {"q_len": self.tokens, "k_len": self.tokens, "block_q": block_q, "block_k": block_k}
        return BlockIndices.dense(batch=1, heads=self.shape.kv_heads, device=self.session.device, **sizes)

    def gated(self, densities: list[float]) -> dict[float, BlockIndices]:
        """Lists of the best 64 x 64 blocks of every head at some densities."""
        q, k, _ = self.qkv
        target = attention_map(q, k, form=TARGET).map
        sizes = {"q_len": self.tokens, "k_len": self.tokens, "kv_heads": self.shape.kv_heads, "layer": 0}
        found = {d: OracleSelector(TopK(density=d), target=TARGET).choose(target, **sizes) for d in densities}
        del target
        self.session.release()
        return found

    def sparse(
        self, impl: str, blocks: BlockIndices, density: float, threshold: float | None, launch: Launch | None = None
    ) -> Result | None:
        """Attention over lists, which may skip."""
        share = "group" if blocks.num_heads < self.shape.heads else "head"
        kind = Sparse(impl, blocks.block_q, blocks.block_k, share)
        lists = replace(blocks, skip_threshold=threshold)

        def attend(q: Tensor, k: Tensor, v: Tensor, lists: BlockIndices) -> tuple[Tensor, Tensor]:
            return block_sparse_attention(q, k, v, lists, impl=impl, return_counts=True)

        def run() -> dict[str, Any]:
            with launched(launch):
                self._require(kind, attend, threshold, launch)
                _, counts = attend(*self.qkv, lists)
                listed = lists.counts.sum() * (self.shape.heads // lists.num_heads)
                fields = device_time(kind.attention(*self.qkv, lists), self.session.device).fields()
            fields["samples"]["skipped"] = [round(1 - int(counts.sum()) / int(listed), 5)]
            return fields | {"realised_density": float(lists.density().mean())}

        method = {"method": "blasst", "kind": "training-free", "name": "full lists"}
        if density < 1:
            method = {"method": "oracle", "kind": "oracle", "name": "oracle"}
        about = kind.cell(self.shape) | ({} if launch is None else {"launch": str(launch)})
        label = f"{kind}, density {density:g}, threshold {threshold}" + ("" if launch is None else f", {launch}")
        settings = {"skip_threshold": threshold, "target": str(TARGET)}
        return self._measured(impl, run, about, label, **method, density=density, settings=settings, seed=0)

    def _require(
        self, kind: Sparse, attend: Callable[..., Any], threshold: float | None, launch: Launch | None
    ) -> None:
        if threshold is None:
            require_sparse(self.session, self.shape, kind)
            return
        sizes = kind.sizes(self.shape)
        # Where nothing is to be skipped the check has another threshold; the kernel is the same.
        checked = 1e-2 if threshold == NOTHING else threshold
        self.session.check(
            f"{kind}, threshold {checked:g}" + ("" if launch is None else f", {launch}"),
            lambda: check_skipping(attend, self.shape, self.session.device, threshold=checked, **sizes),
        )

    def _measured(
        self, impl: str, run: Callable[[], dict[str, Any]], about: dict[str, Any], label: str, **values: Any
    ) -> Result | None:
        cell, model = self._cell | about, str(self.shape)
        blank = self.session.blank("attention_ms", model=model, context=self.tokens, impl=impl, cell=cell, **values)
        return self.session.measured(blank, run, label=f"{self.tokens:>7,} tokens, {label}")


def measure(args: argparse.Namespace, session: Session, shape: Shape) -> list[Result]:
    """All cells that were asked for."""
    cuda, rows = session.device.type == "cuda", []
    impls = ("gluon", "triton") if cuda else ("triton",)
    for tokens in args.tokens:
        at = Lengths(session, shape, tokens)
        if args.launches:
            for sizes, launches in LAUNCHES.items():
                blocks = at.full(*sizes)
                rows += [at.sparse("triton", blocks, 1.0, t, launch) for launch in launches for t in (NOTHING, 1e-3)]
            continue
        rows += [at.dense(name) for name in (("flash", "cudnn") if cuda else ("sdpa",))]
        forms = {(1.0, size): at.full(size, size) for size in (64, 128)}
        forms |= {(density, 64): blocks for density, blocks in at.gated(args.densities).items()}
        for (density, _), blocks in forms.items():
            rows += [at.sparse(impl, blocks, density, None) for impl in impls]
            rows += [at.sparse("triton", blocks, density, t) for t in (NOTHING, *args.thresholds)]
        del at, forms
        session.release()
    return [row for row in rows if row is not None]


def summary(rows: list[Result]) -> str:
    """A line for each time: its share that was skipped, and how it compares with the fastest dense attention."""
    lines = [f"{'tokens':>8} {'what':<34} {'threshold':>9} {'skipped':>8} {'ms':>9} {'x dense':>8}"]
    for row in rows:
        dense = [r.value for r in rows if r.kind == "dense" and r.context == row.context and r.value]
        blocks = f"{row.cell['block_q']}x{row.cell['block_k']} density {row.density:g}" if row.density else "dense"
        skipped = row.samples.get("skipped", [0.0])[0]
        speed = f"{min(dense) / row.value:8.2f}" if dense and row.value else ""
        threshold = row.settings.get("skip_threshold")
        what = f"{row.cell['impl']} {blocks} {row.cell.get('launch', '')}"
        lines.append(
            f"{row.context:>8,} {what:<34} {'' if threshold is None else f'{threshold:g}':>9} {skipped:8.1%} "
            f"{row.value or float('nan'):9.3f} {speed}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072], help="lengths to time")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[1e-2, 1e-3, 1e-4], help="of the rule")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.2], help="of lists that are not full")
    parser.add_argument("--launches", action="store_true", help="compare launches in full lists, and nothing else")
    parser.add_argument("--time-limit", type=float, default=240, help="seconds; nothing new is begun after it")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU, by Triton's interpreter")
    parser.add_argument("--out", type=Path, help="file of results; what it holds is not measured again")
    args = parser.parse_args()
    shape, device, begin = Shape(), torch.device("cuda"), time.monotonic()
    if args.rehearse:
        shape, device, args.tokens = Shape(4, 2, 32, torch.float16), torch.device("cpu"), [450]
    say = lambda text: print(text, flush=True)  # noqa: E731
    session = Session(device, ResultsFile(args.out, device), say, time_limit=args.time_limit)
    with torch.no_grad():
        rows = measure(args, session, shape)
    print(summary(rows))
    for failure in session.failures:
        print(f"failed: {failure}")
    print(f"{time.monotonic() - begin:.0f} s in all, {len(session.left_out)} cells left out for the time limit")
    return 1 if session.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
