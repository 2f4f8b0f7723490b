"""Recall: how much of the true block map the chosen blocks hold, per layer and head.

Two maps are asked: the published *target* of gates, the row-normalised maximum of attention probabilities in each tile,
whatever map a gate has learned, and the attention *mass*. Mass alone misleads: a window of recent blocks can hold as
much of it as the oracle's choice and still lose everything that was to be retrieved.

The model runs dense, so every selector sees the queries and keys of the unchanged model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from seerattn.data.windows import Window, batches
from seerattn.eval.arms import DENSE, Arm, EvalModel, TunedArm
from seerattn.gate_selector import pooled_inputs
from seerattn.methods.oracle import OracleSelector
from seerattn.ops.attention_map import attention_map
from seerattn.results import statistics
from seerattn.results.environment import Stopwatch
from seerattn.results.file import ResultsFile
from seerattn.results.maps import BlockMaps
from seerattn.results.record import Result
from seerattn.selection.block_indices import BlockIndices, forced_block_mask
from seerattn.selection.map_form import MASS, PUBLISHED, MapForm
from seerattn.selection.selector import AttentionContext, Selector
from seerattn.training.losses import target_recall

Quantity = Literal["target_recall", "mass_recall", "density"]


@dataclass(frozen=True)
class Observer:
    """A selector that shows every attention call to a function and keeps all blocks.

    Attributes:
        see: called with post-RoPE q and k and the context of the call.
    """

    see: Callable[[Tensor, Tensor, AttentionContext], None]

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
        """See `Selector.select`."""
        self.see(q, k, context)
        return BlockIndices.dense(
            batch=q.shape[0],
            heads=k.shape[1],
            q_len=q.shape[2],
            k_len=k.shape[2],
            block_q=64,
            block_k=64,
            device=q.device,
        )


class RecallMeter:
    """Recall of several selectors on the attention calls that it is shown.

    Args:
        selectors: for each name, what gives the selector of a layer; None leaves the layer out.
        block_q: query block size in tokens, that of all selectors.
        block_k: key block size in tokens.
        target: form of the map whose recall is "target_recall".
    """

    def __init__(
        self,
        selectors: dict[str, Callable[[int], Selector | None]],
        *,
        block_q: int = 64,
        block_k: int = 64,
        target: MapForm = PUBLISHED,
    ) -> None:
        self._selectors, self._target = selectors, target
        self._blocks = {"block_q": block_q, "block_k": block_k}
        # By name, quantity and layer, a [H] row for every sequence seen.
        self._rows: dict[str, dict[Quantity, dict[int, list[Tensor]]]] = {
            name: {quantity: {} for quantity in get_args(Quantity)} for name in selectors
        }

    @torch.no_grad()
    def see(self, q: Tensor, k: Tensor, context: AttentionContext) -> None:
        """Measures one call of sequences of equal length, queries and keys after RoPE."""
        selectors = {name: at(context.layer) for name, at in self._selectors.items()}
        # Maps of oracles come out of the same walk; making them again would double the cost of the whole measurement.
        chosen_by = (selector.target for selector in selectors.values() if isinstance(selector, OracleSelector))
        forms = tuple(dict.fromkeys((self._target, MASS, *chosen_by)))
        maps = dict(zip(forms, attention_map(q, k, form=forms, **context.logits, **self._blocks).maps))
        target, mass = maps[self._target], maps[MASS]
        q_len, k_len, kv_heads = q.shape[2], k.shape[2], k.shape[1]
        for name, selector in selectors.items():
            if selector is None:
                continue
            if isinstance(selector, OracleSelector):
                known = maps[selector.target]
                blocks = selector.choose(known, q_len=q_len, k_len=k_len, kv_heads=kv_heads, layer=context.layer)
            else:
                blocks = selector.select(q, k, context)
            mask = blocks.to_mask()
            found = {"target_recall": target_recall(mask, target), "mass_recall": target_recall(mask, mass)}
            density = blocks.density().to(q.device)
            found["density"] = density.repeat_interleave(q.shape[1] // density.shape[1], dim=1)
            for quantity, values in found.items():
                self._rows[name][quantity].setdefault(context.layer, []).extend(values.double())

    def table(self, name: str, quantity: Quantity) -> tuple[list[int], Tensor]:
        """Layers, and the quantity float64 ``[sequences, layers, H]``."""
        layers = sorted(self._rows[name][quantity])
        return layers, torch.stack([torch.stack(self._rows[name][quantity][layer]) for layer in layers], dim=1).cpu()


def run_dense(
    subject: EvalModel,
    see: Callable[[Tensor, Tensor, AttentionContext], None],
    windows: Sequence[Window],
    *,
    batch: int = 1,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Runs windows through the dense model and shows every full-attention layer's queries and keys to ``see``."""
    with subject.observed(lambda layer: Observer(see)), torch.inference_mode():
        for group in batches(windows, batch):
            input_ids = torch.tensor([window.input_ids for window in group], device=subject.device)
            subject.model.base_model(input_ids=input_ids, use_cache=False)
            if advance is not None:
                advance(len(group))


def evaluate_recall(
    subject: EvalModel,
    arms: Sequence[Arm | TunedArm],
    windows: dict[int, list[Window]],
    output: ResultsFile,
    *,
    text: str,
    settings: dict,
    batch: int = 1,
    progress: Callable[[str, int], Callable[[int], None]] | None = None,
) -> list[Result]:
    """Measures the recall of every arm but dense, all in one pass of the dense model for each context.

    Args:
        subject: the model.
        arms: what to measure.
        windows: windows of text for each context.
        output: where results go; cells that it already holds are not measured again.
        text: kind of text.
        settings: limits of the data, part of what identifies a result.
        batch: windows of equal length that run together.
        progress: called with a description and a number of windows, returns what is told of finished windows.

    Returns:
        For each context and arm "target_recall" and "mass_recall", the means over layers and heads. The file also
        gets one result a layer, with the recall of its heads under ``samples["heads"]``.
    """
    arms = [arm for arm in arms if arm != DENSE]
    rows = []
    for context, pieces in windows.items():
        blanks = {
            arm: [
                subject.result(arm, what=what, unit="sequences", context=context, text=text, cell=settings)
                for what in ("target_recall", "mass_recall")
            ]
            for arm in arms
        }
        missing = [arm for arm in arms if any(output.find(blank) is None for blank in blanks[arm])]
        for sizes in dict.fromkeys(map(subject.block_sizes, missing)):
            together = [arm for arm in missing if subject.block_sizes(arm) == sizes]
            watch = Stopwatch(subject.device)
            meter = RecallMeter(
                {str(arm): subject.selector(arm) for arm in together}, block_q=sizes[0], block_k=sizes[1]
            )
            advance = progress(f"recall at {context}", len(pieces)) if progress else None
            run_dense(subject, meter.see, pieces, batch=batch, advance=advance)
            seconds = watch.seconds()
            for arm in together:
                density = meter.table(str(arm), "density")[1]
                with output.together() as cell:
                    for blank in blanks[arm]:
                        layers, recall = meter.table(str(arm), blank.what)
                        for i, layer in enumerate(layers):
                            one = _summary(blank, recall[:, i], density[:, i])
                            heads = {"heads": recall[:, i].mean(0).tolist()}
                            cell.setdefault(replace(one, cell=one.cell | {"layer": layer}, samples=heads), seconds)
                        cell.setdefault(_summary(blank, recall, density), seconds)
        rows += [output.find(blank) for arm in arms for blank in blanks[arm]]
    return rows


def check_heads(subject: EvalModel, arm: Arm, heads: Sequence[tuple[int, int]]) -> None:
    """Refuses heads that maps cannot be shown of.

    Raises:
        ValueError: a layer has no gate, or a head does not exist.
    """
    gates, count = subject.gates(arm.gates), subject.model.config.get_text_config().num_attention_heads
    if not all(layer in gates and 0 <= head < count for layer, head in heads):
        raise ValueError(f"heads must be among {count} heads of the layers {sorted(gates)}, got {heads}")


def observe_maps(subject: EvalModel, arm: Arm, window: Window, heads: Sequence[tuple[int, int]]) -> BlockMaps:
    """The true map, the gate's map and the chosen blocks of some heads on one window of the dense model.

    Args:
        subject: the model.
        arm: gates with a policy that has a density.
        window: the text.
        heads: (layer, query head) of each map.

    Raises:
        ValueError: a layer has no gate, or a head does not exist.
    """
    check_heads(subject, arm, heads)
    gates, selector_at, policy = subject.gates(arm.gates), subject.selector(arm), subject.policy(arm)
    count = subject.model.config.get_text_config().num_attention_heads
    block_q, block_k = subject.block_sizes(arm)
    found: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def see(q: Tensor, k: Tensor, context: AttentionContext) -> None:
        wanted = [head for layer, head in heads if layer == context.layer]
        if not wanted:
            return
        gate = gates[context.layer]
        target = attention_map(q, k, form=gate.config.target, block_q=block_q, block_k=block_k, **context.logits).map
        scores = gate(*pooled_inputs(gate, q, k, context))
        forced = forced_block_mask(0, q.shape[2], *scores.shape[2:], block_q, block_k, policy.sink_blocks)[0]
        forced = forced.to(scores.device)
        # Every row keeps a block to normalise over: -1e30 is as good as -inf where there is another.
        decided = scores.masked_fill(forced, -1e30).softmax(-1).masked_fill(forced, 0.0)
        chosen = selector_at(context.layer).select(q, k, context).to_mask()
        for head in wanted:
            shared = head * scores.shape[1] // count
            maps = (target[0, head], decided[0, shared], chosen[0, shared], forced)
            found[context.layer, head] = tuple(x.cpu() for x in maps)

    run_dense(subject, see, [window])
    target, gate, chosen, forced = (torch.stack([found[place][i] for place in heads]).numpy() for i in range(4))
    return BlockMaps(list(heads), target, gate, chosen, forced[0], arm.gates.name, arm.density)


def _summary(blank: Result, recall: Tensor, density: Tensor) -> Result:
    """Mean over everything, with the standard error over sequences."""
    value, stderr = statistics.mean(recall.flatten(1).mean(1).tolist())
    return replace(blank, value=value, stderr=stderr, n=len(recall), realised_density=float(density.mean()))
