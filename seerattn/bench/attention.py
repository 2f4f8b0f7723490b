"""One attention layer: dense attention, random sparse masks, and what gate and selection add, each timed alone.

With `Layer(backward=True)` a call of an attention is its forward and its backward pass ("attention_training_ms").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from seerattn.bench.backward import check_dense_gradients, check_sparse_gradients, forward_and_backward
from seerattn.bench.check import GATE_TOKENS, check_attention, check_dense, check_selection
from seerattn.bench.dense import BASELINES, default_backends, default_baselines, dense_attention, flex_attention
from seerattn.bench.inputs import Shape, random_blocks, random_qkv
from seerattn.bench.model import gate_form, layer_context, random_gate, rotary_tables
from seerattn.bench.options import PUBLISHED_DENSITIES, SPARSE, LayerBench, contexts, densities, gates
from seerattn.bench.session import Session, of_gates
from seerattn.bench.timing import Timing, device_time, pipeline_time
from seerattn.gate.config import AttnGateConfig
from seerattn.gate_selector import GateSelector
from seerattn.ops.block_sparse_attention import block_sparse_attention
from seerattn.ops.resolve import preferred
from seerattn.options import option
from seerattn.results.record import Result
from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.policies import TopK
from seerattn.texts import short

Share = Literal["head", "group"]


@dataclass(frozen=True)
class Sparse:
    """A way of computing sparse attention.

    Attributes:
        impl: of `block_sparse_attention`, or "flex" for FlexAttention.
        block_q: query block size in tokens.
        block_k: key block size in tokens.
        share: whether every query head has lists of its own, or every KV group.
        rows_alike: see `random_blocks`.
    """

    impl: str
    block_q: int = 64
    block_k: int = 64
    share: Share = "head"
    rows_alike: int = 1

    def __str__(self) -> str:
        alike = f", {self.rows_alike} rows alike" if self.rows_alike > 1 else ""
        return f"{self.impl} {self.block_q}x{self.block_k} per {self.share}{alike}"

    def sizes(self, shape: Shape) -> dict[str, int]:
        """Its blocks and the number of its lists."""
        heads = shape.heads if self.share == "head" else shape.kv_heads
        return {"block_q": self.block_q, "block_k": self.block_k, "mask_heads": heads}

    def cell(self, shape: Shape) -> dict[str, Any]:
        """What sets it apart from others in results."""
        return self.sizes(shape) | {"share": self.share}

    def attention(self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices) -> Callable[[], Tensor]:
        """The attention as a call that can be timed."""
        if self.impl == "flex":
            return flex_attention(q, k, v, blocks)
        return lambda: block_sparse_attention(q, k, v, blocks, impl=self.impl)


class Layer:
    """One attention layer at one length, and the measurements that can be made of it.

    Args:
        session: what runs them.
        shape: the heads of the layer.
        tokens: length of the prompt.
        pipeline: time calls among others like them, host included, instead of on the device alone.
        backward: take the gradients of q, k and v, too.
    """

    def __init__(
        self, session: Session, shape: Shape, tokens: int, *, pipeline: bool = False, backward: bool = False
    ) -> None:
        self.session, self.shape, self.tokens, self.backward = session, shape, tokens, backward
        self._clock = pipeline_time if pipeline else device_time
        self._cell = {"dtype": shape.dtype_name, "clock": "pipeline" if pipeline else "device"}

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return random_qkv(self.shape, self.tokens, self.session.device)

    def _time(self, run: Callable[[], object]) -> Timing:
        return self._clock(run, self.session.device)

    @property
    def _what(self) -> str:
        return "attention_training_ms" if self.backward else "attention_ms"

    def _blank(self, what: str, impl: str, cell: dict[str, Any], **values: Any) -> Result:
        return self.session.blank(
            what, model=str(self.shape), context=self.tokens, impl=impl, cell=self._cell | cell, **values
        )

    def dense(self, name: str) -> Result | None:
        """Time of dense attention ("attention_ms" or "attention_training_ms", method "dense")."""

        def run() -> dict[str, Any]:
            require_dense(self.session, self.shape, name, backward=self.backward)
            if self.backward:
                call = forward_and_backward(lambda *x: dense_attention(name, *x)(), *self.qkv)
            else:
                call = dense_attention(name, *self.qkv)
            return self._time(call).fields()

        label = f"{self.tokens:>7,} tokens, dense {name}"
        return self.session.measured(self._blank(self._what, name, {}, realised_density=1.0), run, label=label)

    def sparse(self, kind: Sparse, density: float) -> Result | None:
        """Time of sparse attention with random blocks (quantities as `dense`, method "random")."""
        session, shape = self.session, self.shape
        sizes = kind.sizes(shape)

        def run() -> dict[str, Any]:
            require_sparse(session, shape, kind, backward=self.backward)
            blocks = random_blocks(
                tokens=self.tokens, density=density, device=session.device, rows_alike=kind.rows_alike, **sizes
            )
            if self.backward:
                call = forward_and_backward(lambda *x: kind.attention(*x, blocks)(), *self.qkv)
            else:
                call = kind.attention(*self.qkv, blocks)
            timing = self._time(call)
            return timing.fields() | {"realised_density": float(blocks.density().mean())}

        cell = kind.cell(shape) | {"rows_alike": kind.rows_alike}
        values = {"method": "random", "kind": "static", "name": "random", "density": density, "seed": 0}
        blank = self._blank(self._what, kind.impl, cell, **values)
        return session.measured(blank, run, label=f"{self.tokens:>7,} tokens, {kind}, density {density:g}")

    def selection(self, form: str, density: float, block_q: int, block_k: int, impl: str) -> Result | None:
        """Time of a gate with random weights and top-k together, from q and k to index lists ("selection_ms")."""
        session, shape = self.session, self.shape
        c = gate_form(form, block_q, block_k)
        policy = TopK(density=density)

        def run() -> dict[str, Any]:
            require_selection(session, shape, form, block_q, block_k, impl)
            selector = GateSelector(random_gate(c, shape, session.device), policy, impl)
            context = layer_context(shape, self.tokens, session.device)
            q, k, _ = self.qkv
            with torch.no_grad():
                realised = float(selector.select(q, k, context).density().mean())
                timing = self._time(lambda: selector.select(q, k, context))
            return timing.fields() | {"realised_density": realised}

        cell = Sparse(impl, block_q, block_k, share_of(c)).cell(shape)
        cell |= {"query_subblocks": c.query_subblocks, "key_subblocks": c.key_subblocks}
        values = of_gates(form) | {"settings": policy.to_dict(), "density": density, "seed": 0}
        label = f"{self.tokens:>7,} tokens, gate {form} {block_q}x{block_k} {impl}, density {density:g}"
        return session.measured(self._blank("selection_ms", impl, cell, **values), run, label=label)


def share_of(config: AttnGateConfig) -> Share:
    """Who shares the lists of a gate."""
    return "group" if config.share == "kv_group" else "head"


def require_dense(session: Session, shape: Shape, name: str, *, backward: bool = False) -> None:
    """Checks a dense attention, or its gradients, once a session.

    Raises:
        CheckFailed: it does not match its oracle.
    """
    check, title = (check_dense_gradients, f"gradients of dense {name}") if backward else (check_dense, f"dense {name}")
    session.check(title, lambda: check(lambda *x: dense_attention(name, *x)(), shape, session.device))


def require_sparse(session: Session, shape: Shape, kind: Sparse, *, backward: bool = False) -> None:
    """Checks a sparse attention, or its gradients, once a session; raises as `require_dense`."""
    check, title = (check_sparse_gradients, f"gradients of {kind}") if backward else (check_attention, str(kind))
    attend = lambda *x: kind.attention(*x)()  # noqa: E731
    session.check(title, lambda: check(attend, shape, session.device, **kind.sizes(shape)))


def require_selection(session: Session, shape: Shape, form: str, block_q: int, block_k: int, impl: str) -> None:
    """Checks gate and selection in these blocks, once a session; raises as `require_dense`."""
    device = session.device

    def run() -> tuple[float, float]:
        policy = TopK(density=0.3)
        selector = GateSelector(random_gate(gate_form(form, block_q, block_k), shape, device), policy, impl)
        context = layer_context(shape, GATE_TOKENS, device)
        tables = rotary_tables(shape, GATE_TOKENS, device)
        with torch.no_grad():
            return check_selection(
                lambda q, k: selector.select(q, k, context), selector.gate, shape, tables, density=policy.density
            )

    session.check(f"selection of the gate {form} {block_q}x{block_k} {impl}", run)


@dataclass(frozen=True, kw_only=True)
class AttentionBench(LayerBench):
    """Dense attention, sparse attention, and gate with selection, at every length and density.

    Attributes:
        densities: shares of the causal block area that are computed.
        baselines: dense attentions; none are those that run on the device.
        impls: of sparse attention; none are those that the device may have.
        gates: names of gates; each is measured in the block sizes of the sparse attentions that can use its lists.
        backward: time forward and backward of every attention together, and no gate.
        blocks: sizes in tokens, QUERIESxKEYS.
        shares: whether lists are for every query head or for every KV group.
        rows_alike: see `random_blocks`.
        gate_impls: implementations of gate and selection; none is the fastest one.
    """

    contexts: tuple[int, ...] = contexts(8192, 32768, 131072)
    densities: tuple[float, ...] = densities(*PUBLISHED_DENSITIES)
    baselines: tuple[str, ...] = option((), help="Dense attention; default: all that run here.", choices=BASELINES)
    impls: tuple[str, ...] = option(
        (), help="Sparse attention; default: all that this device may have.", choices=(*SPARSE, "flex")
    )
    gates: tuple[str, ...] = gates("paper", "paper-group")
    backward: bool = option(False, help="Time forward and backward together, as in training.")
    blocks: tuple[str, ...] = option(("64x64", "128x128"), help="Sizes, QUERIESxKEYS in tokens.", flag=False)
    shares: tuple[Share, ...] = option(
        ("head", "group"), help="Lists for every query head or for every KV group.", flag=False
    )
    rows_alike: tuple[int, ...] = option(
        (1,), help="Neighbouring query blocks that draw the same key blocks.", low=1, flag=False
    )
    gate_impls: tuple[str, ...] = option(
        (), help="Gate and selection; default: the fastest here.", choices=("triton", "reference"), flag=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.blocks:
            _block_sizes(text)

    def run(self, session: Session, subject: Shape) -> list[Result]:
        """See `Bench`."""
        rows: list[Result | None] = []
        device, kinds = session.device, self.kinds(session.device)
        # Gradients of whole models are taken through the backends that those can be given.
        baselines = self.baselines or (default_backends if self.backward else default_baselines)(device)
        gate_impls = self.gate_impls or [preferred("gate_scores", "auto", device)]
        for tokens in self.lengths:
            layer = Layer(session, subject, tokens, backward=self.backward)
            rows += [layer.dense(name) for name in baselines]
            rows += [layer.sparse(kind, density) for kind in kinds for density in self.densities]
            # Training takes the gradients of a gate elsewhere.
            for form in () if self.backward else self.gates:
                share = share_of(gate_form(form))
                blocks = dict.fromkeys((kind.block_q, kind.block_k) for kind in kinds if kind.share == share)
                for sizes, impl in product(blocks, gate_impls):
                    rows += [layer.selection(form, density, *sizes, impl) for density in self.densities]
            session.release()
        return [row for row in rows if row is not None]

    def kinds(self, device: torch.device) -> list[Sparse]:
        """The ways of computing sparse attention."""
        impls: tuple[str, ...] = ("reference",)
        if device.type == "cuda":
            impls = ("gluon", "triton") if self.backward else ("gluon", "triton", "flash4", "flex")
        return [
            Sparse(impl, block_q, block_k, share, alike)
            for impl in self.impls or impls
            for block_q, block_k in map(_block_sizes, self.blocks)
            for share in self.shares
            for alike in self.rows_alike
            # FlexAttention's kernel has tiles of 128 and a mask for every query head.
            if impl != "flex" or (block_q % 128 == block_k % 128 == 0 and share == "head")
        ]


def _block_sizes(text: str) -> tuple[int, int]:
    try:
        block_q, block_k = map(int, text.split("x"))
    except ValueError as error:
        raise ValueError(f"blocks must be QUERIESxKEYS such as 64x64, got {short(text)}") from error
    return block_q, block_k
