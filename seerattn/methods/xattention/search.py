"""Where XAttention's thresholds by head come from: the attention of a model on sample texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seerattn.data.windows import cut_windows
from seerattn.methods.head_rules import HeadRules
from seerattn.methods.minference.search import draw_windows
from seerattn.methods.search import Progress, Search
from seerattn.methods.xattention.estimate import METHOD, minimum_thresholds
from seerattn.options import option

if TYPE_CHECKING:
    from seerattn.hf.capture import AttentionCall
    from seerattn.hf.eval_model import EvalModel


@dataclass(frozen=True, kw_only=True)
class XAttentionSearch(Search):
    """Finds the minimum thresholds of every head while dense attention runs, the largest over the windows."""

    method = METHOD

    stride: int = option(16, help="Distance of the antidiagonals in tokens.", low=1)
    block: int = option(128, help="Block size in tokens, a multiple of the stride.", low=1)
    coverage: float = option(0.9, help="Share of the true mass that the thresholds are to hold.", above=0, high=1)
    windows: int = option(4, help="Windows to search on, drawn from all of the data.", low=1)

    def run(
        self, model: EvalModel, documents: Sequence[Sequence[int]], *, progress: Progress | None = None
    ) -> HeadRules:
        """Searches; ``made["found"]`` has the least and the largest threshold."""
        found: dict[int, Tensor] = {}

        def see(call: AttentionCall) -> None:
            threshold = minimum_thresholds(
                call.query,
                call.key,
                scale=call.scale,
                softcap=call.softcap,
                sinks=call.sinks,
                stride=self.stride,
                block=self.block,
                coverage=self.coverage,
            ).cpu()
            found[call.layer] = torch.maximum(threshold, found.get(call.layer, threshold))

        cut = cut_windows(documents, context=self.context, count=None, bos_token_id=model.bos_token_id)
        windows = draw_windows(cut, self.windows, self.seed)
        model.watch(windows, see, advance=progress and progress("thresholds", len(windows)))
        layers = model.model.config.get_text_config().num_hidden_layers
        rules = [
            [{"threshold": round(value, 6)} for value in found[layer].tolist()] if layer in found else []
            for layer in range(layers)
        ]
        every = torch.cat(list(found.values()))
        summary = {"least threshold": float(every.min()), "largest threshold": float(every.max())}
        return self.rules(model, documents, rules, summary)
