"""Dense attention against gate + selection + block-sparse attention on the CPU.

    python research/kernels/cpu.py           # the table of docs/LOG.md, about two minutes on 2 cores
    python research/kernels/cpu.py --lengths 16384 --densities 0.1 --repeats 9 --output rows.jsonl

Dense is `torch.nn.functional.scaled_dot_product_attention` with `is_causal`. Both sides start from the same q and k
after RoPE and the sparse side pays for everything it adds: un-rotating, pooling, scoring, choosing and attending. The
two are run in turns, so that a busy machine slows both. Before any time is taken, a smaller problem is compared with
an fp64 oracle that masks the whole map; a mismatch ends the run with exit code 1. Every row is also printed as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattn.gate import AttnGate, AttnGateConfig
from seerattn.gate.rope import rotate
from seerattn.ops.block_sparse_attention import block_sparse_attention
from seerattn.results.environment import environment
from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.policies import TopK

HEADS, KV_HEADS, DIM = 8, 2, 64
GATES = {
    "paper": AttnGateConfig.paper(),
    "default": AttnGateConfig(),
    "default, shared by KV group": AttnGateConfig(share="kv_group"),
}


class Attention:
    """The sparse side for one gate form and density."""

    def __init__(self, config: AttnGateConfig, density: float) -> None:
        self.inv_freq = 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)
        self.gate = AttnGate(config, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, inv_freq=self.inv_freq)
        self.policy = TopK(density=density)

    def select(self, q: Tensor, k: Tensor) -> BlockIndices:
        """Gate and selection from q and k after RoPE."""
        config, tokens = self.gate.config, q.shape[2]
        backwards = -torch.arange(tokens)
        scores = self.gate(rotate(q, backwards, self.inv_freq), rotate(k, backwards, self.inv_freq))
        return self.policy.select(scores, q_start=0, q_len=tokens, block_q=config.block_q, block_k=config.block_k)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, self.select(q, k))


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What an unpatched model runs."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def make_qkv(tokens: int) -> list[Tensor]:
    return [torch.randn(1, heads, tokens, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def correctness_error(config: AttnGateConfig, tokens: int = 1000) -> tuple[float, float]:
    """Largest error of the sparse op against an fp64 oracle with the same blocks, and the error it may have.

    The bound is twice the error that fp32 SDPA makes with the same mask.
    """
    q, k, v = make_qkv(tokens)
    blocks = Attention(config, 0.3).select(q, k)
    mask = blocks.to_mask().repeat_interleave(HEADS // blocks.num_heads, 1)
    mask = mask.repeat_interleave(blocks.block_q, 2).repeat_interleave(blocks.block_k, 3)[:, :, :tokens, :tokens]
    mask = mask & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, enable_gqa=True)
    eager = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    ours = block_sparse_attention(q, k, v, blocks)
    return float((ours - exact).abs().max()), 2 * float((eager - exact).abs().max())


def times_in_turns(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every run, one of each per round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384], help="tokens")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.2], help="share of the causal area")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--output", type=Path, help="file to which the rows are appended as JSON lines")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)

    for name, config in GATES.items():
        error, bound = correctness_error(config)
        print(f"correctness, {name}: error {error:.1e}, bound {bound:.1e}")
        if not error <= bound:
            print("the sparse op does not match its oracle; no times are taken")
            return 1

    print(f"\nB 1, H {HEADS}, HKV {KV_HEADS}, D {DIM}, fp32, {args.threads} threads; milliseconds, min (median)")
    print(f"{'tokens':>7} {'density':>8} {'dense':>16} {'gate+select+op':>16} {'faster':>7}  gate")
    for tokens in args.lengths:
        q, k, v = make_qkv(tokens)
        for density in args.densities:
            for name, config in GATES.items():
                sparse = Attention(config, density)
                blocks = sparse.select(q, k)
                runs = {
                    "dense": lambda q=q, k=k, v=v: dense(q, k, v),
                    "sparse": lambda q=q, k=k, v=v, sparse=sparse: sparse(q, k, v),
                    "op": lambda q=q, k=k, v=v, blocks=blocks: block_sparse_attention(q, k, v, blocks),
                }
                seconds = times_in_turns(runs, args.repeats)
                best = {run: min(x) for run, x in seconds.items()}
                middle = {run: statistics.median(x) for run, x in seconds.items()}
                row = {
                    "what": "cpu_attention_seconds",
                    "gate": name,
                    "length": tokens,
                    "density": round(float(blocks.density().mean()), 4),
                    "min": best,
                    "median": middle,
                    "n": args.repeats,
                    **environment("cpu"),
                }
                cells = [f"{best[s] * 1e3:.0f} ({middle[s] * 1e3:.0f})" for s in ("dense", "sparse")]
                ratio = best["dense"] / best["sparse"]
                print(f"{tokens:>7} {row['density']:>8.3f} {cells[0]:>16} {cells[1]:>16} {ratio:>6.1f}x  {name}")
                if args.output:
                    with args.output.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
