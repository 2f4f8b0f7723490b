"""Budgets: what every head misses of the target at every density, and the densities that miss least together.

What a query block misses of the target counts by its square, as the loss of a model grows with the square of a small
error: a head that misses much gets the next block before one that misses little. One price of density for all heads and
layers gives every head the number of blocks that is worth it, and is set so that the mean is the one wanted. Counted
once, 16 x 16 gates of SmolLM2 at density .05 lost 50 % of perplexity on two books, and 24 % so (docs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattn.gate.attn_gate import AttnGate
from seerattn.gate_selector import pooled_inputs
from seerattn.ops.attention_map import attention_map
from seerattn.selection.block_indices import causal_block_mask, forced_block_mask, num_query_blocks
from seerattn.selection.budgets import HeadBudgets
from seerattn.selection.map_form import MapForm
from seerattn.selection.selector import AttentionContext

LADDER = (0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7)
SHORTEST = 2048
# Halvings of the price: until its neighbours are neighbouring numbers.
_HALVINGS = 100


def budget_lengths(context: int) -> tuple[int, ...]:
    """2048, 4096, ... tokens up to the context, which is the last."""
    lengths, length = [], SHORTEST
    while length < context:
        lengths.append(length)
        length *= 2
    return (*lengths, context)


def check_ladder(ladder: Sequence[float]) -> None:
    """Refuses what cannot be the mean densities of budgets, before anything is measured.

    Raises:
        ValueError: there are none, they do not ascend, or one is not between 0 and 1.
    """
    if not ladder or sorted(set(ladder)) != list(ladder) or not (ladder[0] > 0 and ladder[-1] < 1):
        raise ValueError(f"ladder must be densities above 0 and below 1, ascending, got {list(ladder)}")


class BudgetCalibrator:
    """Collects the curves of heads and makes budgets of them.

    One dense forward of the longest length serves all: rows are causal, so scores and maps of a prefix in whole blocks
    are the top left of those of the whole.

    Args:
        chooser: the gate of each layer; or the map that an oracle chooses by, for budgets of every query head.
        lengths: of prompts in tokens, ascending; whole blocks, or all of a window.
        gain: the map of which the chosen blocks are to miss as little as they can; by default the one that is chosen
            by: the target of the gates, or the oracle's own.
        block_q: query block size in tokens of an oracle; gates have their own.
        block_k: key block size in tokens of an oracle; gates have their own.
        sink_blocks: first blocks that are kept in any case.

    Attributes:
        gain: see above.
    """

    def __init__(
        self,
        chooser: Mapping[int, AttnGate] | MapForm,
        *,
        lengths: Sequence[int],
        gain: MapForm | None = None,
        block_q: int = 64,
        block_k: int = 64,
        sink_blocks: int = 1,
    ) -> None:
        if not lengths or sorted(set(lengths)) != list(lengths) or lengths[0] < 1:
            raise ValueError(f"lengths must be numbers of tokens, ascending, got {list(lengths)}")
        self._gates: Mapping[int, AttnGate] | None = None
        if isinstance(chooser, MapForm):
            self._target, self._block_q, self._block_k = chooser, block_q, block_k
        else:
            config = next(iter(chooser.values())).config
            self._gates, self._target = chooser, config.target
            self._block_q, self._block_k = config.block_q, config.block_k
        self.gain = self._target if gain is None else gain
        self._lengths, self._sink_blocks = tuple(lengths), sink_blocks
        # By layer fp64 [lengths, Hm, Nk], on the device of the model: what the k-th best block of a row gains, summed
        # over rows and windows. And how many windows of each length there were.
        self._sums: dict[int, Tensor] = {}
        self._windows: dict[int, list[int]] = {}

    @torch.no_grad()
    def see(self, q: Tensor, k: Tensor, context: AttentionContext) -> None:
        """Collects one call of whole sequences, queries and keys after RoPE; shorter lengths are cut from it."""
        if self._gates is not None and context.layer not in self._gates:
            return
        tokens = q.shape[2]
        lengths = [length for length in self._lengths if length <= tokens]
        for length in lengths:
            if length < tokens and (length % self._block_q or length % self._block_k):
                raise ValueError(
                    f"lengths must be whole blocks of {self._block_q} and {self._block_k} tokens, or those of all "
                    f"windows, got {length} in a window of {tokens}"
                )
        sizes = {"block_q": self._block_q, "block_k": self._block_k}
        forms = tuple(dict.fromkeys((self.gain,) if self._gates else (self.gain, self._target)))
        maps = dict(zip(forms, attention_map(q, k, form=forms, **sizes, **context.logits).maps))
        gain = maps[self.gain]
        if self._gates is None:
            scores = maps[self._target]
        else:
            gate = self._gates[context.layer]
            scores = gate(*pooled_inputs(gate, q, k, context))
            gain = gain.unflatten(1, (scores.shape[1], -1)).mean(2)
        geometry = (0, tokens, *scores.shape[2:], self._block_q, self._block_k)
        forced = forced_block_mask(*geometry, self._sink_blocks, device=scores.device)[0]
        # A row's order is the same in every prefix that has it: what is not causal comes last.
        order = scores.masked_fill(forced, torch.inf).argsort(dim=-1, descending=True, stable=True)
        missed = (1 - gain.gather(-1, order).cumsum(-1)).clamp_min(0).square()
        gained = F.pad(missed, (1, 0), value=1.0)[..., :-1] - missed
        layer, heads = context.layer, scores.shape[1]
        if layer not in self._sums:
            width = -(-self._lengths[-1] // self._block_k)
            zeros = torch.zeros(len(self._lengths), heads, width, dtype=torch.float64, device=scores.device)
            self._sums[layer], self._windows[layer] = zeros, [0] * len(self._lengths)
        done, total = 0, torch.zeros(heads, gained.shape[-1], dtype=torch.float64, device=scores.device)
        for i, length in enumerate(lengths):
            rows, columns = num_query_blocks(0, length, self._block_q), -(-length // self._block_k)
            total += gained[:, :, done:rows].sum((0, 2), dtype=torch.float64)
            done = rows
            self._sums[layer][i, :, :columns] += total[:, :columns]
            self._windows[layer][i] += len(q)

    def curves(self, length: int) -> tuple[dict[int, Tensor], Tensor]:
        """What every head gains, and what that costs, by the number of best blocks in every row.

        Args:
            length: one of those that were asked for.

        Returns:
            By layer fp64 ``[Hm, K]``, 1 less the mean square over rows of the share of the map ``gain`` that is missed,
            and fp64 ``[K]`` the realised densities. The first number is that of the forced blocks, the last keeps
            everything.

        Raises:
            ValueError: no window was so long.
        """
        at = self._lengths.index(length)
        if not self._sums or not all(windows[at] for windows in self._windows.values()):
            raise ValueError(f"lengths must be within the windows that were seen, got {length}; use longer documents")
        least, cost = self._costs(length)
        rows, columns = num_query_blocks(0, length, self._block_q), -(-length // self._block_k)
        found = {}
        for layer, sums in sorted(self._sums.items()):
            gained = sums[at, :, :columns].cumsum(-1) / (rows * self._windows[layer][at])
            found[layer] = gained[:, least - 1 :]
        return found, cost.to(next(iter(found.values())).device)

    def least_density(self, length: int) -> float:
        """The lowest density of a prompt of that length: that of its forced blocks."""
        return float(self._costs(length)[1][0])

    def _costs(self, length: int) -> tuple[int, Tensor]:
        """The number of forced blocks, which a row has at most, and the density of it and all greater numbers."""
        rows, columns = num_query_blocks(0, length, self._block_q), -(-length // self._block_k)
        geometry = (0, length, rows, columns, self._block_q, self._block_k)
        causal = causal_block_mask(*geometry)[0].sum(-1)
        least = int(forced_block_mask(*geometry, self._sink_blocks)[0].sum(-1).max())
        numbers = torch.arange(least, columns + 1)
        return least, torch.minimum(causal, numbers[:, None]).sum(-1).double() / causal.sum()

    def budgets(self, ladder: Sequence[float] = LADDER, *, text: str = "") -> HeadBudgets:
        """The densities of heads that together miss least, for every length and mean density.

        Args:
            ladder: mean densities. At a length where the forced blocks alone exceed one, every head has their density.
            text: digest of the text that was seen.

        Raises:
            ValueError: no window was as long as the longest length, or a mean density is none.
        """
        tables = []
        for length in self._lengths:
            gain, cost = self.curves(length)
            heads = [len(gain[layer]) if layer in gain else 0 for layer in range(max(gain) + 1)]
            shared = [share_densities(torch.cat(list(gain.values())), cost, rung) for rung in ladder]
            tables.append([[part.tolist() for part in row.cpu().split(heads)] for row in shared])
        windows = min(next(iter(self._windows.values())))
        return HeadBudgets(
            ladder=tuple(ladder),
            lengths=self._lengths,
            densities=tables,
            block_q=self._block_q,
            block_k=self._block_k,
            target=str(self._target),
            gain=str(self.gain),
            text=text,
            windows=windows,
        )


def share_densities(gain: Tensor, cost: Tensor, density: float) -> Tensor:
    """Densities of heads whose mean is ``density`` and that together gain most.

    At a price every head takes the cost at which its gain less the price of the cost is highest, so of a curve that is
    not concave the corners of its hull alone. Two neighbouring prices enclose the mean, and heads that differ between
    them, as a rule one, are interpolated.

    Args:
        gain: fp64 ``[N, K]``, what each head gains at each cost; does not fall.
        cost: fp64 ``[K]``, densities, ascending to 1.
        density: the mean. Below the lowest cost every head has that one.

    Returns:
        fp64 ``[N]``.
    """
    least = cost[:1].expand(len(gain))
    if density <= float(cost[0]):
        return least

    def taken(price: float) -> Tensor:
        return cost[(gain - price * cost).argmax(-1)]

    # All are worth a negative price, none one above every gain by its cost.
    low, high = -1.0, 1.0 + float(((gain - gain[:, :1]) / (cost - cost[0]))[:, 1:].max())
    below, above = least, taken(low)
    for _ in range(_HALVINGS):
        price = (low + high) / 2
        found = taken(price)
        if float(found.mean()) < density:
            high, below = price, found
        else:
            low, above = price, found
    spare, step = density - below.mean(), above.mean() - below.mean()
    return below + (above - below) * (spare / step)
