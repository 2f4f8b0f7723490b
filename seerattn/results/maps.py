"""Block maps of single heads, kept for a figure."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from seerattn.outputs import check_output
from seerattn.saving import staged
from seerattn.texts import visible

# Whatever numpy and zipfile raise of a file that is something else, or was damaged.
_DAMAGED = (OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError, SyntaxError, MemoryError)
_DAMAGED += (BadZipFile, zlib.error, struct.error)


@dataclass(frozen=True)
class BlockMaps:
    """What a gate sees in one document, for some heads, and what others keep there.

    Attributes:
        heads: (layer, query head) of each map.
        target: true maps, fp32 ``[n, Nq, Nk]``, rows sum to 1.
        gate: the gate's softmax over the key blocks that selection decides on, the same shape.
        chosen: bool, blocks that are computed.
        forced: bool ``[Nq, Nk]``, blocks that are computed whatever the gate says.
        gates: name of the gates.
        density: nominal density of the choice.
        systems: names of all methods that were compared at that density, the gates among them.
        kept: bool ``[methods, n, Nq, Nk]``, the blocks that each computes; of files from before there was a
            comparison, of none.
    """

    heads: list[tuple[int, int]]
    target: np.ndarray
    gate: np.ndarray
    chosen: np.ndarray
    forced: np.ndarray
    gates: str
    density: float
    systems: list[str] = field(default_factory=list)
    kept: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0, 0), dtype=bool))

    @property
    def decided(self) -> np.ndarray:
        """Bool ``[Nq, Nk]``, causal blocks that are not forced; the last forced one of a row is its diagonal block."""
        causal = self.forced[:, ::-1].cumsum(-1)[:, ::-1] > 0
        return causal & ~self.forced

    def save(self, path: Path) -> None:
        """Writes a compressed .npz, whole or not at all.

        Raises:
            ValueError: the file holds something else than block maps.
            OSError: it could not be written; what was there before is as it was.
        """
        check_maps(path)
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
                maps = cls(
                    [(int(layer), int(head)) for layer, head in file["heads"]],
                    file["target"],
                    file["gate"],
                    file["chosen"],
                    file["forced"],
                    visible(str(file["gates"])),
                    float(file["density"]),
                    *([[visible(str(name)) for name in file["systems"]], file["kept"]] if "kept" in file else []),
                )
                maps._check()
                return maps
        except _DAMAGED as error:
            raise ValueError(
                f"maps must be a file that seerattn eval recall --maps wrote, got {path}: {error}"
            ) from error

    def _check(self) -> None:
        """Refuses arrays that do not belong together."""
        shape = (len(self.heads), *self.forced.shape)
        kinds = {"target": "f", "gate": "f", "chosen": "b"}
        wrong = [n for n, k in kinds.items() if getattr(self, n).shape != shape or getattr(self, n).dtype.kind != k]
        if wrong or self.forced.dtype.kind != "b" or self.forced.ndim != 2 or 0 in shape:
            raise ValueError(f"maps of {len(self.heads)} heads must be of one shape [heads, Nq, Nk], got others")
        if self.kept.dtype.kind != "b" or (self.systems and self.kept.shape != (len(self.systems), *shape)):
            raise ValueError(f"blocks of {len(self.systems)} methods must be of the shape of the maps, got others")
        finite = np.isfinite(self.target).all() and np.isfinite(self.gate).all() and np.isfinite(self.density)
        if not finite or not self.forced.any(-1).all():
            raise ValueError("maps must be finite, with a forced block in every row, got others")


def check_maps(path: Path) -> None:
    """Refuses a place for block maps that holds something else.

    Raises:
        ValueError: says so.
    """
    check_output(path, "maps", "block maps", BlockMaps.load)
