"""The options that benchmarks share, and what all of them are to the command line."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from seerattn.bench.dense import BACKENDS
from seerattn.bench.inputs import Shape
from seerattn.bench.model import GATE_FORMS, SIZES, Size
from seerattn.bench.session import Session
from seerattn.hf.eval_model import choose_dtype
from seerattn.ops.resolve import IMPLS
from seerattn.options import check_options, option

SPARSE = tuple(IMPLS["block_sparse_attention"])
# Densities of the published figures, the sparsities .5 to .95.
PUBLISHED_DENSITIES = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05)


def contexts(*default: int, low: int = 1) -> Any:
    """The option of that name."""
    return option(default, help="Lengths in tokens.", low=low)


def densities(*default: float) -> Any:
    """The option of that name."""
    return option(default, help="Shares of the causal blocks that are computed.", above=0, high=1)


def backends() -> Any:
    """The option ``baselines``, where SDPA has to be told which one is meant."""
    return option(
        (), help="Dense attention; default: flash and cudnn, on a CPU sdpa.", choices=(*BACKENDS,), flag=False
    )


def gates(*default: str, flag: bool = True) -> Any:
    """The option of that name."""
    return option(default, help="Forms of gates, with random weights.", choices=(*GATE_FORMS,), flag=flag)


def impl() -> Any:
    """The option of that name."""
    return option(
        None, help="Sparse attention; default: the fastest here, never dense.", choices=("auto", *SPARSE), flag=False
    )


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """Where a benchmark runs, how long, and where its results go.

    Attributes:
        device: see `choose_device`.
        dtype: of weights and activations; "auto" is that of `choose_dtype`.
        time_limit: seconds after which nothing new is begun; 0 for no limit.
        output: results file; cells that it already holds are not measured again.
    """

    device: str | None = option(None, help="cpu, cuda, ...; default: cuda if there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", help="auto is bfloat16 on an accelerator and float32 on a CPU.", flag=False
    )
    time_limit: float = option(0.0, help="Begin nothing new after so many seconds; 0 for no limit.", low=0, flag=False)
    output: Path | None = option(None, help="Results file; finished cells in it are not run again.")

    def __post_init__(self) -> None:
        check_options(self)

    def torch_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype on a device."""
        return getattr(torch, choose_dtype(self.dtype, device))


class Bench(ABC):
    """A benchmark: a dataclass of options that knows what it measures and measures it."""

    contexts: tuple[int, ...]

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def lengths(self) -> Sequence[int]:
        """The contexts in order, each once."""
        return sorted(set(self.contexts))

    @abstractmethod
    def subject(self, dtype: torch.dtype) -> Any:
        """What is measured, in this dtype: a `Shape` or a `Size`."""

    @abstractmethod
    def run(self, session: Session, subject: Any) -> Any:
        """Measures it; returns the results that there are."""


@dataclass(frozen=True, kw_only=True)
class LayerBench(Bench):
    """A benchmark of one attention layer.

    Attributes:
        shape: query heads x key/value heads x channels of a head; by default those of Llama-3.1-8B.
    """

    shape: str = option("32x8x128", help="Of a layer: query heads x KV heads x head dim.")

    def __post_init__(self) -> None:
        super().__post_init__()
        Shape.parse(self.shape, torch.float32)

    def subject(self, dtype: torch.dtype) -> Shape:
        """See `Bench`."""
        return Shape.parse(self.shape, dtype)


@dataclass(frozen=True, kw_only=True)
class ModelBench(Bench):
    """A benchmark of a whole model with random weights.

    Attributes:
        model: name of its size; "tiny" is to try the command out.
        gates: names of forms of gates.
        baselines: SDPA backends of the unpatched model.
        layers: decoder layers to measure; None is all of them.
        repeats: timed runs of a cell; long ones are repeated twice.
    """

    model: str = option("llama-3.1-8b", help="Shape, with random weights.", choices=(*SIZES,))
    gates: tuple[str, ...] = gates("paper")
    baselines: tuple[str, ...] = backends()
    layers: int | None = option(None, help="Decoder layers to measure; default: all of them.", low=1, flag=False)
    repeats: int = option(3, help="Timed runs; those of 5 s and more are repeated twice.", low=2, flag=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = SIZES[self.model].whole
        if self.layers is not None and self.layers > whole:
            raise ValueError(f"layers must be at most the {whole} of {self.model}, got {self.layers}")

    def subject(self, dtype: torch.dtype) -> Size:
        """See `Bench`."""
        size = SIZES[self.model]
        return replace(size, layers=self.layers or size.whole, shape=replace(size.shape, dtype=dtype))
