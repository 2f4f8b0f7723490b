"""Which layers of a model are anchors, and whose blocks the heads of the others take (arXiv 2512.16391, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seerattn.data.windows import cut_windows
from seerattn.methods.head_rules import HeadRules
from seerattn.methods.kascade.layers import group_mass
from seerattn.methods.minference.search import draw_windows
from seerattn.methods.search import Progress, Search
from seerattn.options import option
from seerattn.selection.block_indices import causal_block_mask
from seerattn.selection.policies import TopK
from seerattn.selection.selector import AttentionContext

if TYPE_CHECKING:
    from seerattn.hf.eval_model import EvalModel


@dataclass(frozen=True, kw_only=True)
class KascadeSearch(Search):
    """Chooses the anchors that keep most of what the layers between them would have chosen.

    How alike two layers are is the attention mass of the upper one that lies in the best blocks of the lower one, over
    the mass in its own best blocks, a mean over rows; every KV head takes the head of the lower layer that is most like
    it. Layers up to the next anchor take the blocks of the last one. Of all choices of so many anchors a dynamic
    programme finds the one whose sum over layers is largest. Layers are not weighted by how much they change their
    input, as the paper does.

    Attributes:
        anchors: number of anchors; published are 5 for models of 28 to 36 layers.
        dense: first layers that stay dense; published is one.
        density: of the best blocks that are compared.
    """

    method = "kascade"

    anchors: int = option(5, help="Layers that choose.", low=1)
    dense: int = option(1, help="First layers that stay dense.", low=0)
    density: float = option(0.1, help="Density of the blocks that are compared.", above=0, below=1)
    windows: int = option(2, help="Windows to search on, drawn from all of the data.", low=1)
    block_q: int = option(64, help="Query block size in tokens.", low=1)
    block_k: int = option(64, help="Key block size in tokens.", low=1)

    def run(
        self, model: EvalModel, documents: Sequence[Sequence[int]], *, progress: Progress | None = None
    ) -> HeadRules:
        """Searches; ``made["found"]`` has the anchors and the mean similarity of all layers to theirs.

        Raises:
            ValueError: there are fewer layers than anchors, or too little text.
        """
        cut = cut_windows(documents, context=self.context, count=None, bos_token_id=model.bos_token_id)
        windows = draw_windows(cut, self.windows, self.seed)
        advance = progress("comparing layers", len(windows)) if progress else None
        total: Tensor | None = None
        layers: list[int] = []
        for window in windows:
            maps: dict[int, Tensor] = {}

            def see(q: Tensor, k: Tensor, context: AttentionContext, maps: dict[int, Tensor] = maps) -> None:
                if context.layer >= self.dense:
                    maps[context.layer] = group_mass(q, k, context, block_q=self.block_q, block_k=self.block_k)[0]

            model.observe([window], see, advance=advance)
            layers = sorted(maps)
            alike = similarities(torch.stack([maps[layer] for layer in layers]), TopK(density=self.density))
            total = alike if total is None else total + alike
        if len(layers) < self.anchors:
            raise ValueError(f"anchors must be at most the {len(layers)} layers that can choose, got {self.anchors}")
        alike = total / len(windows)
        by_layer, heads = alike.max(-1).values.mean(-1), alike.argmax(-1)
        anchors = best_anchors(by_layer.tolist(), self.anchors)
        count = model.model.config.get_text_config().num_hidden_layers
        group = model.model.config.get_text_config().num_attention_heads // alike.shape[-1]
        rules: list[list[dict]] = [[] for _ in range(count)]
        for i, layer in enumerate(layers):
            anchor = max(a for a in anchors if a <= i)
            own = range(alike.shape[-1]) if anchor == i else heads[anchor, i].tolist()
            rules[layer] = [{"anchor": layers[anchor], "head": head} for head in own for _ in range(group)]
        found = [float(by_layer[max(a for a in anchors if a <= i), i]) for i in range(len(layers))]
        summary = {
            "anchors": " ".join(str(layers[a]) for a in anchors),
            "mean similarity": sum(found) / len(found),
        }
        return self.rules(model, documents, rules, summary)


def similarities(mass: Tensor, policy: TopK) -> Tensor:
    """How much of what a head would choose another head of a layer at or below it has chosen.

    Args:
        mass: of all layers ``[L, HKV, N, N]``, square blocks from the start of a prompt.
        policy: chooses the best blocks.

    Returns:
        ``[L, L, HKV, HKV]``: ``[a, b, h, g]`` is the mass of head ``h`` of layer ``b`` in the blocks of head ``g`` of
        layer ``a``, over that in its own; 0 where ``a`` lies above ``b``.
    """
    count, rows = len(mass), mass.shape[-1]
    causal = causal_block_mask(0, rows, rows, rows, 1, 1)[0].to(mass.device)
    chosen = policy.select(
        mass.log().masked_fill(~causal, -torch.inf), q_start=0, q_len=rows, block_q=1, block_k=1, layer=0
    ).to_mask()
    own = (mass * chosen).sum((-1, -2))
    found = torch.zeros(count, count, *own.shape[1:], own.shape[1], dtype=torch.float64)
    for a in range(count):
        held = torch.einsum("bhnm,gnm->bhg", mass[a:], chosen[a].to(mass.dtype))
        found[a, a:] = (held / own[a:, :, None]).double().cpu()
    return found


def best_anchors(alike: list[list[float]], count: int) -> list[int]:
    """The anchors of the largest sum of every layer's similarity to the last anchor at or below it.

    Args:
        alike: ``alike[a][b]`` of a layer ``b`` and an anchor ``a`` at or below it.
        count: number of anchors; the first layer is one.
    """
    layers = len(alike)
    # best[m][b]: the largest sum of the layers before b with m anchors among them, and where the last one begins.
    best: list[list[tuple[float, int]]] = [[(float("-inf"), -1)] * (layers + 1) for _ in range(count + 1)]
    best[0][0] = (0.0, -1)
    for number in range(1, count + 1):
        for end in range(number, layers + 1):
            best[number][end] = max(
                (best[number - 1][begin][0] + sum(alike[begin][begin:end]), begin) for begin in range(end)
            )
    anchors, end = [], layers
    for number in range(count, 0, -1):
        end = best[number][end][1]
        anchors.append(end)
    return anchors[::-1]
