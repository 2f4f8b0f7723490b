"""Maps of single heads, for the figures of a report: the true one, that of gates, and the blocks that all chose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from seerattn.data.windows import Window
from seerattn.eval.choice import Choice
from seerattn.gate_selector import pooled_inputs
from seerattn.hf.eval_model import EvalModel
from seerattn.methods.gate import Gate
from seerattn.ops.attention_map import attention_map
from seerattn.results.maps import BlockMaps
from seerattn.selection.block_indices import causal_block_mask, forced_block_mask
from seerattn.selection.selector import AttentionContext


def check_heads(model: EvalModel, method: Gate, heads: Sequence[tuple[int, int]]) -> None:
    """Refuses heads that maps cannot be shown of.

    Raises:
        ValueError: a layer has no gate, or a head does not exist.
    """
    gates, count = model.gates(method.gates).gates, model.model.config.get_text_config().num_attention_heads
    if not all(layer in gates and 0 <= head < count for layer, head in heads):
        raise ValueError(f"heads must be among {count} heads of the layers {sorted(gates)}, got {list(heads)}")


def observe_maps(
    model: EvalModel,
    choice: Choice,
    window: Window,
    heads: Sequence[tuple[int, int]],
    compared: Sequence[Choice] = (),
) -> BlockMaps:
    """The true map, the gate's map and the chosen blocks of some heads on one window of the dense model.

    Args:
        model: the model.
        choice: gates at a density.
        window: the text.
        heads: (layer, query head) of each map.
        compared: choices whose blocks are kept too, all with blocks of the size of the gates.

    Raises:
        ValueError: a layer has no gate, or a head does not exist.
    """
    check_heads(model, choice.method, heads)
    gates = model.gates(choice.method.gates).gates
    count = model.model.config.get_text_config().num_attention_heads
    block_q, block_k = choice.method.block_sizes
    choosers = [of.selector_at for of in compared]
    found: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def see(q: Tensor, k: Tensor, context: AttentionContext) -> None:
        # Every layer is asked, of selectors made once: what some choose is what a layer below has chosen.
        selectors = [at(context.layer) for at in choosers]
        kept = [None if of is None else of.select(q, k, context).to_mask()[0] for of in selectors]
        wanted = [head for layer, head in heads if layer == context.layer]
        if not wanted:
            return
        gate, selector = gates[context.layer], choice.selector_at(context.layer)
        target = attention_map(q, k, form=gate.config.target, block_q=block_q, block_k=block_k, **context.logits).map
        scores = gate(*pooled_inputs(gate, q, k, context))
        forced = forced_block_mask(0, q.shape[2], *scores.shape[2:], block_q, block_k, selector.policy.sink_blocks)[0]
        forced = forced.to(scores.device)
        # Every row keeps a block to normalise over: -1e30 is as good as -inf where there is another.
        decided = scores.masked_fill(forced, -1e30).softmax(-1).masked_fill(forced, 0.0)
        chosen = selector.select(q, k, context).to_mask()
        causal = causal_block_mask(0, q.shape[2], *scores.shape[2:], block_q, block_k)[0].to(scores.device)
        for head in wanted:
            shared = head * scores.shape[1] // count
            # A method may leave a layer dense.
            beside = [causal if mask is None else mask[head * len(mask) // count] for mask in kept]
            maps = (target[0, head], decided[0, shared], chosen[0, shared], forced, *beside)
            found[context.layer, head] = tuple(x.cpu() for x in maps)

    model.observe([window], see)
    target, gate, chosen, forced, *kept = (torch.stack(of).numpy() for of in zip(*(found[place] for place in heads)))
    names = [f"gates: {of.method}" if of.method.kind == "learned" else str(of.method) for of in compared]
    beside = {"systems": names, "kept": np.stack(kept)} if compared else {}
    return BlockMaps(list(heads), target, gate, chosen, forced[0], str(choice.method), choice.asked, **beside)
