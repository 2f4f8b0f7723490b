"""The Gluon kernel of block-sparse attention: every launch configuration against fp64, then timed.

    python research/kernels/gluon.py                          # checks, then 128k tokens at sparsity 0.9
    python research/kernels/gluon.py --check-only
    python research/kernels/gluon.py --only group --tokens 32768 --sparsity 0.9 0.5 --out times.jsonl

Every configuration runs in a process of its own that is stopped after --timeout seconds: a kernel that waits for a
barrier for ever must not stop the others. Batch 1, 32 query heads, 8 KV heads, head dim 128, bf16; masks are random
with the diagonal kept. Needs one Hopper GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattn.ops.block_sparse_attention.gluon_fwd import Plan, block_sparse_attention
from seerattn.results.environment import environment
from seerattn.selection.block_indices import BlockIndices, causal_block_mask, forced_block_mask, num_query_blocks

HEADS, KV_HEADS, DIM = 32, 8, 128
DENSE_CUDNN_MS = {32768: 14.1, 131072: 246.0}  # measured on one H100 80GB HBM3, torch 2.11


@dataclass(frozen=True)
class Variant:
    """Lists of one geometry and the launch configuration that walks them."""

    block_q: int
    block_k: int
    per_group: bool
    plan: Plan


GROUP, ROWS = {"heads": 4, "tokens": 32}, {"heads": 1, "tokens": 128}
VARIANTS = {
    "group 64x64": Variant(64, 64, True, Plan(**GROUP)),
    "group 64x64, q in shared memory": Variant(64, 64, True, Plan(**GROUP, q_in_registers=False)),
    "group 64x64, 64 keys": Variant(64, 64, True, Plan(**GROUP, block_n=64, stages=5)),
    "group 64x128": Variant(64, 128, True, Plan(**GROUP)),
    "group 64x128, q in shared memory": Variant(64, 128, True, Plan(**GROUP, q_in_registers=False)),
    "head 128x128": Variant(128, 128, False, Plan(**ROWS)),
    "head 128x128, q in shared memory": Variant(128, 128, False, Plan(**ROWS, q_in_registers=False)),
    "head 128x128, 64 keys": Variant(128, 128, False, Plan(**ROWS, block_n=64, stages=5)),
    "head 64x64": Variant(64, 64, False, Plan(heads=1, tokens=64, block_n=64)),
    "half a group 64x64": Variant(64, 64, True, Plan(heads=2, tokens=64)),
}


def make_blocks(v: Variant, lengths: list[int], tokens: int, heads: int, kv_heads: int, density: float) -> BlockIndices:
    """Random lists on the GPU, the diagonal kept."""
    rows = []
    for n in lengths:
        start, length = n - min(tokens, n), min(tokens, n)
        num_q, num_k = num_query_blocks(start, length, v.block_q), -(-n // v.block_k)
        mask = torch.rand(1, kv_heads if v.per_group else heads, num_q, num_k, device="cuda") < density
        forced = forced_block_mask(start, length, num_q, num_k, v.block_q, v.block_k, sink_blocks=0)
        mask |= forced.to("cuda")[:, None]
        rows.append(BlockIndices.from_mask(mask, block_q=v.block_q, block_k=v.block_k, q_start=start, q_len=length))
    return rows[0] if len(rows) == 1 else BlockIndices.stack(rows)


def check(v: Variant, *, dtype: torch.dtype, dim: int, tokens: int, keys: int, lengths: list[int]) -> str | None:
    """What is wrong with the outputs on random inputs, None if nothing is."""
    heads, kv_heads, batch = 8, 2, len(lengths)
    blocks = make_blocks(v, lengths, tokens, heads, kv_heads, 0.3)
    # [B, T, H, D] in memory, so that strides matter.
    q, k, value = (
        torch.randn(batch, n, h, dim, device="cuda", dtype=dtype).transpose(1, 2)
        for n, h in ((tokens, heads), (keys, kv_heads), (keys, kv_heads))
    )
    for row, n in enumerate(lengths):
        k[row, :, : keys - n] = torch.nan
        value[row, :, : keys - n] = torch.nan
        q[row, :, : max(0, tokens - n)] = torch.nan
    scale = dim**-0.5
    arguments = {"scale": scale, "lengths": lengths, "softcap": None, "sinks": None, "plan": v.plan}
    poison = torch.full((4, batch * tokens * heads * dim), torch.nan, device="cuda", dtype=dtype)
    del poison  # the allocator hands this memory to the outputs
    out, lse = block_sparse_attention(q, k, value, blocks, return_lse=True, **arguments)
    again, _ = block_sparse_attention(q, k, value, blocks, return_lse=False, **arguments)
    torch.cuda.synchronize()
    if not torch.equal(out, again):
        return "two runs, with and without lse, differ"
    for row, n in enumerate(lengths):
        length = min(tokens, n)
        if out[row, :, : tokens - length].count_nonzero():
            return "padding is not zero"
        mine = blocks.row(row)
        mask = mine.to_mask()[0].repeat_interleave(heads // mine.num_heads, 0)
        position = torch.arange(n - length, n, device="cuda")
        at = position // v.block_q - (n - length) // v.block_q
        mask = mask[:, at].repeat_interleave(v.block_k, 2)[..., :n]
        mask &= torch.arange(n, device="cuda") <= position[:, None]
        q1, k1, v1 = q[row, :, tokens - length :], k[row, :, keys - n :], value[row, :, keys - n :]
        k1, v1 = (x.repeat_interleave(heads // kv_heads, 0) for x in (k1, v1))

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor = mask) -> tuple[Tensor, Tensor]:
            scores = (q @ k.transpose(1, 2) * scale).masked_fill(~mask, -torch.inf)
            return F.softmax(scores, -1) @ v, scores.logsumexp(-1)

        exact, exact_lse = attend(q1.double(), k1.double(), v1.double())
        eager, _ = attend(q1, k1, v1)
        error = (out[row, :, tokens - length :] - exact).abs().max().item()
        # Twice the error of the same dtype in eager mode, and one rounding of the largest output.
        bound = 2 * (eager - exact).abs().max().item() + torch.finfo(dtype).eps * exact.abs().max().item()
        lse_error = (lse[row, :, tokens - length :] - exact_lse).abs().max().item()
        if not error <= bound:
            return f"T {tokens}, lengths {lengths}, {dtype}, D {dim}: error {error:.2e} over bound {bound:.2e}"
        if not lse_error <= 2e-5 * max(1.0, exact_lse.abs().max().item()):
            return f"T {tokens}, lengths {lengths}, {dtype}, D {dim}: error of lse {lse_error:.2e}"
    return None


def check_all(v: Variant, quick: bool) -> str | None:
    bf16, fp16 = torch.bfloat16, torch.float16
    shapes = [(bf16, 128, 1000, 1000, [1000]), (bf16, 128, 777, 1500, [1500, 801]), (bf16, 128, 1, 130, [130])]
    if not quick:
        shapes += [(bf16, 128, 4097, 4097, [4097]), (bf16, 128, 300, 300, [300, 65]), (fp16, 64, 640, 650, [650])]
        shapes += [(bf16, 128, 63, 63, [63]), (bf16, 128, 65, 65, [65])]
    for dtype, dim, tokens, keys, lengths in shapes:
        wrong = check(v, dtype=dtype, dim=dim, tokens=tokens, keys=keys, lengths=lengths)
        if wrong:
            return wrong
    return None


def time_ms(v: Variant, tokens: int, sparsity: float) -> dict[str, object]:
    from triton.testing import do_bench

    blocks = make_blocks(v, [tokens], tokens, HEADS, KV_HEADS, 1 - sparsity)
    q, k, value = (
        torch.randn(1, tokens, h, DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for h in (HEADS, KV_HEADS, KV_HEADS)
    )

    def run() -> object:
        return block_sparse_attention(
            q,
            k,
            value,
            blocks,
            scale=DIM**-0.5,
            lengths=[tokens],
            softcap=None,
            sinks=None,
            return_lse=False,
            plan=v.plan,
        )

    ms = do_bench(run, warmup=100, rep=400, return_mode="median")
    causal = causal_block_mask(0, tokens, blocks.num_q_blocks, blocks.num_k_blocks, v.block_q, v.block_k).sum().item()
    kept = blocks.density().mean().item() * causal * HEADS * v.block_q * v.block_k
    return {
        "ms": ms,
        "tflops": 4 * DIM * kept / ms * 1e-9,
        "realised_sparsity": 1 - blocks.density().mean().item(),
    }


def run_variant(name: str, args: argparse.Namespace) -> int:
    torch.manual_seed(0)
    v = VARIANTS[name]
    wrong = check_all(v, args.quick)
    print(json.dumps({"variant": name, "check": wrong or "ok"}), flush=True)
    if wrong:
        return 1
    if args.check_only:
        return 0
    for tokens in args.tokens:
        for sparsity in args.sparsity:
            row = {"variant": name, "tokens": tokens, "sparsity": sparsity}
            print(json.dumps(row | time_ms(v, tokens, sparsity)), flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="words; variants whose name holds one of them")
    parser.add_argument("--tokens", type=int, nargs="+", default=[131072], help="lengths to time")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9], help="shares of blocks left out")
    parser.add_argument("--timeout", type=int, default=60, help="seconds for one variant")
    parser.add_argument("--quick", action="store_true", help="three check shapes instead of eight")
    parser.add_argument("--check-only", action="store_true", help="no timing")
    parser.add_argument("--out", type=Path, help="file to which the times are appended as JSON lines")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        try:
            return run_variant(args.variant, args)
        except Exception:
            traceback.print_exc()
            return 1

    failed = 0
    for name in VARIANTS:
        if not any(word in name for word in args.only):
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--variant", name]
        # A kernel that hangs ignores SIGTERM; run() kills at the timeout.
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
            output, error, code = done.stdout, done.stderr, done.returncode
        except subprocess.TimeoutExpired as late:
            output = (late.stdout or b"").decode()
            error, code = f"still running after {args.timeout} s: a hang?", 1
        failed += code != 0
        print(f"{name}: {'FAILED' if code else 'ok'}")
        if code:
            print("  " + error.strip()[-2000:].replace("\n", "\n  "))
        for line in output.splitlines():
            row = json.loads(line)
            if "ms" not in row:
                print(f"  check: {row['check']}")
                continue
            dense = DENSE_CUDNN_MS.get(row["tokens"])
            speedup = f"{dense / row['ms']:6.2f}x cuDNN dense" if dense and row["sparsity"] > 0 else ""
            cell = f"T {row['tokens']:>6} s {row['sparsity']:.2f}"
            print(f"  {cell} {row['ms']:8.3f} ms {row['tflops']:5.0f} TFLOP/s {speedup}", flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps({"what": "gluon_attention_ms", **row, **environment("cuda")}) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
