"""Recall: how much of the true block map the chosen blocks hold, per layer and head.

Two maps are asked: the published *target* of gates, the row-normalised maximum of attention probabilities in each tile,
whatever map a gate has learned, and the attention *mass*. Mass alone misleads: a window of recent blocks can hold as
much of it as the oracle's choice and still lose everything that was to be retrieved.

The model runs dense, so every selector sees the queries and keys of the unchanged model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from seerattn.data.windows import Window
from seerattn.eval.choice import Choice
from seerattn.eval.maps import check_heads, observe_maps
from seerattn.eval.tasks.perplexity import WindowTask
from seerattn.eval.tasks.task import Job, Progress, Setup
from seerattn.hf.eval_model import EvalModel
from seerattn.methods.method import MapSelector
from seerattn.ops.attention_map import attention_map
from seerattn.options import option
from seerattn.results import statistics
from seerattn.results.environment import Stopwatch
from seerattn.results.file import ResultsFile
from seerattn.results.maps import check_maps
from seerattn.results.record import Result
from seerattn.selection.map_form import MASS, PUBLISHED, MapForm
from seerattn.selection.selector import AttentionContext, Selector
from seerattn.selection.target_map import target_recall

if TYPE_CHECKING:
    pass

Quantity = Literal["target_recall", "mass_recall", "density"]


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
        chosen_by = (selector.target for selector in selectors.values() if isinstance(selector, MapSelector))
        forms = tuple(dict.fromkeys((self._target, MASS, *chosen_by)))
        maps = dict(zip(forms, attention_map(q, k, form=forms, **context.logits, **self._blocks).maps))
        target, mass = maps[self._target], maps[MASS]
        q_len, k_len, kv_heads = q.shape[2], k.shape[2], k.shape[1]
        for name, selector in selectors.items():
            if selector is None:
                continue
            if isinstance(selector, MapSelector):
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


@dataclass(frozen=True, eq=False)
class MapRecallJob(Job):
    """Windows of documents, whose true maps are compared with the blocks that are chosen.

    Attributes:
        windows: the windows, all of one length.
        maps: file to write maps of the first window to, of the last of the gates at the lowest density, with the blocks
            that all choices of that density and of such blocks keep there; None for none.
        heads: (layer, query head) of each map.
    """

    windows: list[Window] = field(default_factory=list)
    maps: Path | None = None
    heads: tuple[tuple[int, int], ...] = ()

    together = True
    has_dense = False

    def measure(
        self,
        model: EvalModel,
        choices: Sequence[Choice],
        output: ResultsFile,
        *,
        batch: int = 1,
        progress: Progress | None = None,
    ) -> list[Result]:
        """Measures the recall of every choice but dense, all in one pass of the dense model for each size of blocks.

        Returns:
            For each choice "target_recall" and "mass_recall", the means over layers and heads. The file also gets one
            result a layer, with the recall of its heads under ``samples["heads"]``.
        """
        choices = [choice for choice in choices if not choice.is_dense]
        about = {"unit": "sequences", "context": self.context, "text": self.text, "cell": self.settings}
        blanks = {
            choice: [choice.result(model, what=what, **about) for what in ("target_recall", "mass_recall")]
            for choice in choices
        }
        missing = [choice for choice in choices if any(output.find(blank) is None for blank in blanks[choice])]
        drawn = self._drawn(choices) if missing or not (self.maps and self.maps.exists()) else None
        if drawn is not None:
            check_heads(model, drawn.method, self.heads)
        for sizes in dict.fromkeys(choice.method.block_sizes for choice in missing):
            same = [choice for choice in missing if choice.method.block_sizes == sizes]
            watch = Stopwatch(model.device)
            selectors = {str(number): choice.selector_at for number, choice in enumerate(same)}
            meter = RecallMeter(selectors, block_q=sizes[0], block_k=sizes[1])
            advance = progress(f"recall at {self.context}", len(self.windows)) if progress else None
            model.observe(self.windows, meter.see, batch=batch, advance=advance)
            seconds = watch.seconds()
            for number, choice in enumerate(same):
                density = meter.table(str(number), "density")[1]
                with output.together() as cell:
                    for blank in blanks[choice]:
                        layers, recall = meter.table(str(number), blank.what)
                        for i, layer in enumerate(layers):
                            one = _summary(blank, recall[:, i], density[:, i])
                            heads = {"heads": recall[:, i].mean(0).tolist()}
                            cell.setdefault(replace(one, cell=one.cell | {"layer": layer}, samples=heads), seconds)
                        cell.setdefault(_summary(blank, recall, density), seconds)
        if drawn is not None:
            compared = [choice for choice in choices if _is_comparable(choice, drawn)]
            observe_maps(model, drawn, self.windows[0], self.heads, compared).save(self.maps)
        return [output.find(blank) for choice in choices for blank in blanks[choice]]

    def _drawn(self, choices: Sequence[Choice]) -> Choice | None:
        """The choice whose maps are written, if there is one and they are asked for."""
        gates = [choice for choice in choices if choice.method.kind == "learned" and choice.asked is not None]
        if self.maps is None or not gates:
            return None
        lowest = min(choice.asked for choice in gates)
        return [choice for choice in gates if choice.asked == lowest][-1]


def _is_comparable(choice: Choice, drawn: Choice) -> bool:
    """Whether the blocks of a choice can stand beside those of another: as many, and as large."""
    same = (choice.asked, choice.budget) == (drawn.asked, drawn.budget)
    return same and choice.method.block_sizes == drawn.method.block_sizes


def _summary(blank: Result, recall: Tensor, density: Tensor) -> Result:
    """Mean over everything, with the standard error over sequences."""
    value, stderr = statistics.mean(recall.flatten(1).mean(1).tolist())
    return replace(blank, value=value, stderr=stderr, n=len(recall), realised_density=float(density.mean()))


@dataclass(frozen=True, kw_only=True)
class MapRecall(WindowTask):
    """How much of the true maps the chosen blocks hold, per layer and head."""

    id = "recall"

    maps: Path | None = option(None, help="Also write block maps of one document (.npz) for the report.")
    heads: tuple[str, ...] = option(("0:0",), help="Which maps: LAYER:HEAD of each.")

    def check(self) -> None:
        super().check()
        if self.maps is not None:
            check_maps(self.maps)

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Layer and head of each map.

        Raises:
            ValueError: one is none.
        """
        try:
            return tuple((int(layer), int(head)) for layer, head in (place.split(":") for place in self.heads))
        except ValueError as error:
            raise ValueError(f"heads must be LAYER:HEAD of each, got {' '.join(self.heads)}") from error

    def jobs(self, setup: Setup) -> list[Job]:
        cut, settings = self.cut(setup)
        longest = max(cut)
        return [
            MapRecallJob(
                self.id,
                self.called,
                context,
                [window.input_ids for window in windows],
                settings,
                windows=windows,
                maps=self.maps if context == longest else None,
                heads=self.places,
            )
            for context, windows in cut.items()
        ]
