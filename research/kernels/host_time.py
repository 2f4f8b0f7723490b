"""What a sparse layer takes of the host, on any machine: Triton compiles for Hopper and launches nothing.

    python research/kernels/host_time.py

A small model is bound by the host, so this is what its sparse prompts cost beside dense ones. The model with gates runs
in turns with a plain one whose attention does nothing; tensors are on the CPU, where what torch does in place of the
GPU's queue is little at this size. Driver calls are not in it. Prints microseconds of CPU time a layer, the lower
quartile of many runs, and with ``--profile`` where they go.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import pstats
import time
from typing import Any

import torch
from hopper import pretend
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import seerattn
from seerattn.bench.model import gate_form
from seerattn.selection import TopK

LAYERS = 30


def nothing(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **_: Any) -> tuple[Tensor, None]:
    """Attention that takes no time."""
    return q.transpose(1, 2).contiguous(), None


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", default="default", help="form of the gates, see seerattn bench serve --help")
    parser.add_argument("--runs", type=int, default=60, help="forwards of either model")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pretend()
    AttentionInterface.register("nothing", nothing)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=LAYERS, head_dim=64)
    config.num_attention_heads, config.num_key_value_heads = 2, 1

    def make() -> LlamaForCausalLM:
        return LlamaForCausalLM(copy.deepcopy(config)).eval().to(torch.bfloat16)

    plain = make()
    plain.set_attn_implementation("nothing")
    gated = seerattn.attach(make(), gate_form(args.form), TopK(density=0.2), impl="sparse")
    tokens = torch.randint(0, 64, (1, 256))

    @torch.no_grad()
    def run(model: PreTrainedModel) -> float:
        begin = time.process_time_ns()
        model(input_ids=tokens, logits_to_keep=1)
        return (time.process_time_ns() - begin) / 1e3 / LAYERS

    times: dict[str, list[float]] = {"plain": [], "gated": []}
    for model in (plain, gated) * 3:
        run(model)
    for _ in range(args.runs):
        for name, model in (("plain", plain), ("gated", gated)):
            times[name].append(run(model))
    low = {name: sorted(found)[len(found) // 4] for name, found in times.items()}
    print(f"{low['plain']:.0f} us a layer without attention, {low['gated'] - low['plain']:.0f} more when it is sparse")
    if args.profile:
        profile = cProfile.Profile()
        profile.runcall(lambda: [run(gated) for _ in range(20)])
        pstats.Stats(profile).sort_stats("cumulative").print_stats("seerattn|triton", 60)


if __name__ == "__main__":
    main()
