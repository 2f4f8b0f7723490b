"""Where XAttention's thresholds by head come from: the attention of a model on sample texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seerattn.data.windows import Window
from seerattn.eval.arms import EvalModel
from seerattn.methods.described import describe
from seerattn.methods.head_rules import Plan
from seerattn.methods.xattention.estimate import METHOD, minimum_thresholds

if TYPE_CHECKING:
    from seerattn.hf.capture import AttentionCall


@dataclass(frozen=True, kw_only=True)
class ThresholdSettings:
    """What defines a profile beside the model.

    Attributes:
        stride: of the antidiagonals.
        block: block size in tokens.
        coverage: share of the true mass that the thresholds are to hold.
        context: tokens of a window.
        windows: number of windows.
        seed: draws the windows.
        data: digest of the text that they are drawn from.
        dtype: of the model.
    """

    stride: int
    block: int
    coverage: float
    context: int
    windows: int
    seed: int
    data: str
    dtype: str


def profile_plan(
    subject: EvalModel,
    windows: Sequence[Window],
    settings: ThresholdSettings,
    *,
    progress: Callable[[str, int], Callable[[int], None]] | None = None,
) -> Plan:
    """Finds the minimum thresholds of every head while dense attention runs, the largest over the windows.

    Args:
        subject: the model.
        windows: texts, run one after the other.
        settings: what is looked for.
        progress: called with a description and a number of windows, returns what is told of finished ones.
    """
    from seerattn.hf.capture import watch_attention

    found: dict[int, Tensor] = {}

    def see(call: AttentionCall) -> None:
        threshold = minimum_thresholds(
            call.query,
            call.key,
            scale=call.scale,
            softcap=call.softcap,
            sinks=call.sinks,
            stride=settings.stride,
            block=settings.block,
            coverage=settings.coverage,
        ).cpu()
        found[call.layer] = torch.maximum(threshold, found.get(call.layer, threshold))

    advance = progress("thresholds", len(windows)) if progress else None
    with torch.inference_mode(), watch_attention(subject.model, see):
        for window in windows:
            input_ids = torch.tensor([window.input_ids], device=subject.device)
            subject.model.base_model(input_ids=input_ids, use_cache=False)
            if advance is not None:
                advance(1)
    model = describe(subject.model.config)
    rules = [
        [{"threshold": round(value, 6)} for value in found[layer].tolist()] if layer in found else []
        for layer in range(model["layers"])
    ]
    every = torch.cat(list(found.values()))
    summary = {"least threshold": float(every.min()), "largest threshold": float(every.max())}
    return Plan(METHOD, model, rules, asdict(settings) | {"found": summary})
