"""The kernels of single tokens, written out: Triton's interpreter takes a tenth of a second a row."""

import torch
from torch import Tensor

from seerattn import AttnGate
from seerattn.gate.pooling import Pooled
from seerattn.ops.decode_select import KeyTable, TokenRule
from seerattn.selection.decode_blocks import DecodeBlocks
from seerattn.selection.selector import RotaryTables


def written_queries(q: Tensor, rotary: RotaryTables, gate: AttnGate, *, lengths=None, tokens: int = 0) -> Tensor:
    """Gate queries by the modules."""
    lengths = torch.full((len(q),), tokens) if lengths is None else lengths
    x, pairs = q.float().clone(), rotary.width // 2
    if pairs:
        cos, sin = (t.float()[..., : pairs * rotary.column_step : rotary.column_step] for t in (rotary.cos, rotary.sin))
        norm = cos.square() + sin.square()
        first = slice(0, rotary.width, 2) if rotary.interleaved else slice(0, pairs)
        second = slice(1, rotary.width, 2) if rotary.interleaved else slice(pairs, rotary.width)
        a, b = x[..., first].clone(), x[..., second].clone()
        x[..., first], x[..., second] = (a * cos + b * sin) / norm, (b * cos - a * sin) / norm
    made = [gate.token_queries(Pooled(x[i][None, :, None], 1, 0, 1), lengths[i : i + 1] - 1) for i in range(len(q))]
    return torch.cat(made)[:, :, 0]


def written_out(
    gate_q: Tensor, gate_k: Tensor | KeyTable, rule: TokenRule, *, kv_heads: int, width: int, lengths, tokens
):
    """The choice of the kernel, row by row."""
    each = gate_k.keys if isinstance(gate_k, KeyTable) else gate_k.split(1)
    lengths = [tokens] * len(gate_q) if lengths is None else lengths.tolist()
    indices = torch.full((len(gate_q), kv_heads, width), -1, dtype=torch.int32)
    counts = torch.zeros(len(gate_q), kv_heads, dtype=torch.int32)
    for row, tokens in enumerate(lengths):
        own = (tokens - 1) // rule.block_k
        kept = rule.most(own + 1)
        for head, queries in enumerate(gate_q[row].chunk(kv_heads)):
            best = torch.full((own,), -torch.inf)
            if own:
                keys = each[row][0, head, : own * rule.pieces]
                s = (queries @ keys.T / keys.shape[1] ** 0.5).unflatten(1, (own, rule.pieces))
                s = s.amax(2) if rule.over_pieces == "max" else s.logsumexp(2)
                s[:, : rule.unscored] = -torch.inf
                best = s.log_softmax(1).nan_to_num(nan=-torch.inf).amax(0)
            forced = {*range(min(rule.sink_blocks, own)), own}
            others = sorted(set(range(own)) - forced, key=lambda block: -best[block].item())
            chosen = sorted(forced | set(others[: kept - len(forced)]))
            counts[row, head], indices[row, head, : len(chosen)] = len(chosen), torch.tensor(chosen)
    return DecodeBlocks(indices, counts, rule.block_k)
