"""Gate keys of sequences that lie apart, as a table of where they are: nothing is copied when one of them grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KeyTable:
    """Gate keys of several sequences, each in a tensor of its own.

    Attributes:
        keys: fp32 ``[1, h, W, DG]`` of each sequence, or None of one without; held, so that they stay where they are.
        places: int64 ``[B, 2]`` on the device, the address of each and the stride of its heads in elements.
        shape: what one tensor of all would have, ``(B, h, W, DG)`` with the largest ``W``.
        aligned: whether all heads begin at multiples of 16 bytes.
    """

    keys: tuple[Tensor | None, ...]
    places: Tensor
    shape: tuple[int, int, int, int]
    aligned: bool

    @classmethod
    def of(cls, keys: Sequence[Tensor | None], *, heads: int, dim: int, device: torch.device) -> KeyTable:
        """The table of some sequences; gate keys whose pieces do not lie side by side are copied.

        Raises:
            ValueError: gate keys of another form.
        """
        held, places, windows = [], [], 0
        for x in keys:
            if x is None:
                held.append(None)
                places.append((0, 0))
                continue
            expected = (1, heads, x.shape[2], dim) if x.ndim == 4 else None
            if x.shape != expected or x.dtype != torch.float32 or x.device != device:
                raise ValueError(
                    f"gate keys must be fp32 [1, {heads}, W, {dim}] on {device}, got {x.dtype} {list(x.shape)} on "
                    f"{x.device}"
                )
            x = x if x.stride()[2:] == (dim, 1) else x.contiguous()
            held.append(x)
            places.append((x.data_ptr(), x.stride(1)))
            windows = max(windows, x.shape[2])
        aligned = dim % 4 == 0 and all(address % 16 == 0 and stride % 4 == 0 for address, stride in places)
        # Memory that is not pinned is copied before the call returns, which does not wait for what the device does.
        table = torch.tensor(places, dtype=torch.int64).to(device, non_blocking=True)
        return cls(tuple(held), table, (len(held), heads, windows, dim), aligned)

    def is_of(self, keys: Sequence[Tensor | None]) -> bool:
        """Whether it is the table of these very tensors."""
        return len(keys) == len(self.keys) and all(a is b for a, b in zip(keys, self.keys))
