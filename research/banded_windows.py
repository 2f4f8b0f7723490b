"""Sliding windows of SDPA in bands, so that keys which no query of a band can see cost nothing.

    python research/banded_windows.py eval --config research/experiments/gemma3-time.yaml --output outputs/times.jsonl

SDPA takes a window as a mask over all keys, and computes what the mask hides. So on long prompts of a model with
windows, such as Gemma 3, most of the time goes to layers that see 512 tokens. Here the queries of such a layer run in
bands as long as its window, each beside the keys of its own band and of the one before. The numbers are those of SDPA
but for rounding. The command line is that of `seerattn`; layers without a window are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from seerattn.cli import main


def attend_in_bands(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention by ``attend``, in bands where a layer has a window that is short beside a whole prompt.

    Args:
        attend: an attention function of transformers, such as that of SDPA.
        module: the attention module.
        query: ``[B, H, T, D]``.
        key: ``[B, HKV, T, D]``; of another length than the queries, nothing is changed.
        value: ``[B, HKV, T, D]``.
        attention_mask: bool ``[B or 1, 1, T, T]``, true where a query sees a key.
        kwargs: what the architecture passes on, ``sliding_window`` among it.
    """
    window, tokens = kwargs.get("sliding_window"), query.shape[2]
    whole = attention_mask is not None and attention_mask.dtype == torch.bool and key.shape[2] == tokens
    if window is None or not whole or tokens <= 2 * window:
        return attend(module, query, key, value, attention_mask, **kwargs)
    bands = -(-tokens // window)
    end = bands * window - tokens
    q = F.pad(query, (0, 0, 0, end)).unflatten(2, (bands, window)).transpose(1, 2).flatten(0, 1)
    k, v = (
        F.pad(x, (0, 0, window, end)).unfold(2, 2 * window, window).permute(0, 2, 1, 4, 3).flatten(0, 1)
        for x in (key, value)
    )
    mask = _bands_of_mask(attention_mask.expand(len(query), -1, -1, -1), window).flatten(0, 1)
    out, weights = attend(module, q, k, v, mask, **kwargs)
    return out.unflatten(0, (len(query), bands)).flatten(1, 2)[:, :tokens], weights


def _bands_of_mask(mask: Tensor, window: int) -> Tensor:
    """What the queries of each band see of its own keys and of those before: ``[B, bands, 1, window, 2 * window]``."""
    batch, heads, tokens = mask.shape[:3]
    full, rest = divmod(tokens, window)
    of_batch, of_head, of_row, of_column = mask.stride()
    along = (of_batch, window * (of_row + of_column), of_head, of_row, of_column)
    start = mask.storage_offset() + window * of_row
    parts = [
        F.pad(mask[:, :, :window, :window], (window, 0)).unsqueeze(1),
        mask.as_strided((batch, full - 1, heads, window, 2 * window), along, start),
    ]
    if rest:
        last = mask[:, :, full * window :, (full - 1) * window :]
        parts.append(F.pad(last, (0, window - rest, 0, window - rest)).unsqueeze(1))
    return torch.cat(parts, 1)


def use_bands() -> None:
    """Lets SDPA run windows in bands from now on, in this process."""
    AttentionInterface.register("sdpa", partial(attend_in_bands, ALL_ATTENTION_FUNCTIONS["sdpa"]))


if __name__ == "__main__":
    use_bands()
    main()
