"""The backward of block-sparse attention: every launch against fp64 gradients, then timed beside FlashAttention-2.

    python research/kernels/backward.py                       # checks, then 32k and 8k tokens
    python research/kernels/backward.py --check-only
    python research/kernels/backward.py --only "head 64x64" --tokens 32768 --sparsity 0.9 --out times.jsonl

Launches are compiled and checked in processes of their own, side by side: at 4k ragged tokens of 4 and 1 heads, and at
the heads that are timed. What passed is timed afterwards, one after the other: dq, dk and dv, the lists of the keys,
and forward and backward together with the fastest of both. Batch 1, 32 query heads, 8 KV heads, head dim 128, bf16;
masks are random with the diagonal kept. Needs one Hopper GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from seerattn.bench.backward import check_dense_gradients, check_sparse_gradients, forward_and_backward
from seerattn.bench.dense import dense_attention
from seerattn.bench.inputs import Shape, random_blocks, random_qkv
from seerattn.ops.block_sparse_attention import block_sparse_attention, triton_bwd
from seerattn.ops.block_sparse_attention.triton_bwd import Call, Launch
from seerattn.ops.block_sparse_attention.triton_lists import key_lists
from seerattn.results.environment import environment

SHAPE = Shape()
CHECKED = Shape(heads=4, kv_heads=1)
CUDA = torch.device("cuda")


@dataclass(frozen=True)
class Lists:
    """A form of lists."""

    block: int
    per_group: bool

    def sizes(self, shape: Shape) -> dict[str, int]:
        heads = shape.kv_heads if self.per_group else shape.heads
        return {"block_q": self.block, "block_k": self.block, "mask_heads": heads}


LISTS = {"head 64x64": Lists(64, False), "group 64x64": Lists(64, True), "head 128x128": Lists(128, False)}
# Queries, keys, warps, stages, registers.
DQ = {
    "head 64x64": [
        Launch(64, 64, 4, 1),
        Launch(64, 64, 4, 1, 168),
        Launch(64, 64, 4, 2),
        Launch(64, 64, 4, 2, 168),
        Launch(64, 64, 4, 3),
    ],
    "group 64x64": [
        Launch(128, 64, 8, 2),
        Launch(128, 64, 8, 1),
        Launch(128, 64, 8, 1, 128),
        Launch(64, 64, 4, 2),
        Launch(64, 64, 4, 1, 168),
    ],
    "head 128x128": [
        Launch(128, 128, 8, 1),
        Launch(128, 128, 8, 2),
        Launch(128, 64, 8, 2),
        Launch(64, 64, 4, 2),
        Launch(64, 64, 4, 1, 168),
    ],
}
DKV = {
    "head 64x64": [Launch(64, 64, 4, 1), Launch(64, 64, 4, 2), Launch(64, 64, 4, 3), Launch(64, 64, 8, 2)],
    "group 64x64": [Launch(64, 64, 4, 1), Launch(64, 64, 4, 2), Launch(64, 64, 4, 3)],
    "head 128x128": [Launch(64, 64, 4, 2), Launch(64, 128, 8, 1), Launch(64, 128, 8, 2), Launch(64, 128, 8, 3)],
}


def shown(launch: Launch) -> str:
    return str(tuple(asdict(launch).values())).replace("None", "-")


def make_call(lists: Lists, tokens: int, density: float) -> Call:
    """A forward call at the heads that are timed."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_qkv(SHAPE, tokens, CUDA))
    blocks = random_blocks(tokens=tokens, density=density, device=CUDA, **lists.sizes(SHAPE))
    with torch.no_grad():
        out, lse = block_sparse_attention(q, k, v, blocks, return_lse=True)
    return Call(q, k, v, out, lse, blocks, SHAPE.head_dim**-0.5, [tokens], None, None)


def chosen(kernel: str, launch: Launch) -> AbstractContextManager[object]:
    """Makes a kernel use this launch for a while."""
    choose = {"dq": "choose_query_launch", "dkv": "choose_key_launch"}[kernel]
    return mock.patch.object(triton_bwd, choose, lambda **_: launch)


def check(name: str, kernel: str, launch: Launch) -> None:
    """Raises if gradients that use this launch are wrong; compiles it for the heads that are timed.

    Raises:
        RuntimeError: they are.
    """
    lists = LISTS[name]
    with chosen(kernel, launch):
        for tokens in (1000, 4001):
            sizes = lists.sizes(CHECKED)
            ratio, _ = check_sparse_gradients(block_sparse_attention, CHECKED, CUDA, tokens=tokens, **sizes)
            if not ratio <= 1:
                raise RuntimeError(f"{tokens} tokens: {ratio:.2f} times the allowed error")
        call = make_call(lists, 4096, 0.3)
        dout = torch.randn_like(call.q)
        first, second = (triton_bwd.gradients(call, dout, None, None, needs_keys=True) for _ in range(2))
    if not all(torch.equal(a, b) for a, b in zip(first[:3], second[:3])):
        raise RuntimeError("two runs differ")


def check_dense(name: str) -> None:
    ratio, _ = check_dense_gradients(lambda *x: dense_attention(name, *x)(), CHECKED, CUDA, tokens=4001)
    if not ratio <= 1:
        raise RuntimeError(f"dense {name}: {ratio:.2f} times the allowed error")


def checked(job: tuple[str, str, int], limit: float) -> str | None:
    """What is wrong with a launch, found by a process of its own; None if nothing is."""
    command = [sys.executable, __file__, "--job", *map(str, job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"still running after {limit:.0f} s"
    return None if done.returncode == 0 else (done.stderr.strip() or "no output")[-1500:]


def milliseconds(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(run, warmup=30, rep=120, return_mode="median")


class Table:
    """Prints times as they come, and keeps them."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.where = path, environment("cuda")

    def add(self, ms: float, **row: object) -> float:
        print(f"{' '.join(f'{x!s:<14}' for x in row.values())} {ms:9.3f} ms", flush=True)
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps({"what": "attention_backward_ms", "ms": ms, **row, **self.where}) + "\n")
        return ms


def time_dense(table: Table, tokens: int) -> dict[str, float]:
    """Forward and backward of dense attention by backend."""
    found = {}
    for name in ("flash", "cudnn"):
        q, k, v = random_qkv(SHAPE, tokens, CUDA)
        cell = {"lists": f"dense {name}", "tokens": tokens, "sparsity": 0.0}
        try:
            check_dense(name)
            forward = milliseconds(dense_attention(name, q, k, v))
            table.add(forward, **cell, part="forward")
            whole = milliseconds(forward_and_backward(lambda *x, n=name: dense_attention(n, *x)(), q, k, v))
            found[name] = table.add(whole, **cell, part="both")
        except Exception as error:
            print(f"dense {name}: {error}")
    return found


def time_sparse(
    table: Table,
    name: str,
    tokens: int,
    sparsity: float,
    good: dict[str, list[Launch]],
    dense: dict[str, float],
) -> None:
    """Parts of the backward for every launch, then forward and backward together with the fastest."""
    call = make_call(LISTS[name], tokens, 1 - sparsity)
    cell = {"lists": name, "tokens": tokens, "sparsity": sparsity}
    dout = torch.randn_like(call.q)
    forward = partial(block_sparse_attention, call.q, call.k, call.v, call.blocks, return_lse=True)
    for impl in ("gluon", "triton"):
        table.add(milliseconds(partial(forward, impl=impl)), **cell, part=f"forward {impl}")
    kv_heads = call.k.shape[1]
    table.add(milliseconds(lambda: key_lists(call.blocks, kv_heads, None)), **cell, part="lists")
    lists = key_lists(call.blocks, kv_heads, None)
    _, statistics = triton_bwd.query_gradients(call, dout, None)
    pairs = int(lists.counts.sum()) * (SHAPE.heads // call.blocks.num_heads) * LISTS[name].block ** 2
    runs = {
        "dq": partial(triton_bwd.query_gradients, call, dout, None),
        "dkv": partial(triton_bwd.key_gradients, call, dout, statistics, lists),
    }
    fastest = {}
    for kernel, products in (("dq", 3), ("dkv", 4)):
        times = {}
        for launch in good[kernel]:
            times[launch] = milliseconds(partial(runs[kernel], launch=launch))
            rate = products * 2 * SHAPE.head_dim * pairs / times[launch] * 1e-9
            table.add(times[launch], **cell, part=f"{kernel} {shown(launch)}", tflops=f"{rate:.0f}")
        fastest[kernel] = min(times, key=times.get, default=None)
    if None in fastest.values():
        return
    attend = forward_and_backward(lambda *x: block_sparse_attention(*x, call.blocks), call.q, call.k, call.v)
    with chosen("dq", fastest["dq"]), chosen("dkv", fastest["dkv"]):
        both = milliseconds(attend)
    speed = {f"x {n}": f"{n} {ms / both:.2f}x" for n, ms in dense.items()}
    table.add(both, **cell, part=f"both {shown(fastest['dq'])} {shown(fastest['dkv'])}", **speed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="words; forms of lists whose name holds one of them")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 8192], help="lengths to time")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.5], help="shares of blocks left out")
    parser.add_argument("--time-limit", type=float, default=240, help="seconds; nothing new is begun after it")
    parser.add_argument("--workers", type=int, default=8, help="launches that are compiled and checked side by side")
    parser.add_argument("--check-only", action="store_true", help="no timing")
    parser.add_argument("--out", type=Path, help="file to which the times are appended as JSON lines")
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        name, kernel, number = args.job
        check(name, kernel, {"dq": DQ, "dkv": DKV}[kernel][name][int(number)])
        return 0

    begin = time.monotonic()
    names = [name for name in LISTS if any(word in name for word in args.only)]
    kernels = {"dq": DQ, "dkv": DKV}
    jobs = [(name, kernel, i) for name in names for kernel in kernels for i in range(len(kernels[kernel][name]))]
    good: dict[str, dict[str, list[Launch]]] = {name: {"dq": [], "dkv": []} for name in names}
    failed = 0
    with ThreadPoolExecutor(args.workers) as pool:
        for job, wrong in zip(jobs, pool.map(lambda job: checked(job, args.time_limit / 2), jobs)):
            name, kernel, i = job
            launch = kernels[kernel][name][i]
            failed += wrong is not None
            print(f"checked {name} {kernel} {shown(launch)}: {wrong or 'ok'}", flush=True)
            if wrong is None:
                good[name][kernel].append(launch)
    print(f"{time.monotonic() - begin:.0f} s for the checks", flush=True)
    if args.check_only:
        return 1 if failed else 0

    table = Table(args.out)
    for tokens in args.tokens:
        dense = time_dense(table, tokens)
        for name in names:
            for sparsity in args.sparsity:
                if time.monotonic() - begin > args.time_limit:
                    print(f"left out for the time limit: {name}, {tokens} tokens, sparsity {sparsity}")
                    continue
                try:
                    time_sparse(table, name, tokens, sparsity, good[name], dense)
                except Exception:
                    traceback.print_exc()
                    failed += 1
    print(f"{time.monotonic() - begin:.0f} s in all")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
