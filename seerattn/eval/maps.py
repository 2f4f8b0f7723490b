"""Block maps of single heads, kept for a figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from seerattn.saving import staged


@dataclass(frozen=True)
class BlockMaps:
    """What a gate sees in one document, for some heads.

    Attributes:
        heads: (layer, query head) of each map.
        target: true maps, fp32 ``[n, Nq, Nk]``, rows sum to 1.
        gate: the gate's softmax over the key blocks that selection decides on, the same shape.
        chosen: bool, blocks that are computed.
        forced: bool ``[Nq, Nk]``, blocks that are computed whatever the gate says.
        gates: name of the gates.
        density: nominal density of the choice.
    """

    heads: list[tuple[int, int]]
    target: np.ndarray
    gate: np.ndarray
    chosen: np.ndarray
    forced: np.ndarray
    gates: str
    density: float

    @property
    def decided(self) -> np.ndarray:
        """Bool ``[Nq, Nk]``, causal blocks that are not forced; the last forced one of a row is its diagonal block."""
        causal = self.forced[:, ::-1].cumsum(-1)[:, ::-1] > 0
        return causal & ~self.forced

    def save(self, path: Path) -> None:
        """Writes a compressed .npz, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged(path.parent, path.name) as staging, (staging / path.name).open("wb") as file:
            np.savez_compressed(file, **vars(self))

    @classmethod
    def load(cls, path: Path) -> BlockMaps:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is something else.
        """
        try:
            with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
                return cls(
                    [(int(layer), int(head)) for layer, head in file["heads"]],
                    file["target"],
                    file["gate"],
                    file["chosen"],
                    file["forced"],
                    str(file["gates"]),
                    float(file["density"]),
                )
        except (OSError, EOFError, KeyError, ValueError, BadZipFile) as error:
            raise ValueError(f"maps must be a file that seerattn eval recall --maps wrote, got {path}") from error
