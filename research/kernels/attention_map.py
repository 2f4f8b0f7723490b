"""Launch configurations of the kernel of attention maps, beside dense attention without a map.

    python research/kernels/attention_map.py --check-only
    python research/kernels/attention_map.py --out rows.jsonl   # checks, then times; about a minute on an H100
    python research/kernels/attention_map.py --launches 128x128w8 --lengths 32768 131072

One layer of Llama-3.1-8B in bf16, 64 x 64 blocks. Every configuration is compared with an fp64 oracle at several
lengths before it is timed; the longest lengths are left to the configuration that was fastest so far. The name of a
configuration is rows x keys of a tile, warps, stages, programs a multiprocessor.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from seerattn.bench.dense import dense_attention
from seerattn.bench.inputs import Shape, random_qkv
from seerattn.bench.session import Session
from seerattn.bench.timing import device_time, extra_memory
from seerattn.ops.attention_map import AttentionMaps, reference, triton_fwd
from seerattn.ops.attention_map.triton_fwd import Launch
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result
from seerattn.selection.map_form import MASS, PUBLISHED, MapForm

BLOCK = 64
LAUNCHES = {
    "128x128w8s2p1": Launch(rows=128, keys=128, num_warps=8, num_stages=2),
    "128x128w8s3p1": Launch(rows=128, keys=128, num_warps=8, num_stages=3),
    "128x64w8s3p1": Launch(rows=128, keys=64, num_warps=8, num_stages=3),
    "128x64w4s2p2": Launch(rows=128, keys=64, num_warps=4, num_stages=2, programs_per_sm=2),
    "64x64w4s2p2": Launch(rows=64, keys=64, num_warps=4, num_stages=2, programs_per_sm=2),
}
DENSE = ("flash", "cudnn")
CHECKED_TOKENS = (1000, 1024, 4095)
# Plain PyTorch is slow and the same at every length; beyond this length only one configuration is timed.
REFERENCE_TOKENS = 8192
ALL_TOKENS = 65536


def run_maps(
    attention_maps: Callable[..., AttentionMaps],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forms: tuple[MapForm, ...] = (PUBLISHED,),
    **options: object,
) -> tuple[Tensor, ...]:
    maps = attention_maps(
        q,
        k,
        v,
        forms=forms,
        query_blocks=None,
        block_q=BLOCK,
        block_k=BLOCK,
        scale=q.shape[3] ** -0.5,
        lengths=[k.shape[2]] * k.shape[0],
        segment_ids=None,
        softcap=None,
        sinks=None,
        **options,
    )
    return maps.out, *maps.maps


def exact_maps(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Output, target and mass in fp64, and the error of the output of eager attention, in strips of query rows."""
    group, tokens = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    blocks = -(-tokens // BLOCK)
    keys = torch.arange(tokens, device=q.device)
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    target, mass = torch.zeros(2, *q.shape[:2], blocks, blocks, dtype=torch.float64, device=q.device)
    worst = 0.0
    for first in range(0, tokens, 4 * BLOCK):
        rows = slice(first, first + 4 * BLOCK)
        hidden = keys > keys[rows, None]
        p = (q[:, :, rows].double() @ k.double().mT * q.shape[3] ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        out[:, :, rows] = p @ v.double()
        eager = ((q[:, :, rows] @ k.mT).float() * q.shape[3] ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        worst = max(worst, float(((eager.to(q.dtype) @ v).double() - out[:, :, rows]).abs().max()))
        for j in range(blocks):
            strips = p[..., j * BLOCK : (j + 1) * BLOCK].split(BLOCK, 2)
            for i, strip in enumerate(strips, first // BLOCK):
                target[:, :, i, j] = strip.amax((2, 3))
                mass[:, :, i, j] = strip.sum((2, 3))
    return out, target / target.sum(-1, keepdim=True), mass / mass.sum(-1, keepdim=True), worst


def check(launch: Launch, device: torch.device) -> tuple[float, float]:
    """Worst error over its bound, and 1.

    The output may have twice the error of eager attention and one rounding. Maps come from fp32 scores: relative to
    fp64 they may be off by what 32 roundings of the largest score make of a probability, and of its row's sum.
    """
    worst = 0.0
    for seed, tokens in enumerate(CHECKED_TOKENS):
        q, k, v = random_qkv(Shape(heads=8, kv_heads=2), tokens, device, seed=seed, drift=1.0)
        exact_out, exact_target, exact_mass, eager_error = exact_maps(q, k, v)
        first = run_maps(triton_fwd.attention_maps, q, k, v, (PUBLISHED, MASS), launch=launch)
        again = run_maps(triton_fwd.attention_maps, q, k, v, launch=launch)
        out, target, mass = first
        if not (torch.equal(out, again[0]) and torch.equal(target, again[1])):
            return torch.inf, 1.0
        bound = 2 * eager_error + torch.finfo(q.dtype).eps * float(exact_out.abs().max())
        errors = [float((out - exact_out).abs().max()) / bound]
        largest = float(q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max()) * q.shape[3] ** -0.5
        band = 2 * 32 * torch.finfo(torch.float32).eps * max(1.0, largest)
        for actual, exact in ((target, exact_target), (mass, exact_mass)):
            errors.append(float(((actual - exact).abs() / (band * exact + 1e-12)).max()))
        if not all(error == error for error in errors):
            return torch.inf, 1.0
        worst = max(worst, *errors)
    return worst, 1.0


def measure(session: Session, tokens: int, name: str, run: Callable[[], tuple[Tensor, ...] | Tensor]) -> Result | None:
    cell = {"dtype": Shape().dtype_name, "map": name not in DENSE, "block_q": BLOCK, "block_k": BLOCK}
    blanks = [
        session.blank(
            what,
            model=str(Shape()),
            context=tokens,
            impl=name,
            cell=cell,
        )
        for what in ("attention_map_ms", "extra_memory_mib")
    ]

    def checked() -> dict[str, dict[str, object]]:
        if name in LAUNCHES:
            session.check(name, lambda: check(LAUNCHES[name], session.device))
        memory = {"value": round(extra_memory(run, session.device) / 2**20, 3), "n": 1}
        return {"attention_map_ms": device_time(run, session.device).fields(), "extra_memory_mib": memory}

    return session.measured_together(blanks, checked, label=f"{tokens:>7,} tokens, {name}")[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 65536, 131072], help="tokens")
    parser.add_argument("--launches", nargs="+", default=list(LAUNCHES), choices=list(LAUNCHES), help="configurations")
    parser.add_argument("--check-only", action="store_true", help="compare with the oracle and stop")
    parser.add_argument("--out", type=Path, help="file to which the rows are appended as JSON lines")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    torch.set_grad_enabled(False)
    device = torch.device("cuda")
    session = Session(device, ResultsFile(args.out, device), say=lambda text: print(text, flush=True))

    if args.check_only:
        for name in args.launches:
            try:
                session.check(name, lambda name=name: check(LAUNCHES[name], device))
            except Exception as error:
                session.failures.append(f"{name}: {error}")
                print(f"FAILED {name}: {error}", flush=True)
        return bool(session.failures)

    table: dict[int, dict[str, float]] = {}
    for tokens in args.lengths:
        q, k, v = random_qkv(Shape(), tokens, device)
        runs: dict[str, Callable[[], tuple[Tensor, ...] | Tensor]] = {d: dense_attention(d, q, k, v) for d in DENSE}
        if tokens <= REFERENCE_TOKENS:
            runs["reference"] = lambda q=q, k=k, v=v: run_maps(reference.attention_maps, q, k, v)
        launches = args.launches
        if tokens > ALL_TOKENS and table:
            times = {name: ms for name, ms in table[max(table)].items() if name in LAUNCHES}
            launches = [min(times, key=times.__getitem__)] if times else launches
        for name in launches:
            runs[name] = lambda name=name, q=q, k=k, v=v: run_maps(
                triton_fwd.attention_maps, q, k, v, launch=LAUNCHES[name]
            )
        rows = {name: measure(session, tokens, name, run) for name, run in runs.items()}
        table[tokens] = {name: row.value for name, row in rows.items() if row is not None and row.value is not None}
        session.release()

    names = list(dict.fromkeys(name for times in table.values() for name in times))
    print("\nms (TFLOP/s, the causal half counted)")
    print("tokens".rjust(8), *(name.rjust(16) for name in names))
    for tokens, times in table.items():
        flops = 2 * Shape().heads * Shape().head_dim * tokens**2
        cells = (f"{times[n]:.2f} ({flops / times[n] / 1e9:.0f})" if n in times else "-" for n in names)
        print(str(tokens).rjust(8), *(cell.rjust(16) for cell in cells))
    for reason in session.failures:
        print(f"FAILED {reason}")
    return bool(session.failures)


if __name__ == "__main__":
    raise SystemExit(main())
