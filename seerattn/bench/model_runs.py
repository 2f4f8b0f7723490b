"""`ModelRuns`: timed runs of one whole model, from each of which several quantities come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from seerattn.bench.model import BenchModel, Size
from seerattn.bench.session import Session
from seerattn.bench.timing import peak_gib
from seerattn.results.record import Result


class ModelRuns:
    """What benchmarks of whole models share.

    Args:
        session: what runs the measurements.
        size: of the model.
        repeats: timed runs of a cell; long ones are repeated twice.
        impl: of the sparse attention.
    """

    quantities: ClassVar[tuple[str, ...]]

    def __init__(self, session: Session, size: Size, repeats: int, impl: str = "auto") -> None:
        self.session, self.size, self.repeats, self.impl = session, size, repeats, impl
        self.shape, self.device = size.shape, session.device
        self.model = BenchModel(size, session.device, impl)

    def measure(
        self,
        tokens: int,
        impl: str,
        run: Callable[[], dict[str, dict[str, Any]]],
        label: str,
        *,
        cell: dict[str, Any],
        **values: Any,
    ) -> list[Result | None]:
        """`Session.measured_together` of the quantities of this class."""
        cell = {"dtype": self.shape.dtype_name, "layers": self.size.layers} | cell
        blanks = [
            self.session.blank(what, model=self.size.name, context=tokens, impl=impl, cell=cell, **values)
            for what in self.quantities
            if what != "peak_memory_gib" or self.device.type == "cuda"
        ]
        return self.session.measured_together(blanks, run, label=f"{tokens:>7,} tokens, {label}")

    def fields(
        self, found: dict[str, float], samples: dict[str, Sequence[float]], **values: Any
    ) -> dict[str, dict[str, Any]]:
        """Fields of the results of some runs, by what they measure; the peak of the memory is added."""
        rounded = {name: [round(value, 5) for value in of] for name, of in samples.items()}
        values |= {"n": len(rounded["seconds"]), "samples": rounded}
        found = found | peak_gib(self.device)
        return {what: values | {"value": round(value, 5)} for what, value in found.items()}


def random_batch(size: Size, tokens: int, device: torch.device) -> dict[str, Tensor]:
    """One sample of random tokens."""
    input_ids = torch.randint(3, size.vocab, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    return {"input_ids": input_ids.to(device), "position_ids": torch.arange(tokens, device=device)[None]}
