"""What else a perfect choice could go by: values, the error of the output, a KV group, a neighbouring layer.

    python research/kernels/ceilings.py --model outputs/models/smollm2 --tokens outputs/smollm2/tokens --out rows.jsonl

A llama-like model runs windows of text, and in every layer blocks are chosen by a map that is written out in torch.
``r[i, J]`` is what query row ``i`` gives to key block ``J``, and a tile is the power mean of it over its rows:

- ``power``: the sum of probabilities, what `attention_map` computes, checked against it in the same run;
- ``values``: the same with every key weighted by the norm of its value;
- ``error``: how far the row's output moves when the block is left out, ``r / (1 - r)`` times the distance of the
  block's mean value from the output;
- ``group``: ``power``, the largest of the heads of a KV group for all of them;
- ``layer below``: ``power`` of the layer below, head by head.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import seerattn
from seerattn.data.windows import cut_windows
from seerattn.hf.loading import read_model
from seerattn.ops.attention_map import attention_map
from seerattn.selection import AttentionContext, BlockIndices, TopK
from seerattn.selection.map_form import MapForm
from seerattn.selection.target_map import group_target

sys.path.insert(0, str(Path(__file__).parents[2] / "research"))
from corpora import documents_of, load_corpus

BLOCK = 64
KINDS = ("power", "values", "error", "group", "layer below")


@dataclass
class Chooser:
    """A selector by one of the maps, for all layers; ``values`` holds those of the layer at hand."""

    kind: str
    power: float
    policy: TopK
    values: dict[int, Tensor]
    heads: tuple[int, int]
    below: dict[int, Tensor] = field(default_factory=dict)
    checked: bool = False

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
        """See `Selector.select`."""
        v = self.values[context.layer]
        chosen = self._map(q, k, v, context)
        if self.kind == "power" and not self.checked:
            expected = attention_map(q, k, form=MapForm("sum", self.power), **context.logits).map
            found = chosen / chosen.sum(-1, keepdim=True)
            error = float((found - expected).abs().max())
            assert error < 2e-3, f"the map must be that of the op, got a difference of {error}"
            self.checked = True
        if self.kind == "layer below":
            own, chosen = chosen, self.below.get(context.layer - 1, chosen)
            self.below = {context.layer: own}
        return self.policy.select(
            chosen.log(), q_start=0, q_len=q.shape[2], block_q=BLOCK, block_k=BLOCK, layer=context.layer
        )

    def _map(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        heads, kv_heads = self.heads
        group, tokens = heads // kv_heads, q.shape[2]
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
        maps = []
        for head in range(heads):
            keys, vectors = k[0, head // group].float(), v[0, head // group].float()
            p = (q[0, head].float() @ keys.T * context.scale).masked_fill_(future, -math.inf).softmax(-1)
            blocks = p.unflatten(1, (-1, BLOCK))
            if self.kind == "values":
                r = (blocks * vectors.norm(dim=-1).unflatten(0, (-1, BLOCK))).sum(-1)
            elif self.kind == "error":
                r = blocks.sum(-1)
                parts = torch.einsum("tbk,bkd->tbd", blocks, vectors.unflatten(0, (-1, BLOCK)))
                out = parts.sum(1, keepdim=True)
                moved = (out * r[..., None] - parts).norm(dim=-1)
                r = moved / (1 - r).clamp_min(1e-6)
            else:
                r = blocks.sum(-1)
            tiles = r.unflatten(0, (-1, BLOCK)).pow(self.power).mean(1).pow(1 / self.power)
            maps.append(tiles)
        found = torch.stack(maps)[None]
        if self.kind == "group":
            found = group_target(found / found.sum(-1, keepdim=True), kv_heads).repeat_interleave(group, 1)
        return found


@torch.no_grad()
def main() -> None:
    """Measures perplexity by each map at each density."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="what research/public_gates.py --prepare wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--densities", default="0.2,0.1,0.05")
    parser.add_argument("--maps", default="power:2,power:4,values:4,error:2,error:4,group:4,layer below:4")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = read_model(options.model, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device=device)
    config = model.config
    documents = documents_of(load_corpus(options.tokens, "books-test"))[: options.documents]
    windows = cut_windows(documents, context=options.context, count=1, bos_token_id=config.bos_token_id)
    texts = [torch.tensor(window.input_ids, device=device)[None] for window in windows]
    values: dict[int, Tensor] = {}

    def keep(layer: int):
        def hook(module: torch.nn.Module, args: tuple, out: Tensor) -> None:
            values[layer] = out.unflatten(-1, (config.num_key_value_heads, -1)).transpose(1, 2)

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.self_attn.v_proj.register_forward_hook(keep(index))

    def losses() -> list[float]:
        found = []
        for ids in texts:
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            found.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
        return found

    def write(**row) -> None:
        row |= {"context": options.context, "device": str(device), "n": len(texts)}
        print(json.dumps(row | {"losses": None}), flush=True)
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    dense = losses()
    write(kind="dense", density=1.0, perplexity=math.exp(sum(dense) / len(dense)), losses=dense)
    heads = (config.num_attention_heads, config.num_key_value_heads)
    for name in options.maps.split(","):
        kind, power = name.split(":")
        for density in map(float, options.densities.split(",")):
            begin = time.monotonic()
            chooser = Chooser(kind, float(power), TopK(density=density), values, heads)
            seerattn.attach(model, chooser, impl="sparse")
            with seerattn.record_density(model) as meter:
                found = losses()
            seerattn.detach(model)
            write(
                kind=kind,
                power=float(power),
                density=density,
                realised_density=meter.mean(),
                perplexity=math.exp(sum(found) / len(found)),
                losses=found,
                seconds=time.monotonic() - begin,
            )


if __name__ == "__main__":
    main()
