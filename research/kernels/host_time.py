"""What a sparse layer takes of the host, on any machine: Triton compiles for Hopper and launches nothing.

    python research/kernels/host_time.py
    python research/kernels/host_time.py --decode 4000 --form default-group
    python research/kernels/host_time.py --decode 4000 --gpu --profile    # on a GPU that is there, driver calls and all

A small model is bound by the host, and decoding without CUDA graphs always is, so this is what sparse prompts, or
decoded tokens, cost beside dense ones. The model with gates runs in turns with a plain one whose attention does
nothing; tensors are on the CPU, where what torch does in place of the GPU's queue is little at this size. Driver calls
are in it with ``--gpu`` alone. Prints microseconds of CPU time a layer, the lower quartile of many runs, and with
``--profile`` where they go.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from typing import Any

import torch
from hopper import pretend
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

import seerattn
from seerattn.bench.decode import random_cache
from seerattn.bench.inputs import Shape
from seerattn.bench.model import Size, gate_form, random_model
from seerattn.selection import TopK

SIZE = Size("narrow", 30, 30, hidden=32, intermediate=32, vocab=64, shape=Shape(2, 1, 64))
POLICY = TopK(density=0.2)
# Tokens decoded at once, of which some finish blocks, as they would.
STEPS = 8


def nothing(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **_: Any) -> tuple[Tensor, None]:
    """Attention that takes no time."""
    return q.transpose(1, 2).contiguous(), None


def prompts(model: PreTrainedModel) -> Callable[[], int]:
    """Runs a prompt; returns how many forwards that was."""
    tokens = torch.randint(0, SIZE.vocab, (1, 256)).to(model.device)

    def run() -> int:
        model(input_ids=tokens, logits_to_keep=1)
        return 1

    return run


def decoding(model: PreTrainedModel, tokens: int) -> Callable[[], int]:
    """Decodes some tokens behind ``tokens`` others, and on."""
    token, cache = torch.full((1, 1), 3, device=model.device), random_cache(SIZE, 1, tokens, 1 << 14, model.device)

    def run() -> int:
        for _ in range(STEPS):
            model(input_ids=token, past_key_values=cache, use_cache=True)
        return STEPS

    return run


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", default="default", help="form of the gates, see seerattn bench serve --help")
    parser.add_argument("--decode", type=int, metavar="TOKENS", help="decode behind so many tokens")
    parser.add_argument("--runs", type=int, default=60, help="runs of either model")
    parser.add_argument("--gpu", action="store_true", help="run on a GPU, which there must be")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if args.gpu else "cpu")
    if not args.gpu:
        pretend()
    AttentionInterface.register("nothing", nothing)
    plain = random_model(SIZE, device)
    plain.set_attn_implementation("nothing")
    policies = {"policy": POLICY, "decode_policy": POLICY, "impl": "sparse"}
    gated = seerattn.attach(random_model(SIZE, device), gate_form(args.form), **policies)
    models = {"plain": plain, "gated": gated}
    runs = {name: decoding(m, args.decode) if args.decode else prompts(m) for name, m in models.items()}

    @torch.no_grad()
    def timed(name: str) -> float:
        begin = time.process_time_ns()
        forwards = runs[name]()
        if args.gpu:
            torch.cuda.synchronize()
        return (time.process_time_ns() - begin) / 1e3 / SIZE.layers / forwards

    times: dict[str, list[float]] = {name: [] for name in models}
    for name in [*models] * 3:
        timed(name)
    for _ in range(args.runs):
        for name in models:
            times[name].append(timed(name))
    low = {name: sorted(found)[len(found) // 4] for name, found in times.items()}
    print(f"{low['plain']:.0f} us a layer without attention, {low['gated'] - low['plain']:.0f} more when it is sparse")
    if args.profile:
        profile = cProfile.Profile()
        profile.runcall(lambda: [timed("gated") for _ in range(20)])
        pstats.Stats(profile).sort_stats("cumulative").print_stats("seerattn|triton|dataclasses|inspect", 70)


if __name__ == "__main__":
    main()
