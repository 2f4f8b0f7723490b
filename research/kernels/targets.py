"""Published targets of some query blocks: launches of the kernel, beside dense attention with all of them.

    python research/kernels/targets.py --check-only
    python research/kernels/targets.py --out rows.jsonl --time-limit 120
    python research/kernels/targets.py --launches 128x128w8s3p1 --lengths 131072

One layer of Llama-3.1-8B in bf16, 64 x 64 blocks; the rows are drawn at random, the same ones for every variant. "op"
is `attention_map` as training calls it, with its checks and its own choice of a launch; "op-l2" the same with heads in
sections that fit in L2 however few tiles they hold. Every variant is compared with an fp64 oracle before it is timed,
at several lengths, plain and with packed documents, and twice for equal bits. The name of a launch is rows x keys of a
tile, warps, stages, programs a multiprocessor.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattn.bench.inputs import Shape, random_qkv
from seerattn.bench.session import Session
from seerattn.bench.timing import device_time, extra_memory
from seerattn.ops.attention_map import attention_map, triton_fwd
from seerattn.ops.attention_map.triton_fwd import Launch
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result
from seerattn.selection.map_form import PUBLISHED

BLOCK = 64
SHAPE = Shape()
LAUNCHES = {
    "128x128w8s3p1": Launch(rows=128, keys=128, num_warps=8, num_stages=3),
    "128x128w8s2p2": Launch(rows=128, keys=128, num_warps=8, num_stages=2, programs_per_sm=2, max_registers=128),
    "128x64w8s3p2": Launch(rows=128, keys=64, num_warps=8, num_stages=3, programs_per_sm=2, max_registers=128),
    "64x128w4s2p2": Launch(rows=64, keys=128, num_warps=4, num_stages=2, programs_per_sm=2),
    "64x64w4s3p3": Launch(rows=64, keys=64, num_warps=4, num_stages=3, programs_per_sm=3, max_registers=168),
    "256x64w8s3p1": Launch(rows=256, keys=64, num_warps=8, num_stages=3),
}
OP, OP_L2, DENSE = "op", "op-l2", "with_output"
CHECKED_TOKENS = (1000, 1024, 4095)


def some_rows(tokens: int, share: float, *, seed: int = 0) -> Tensor:
    """Ascending query blocks, on the CPU."""
    blocks = -(-tokens // BLOCK)
    drawn = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))
    return drawn[: max(1, round(share * blocks))].sort().values


def targets(name: str, q: Tensor, k: Tensor, rows: Tensor, segment_ids: Tensor | None = None) -> Tensor:
    """The rows of the map by one of the variants."""
    if name in (OP, OP_L2):
        with mock.patch.object(triton_fwd, "SECTION_TILES", 0 if name == OP_L2 else triton_fwd.SECTION_TILES):
            call = {"query_blocks": rows, "block_q": BLOCK, "block_k": BLOCK, "segment_ids": segment_ids}
            return attention_map(q, k, **call, impl="triton").map
    maps = triton_fwd.attention_maps(
        q,
        k,
        None,
        forms=(PUBLISHED,),
        query_blocks=rows.tolist(),
        block_q=BLOCK,
        block_k=BLOCK,
        scale=q.shape[3] ** -0.5,
        lengths=[k.shape[2]] * k.shape[0],
        segment_ids=segment_ids,
        softcap=None,
        sinks=None,
        launch=LAUNCHES[name],
    )
    return maps.map


def exact_targets(q: Tensor, k: Tensor, rows: Tensor, segment_ids: Tensor | None) -> Tensor:
    """The same in fp64, a query block at a time."""
    tokens = q.shape[2]
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    position = torch.arange(tokens, device=q.device)
    maxima = []
    for row in rows.tolist():
        here = slice(row * BLOCK, (row + 1) * BLOCK)
        hidden = position > position[here, None]
        if segment_ids is not None:
            hidden = hidden | (segment_ids[0] != segment_ids[0, here, None])
        p = (q[:, :, here].double() @ keys * q.shape[3] ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        maxima.append(F.pad(p.amax(2), (0, -tokens % BLOCK)).unflatten(-1, (-1, BLOCK)).amax(-1))
    target = torch.stack(maxima, 2)
    return target / target.sum(-1, keepdim=True)


def check(name: str, device: torch.device) -> tuple[float, float]:
    """Worst error over its bound, and 1; infinity where two runs differ.

    The scores are fp32 of inputs as given: relative to fp64, maps may be off by what 32 roundings of the largest score
    make of a probability, and of its row's sum.
    """
    worst = 0.0
    for seed, tokens in enumerate(CHECKED_TOKENS):
        q, k, _ = random_qkv(SHAPE, tokens, device, seed=seed, drift=1.0)
        largest = float(q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max()) * q.shape[3] ** -0.5
        band = 2 * 32 * torch.finfo(torch.float32).eps * max(1.0, largest)
        documents = (torch.arange(tokens, device=device) // 700).to(torch.int32)[None]
        for segment_ids in (None, documents):
            for share in (0.3, 1.0):
                rows = some_rows(tokens, share, seed=seed)
                exact = exact_targets(q, k, rows, segment_ids)
                actual = targets(name, q, k, rows, segment_ids)
                if not torch.equal(actual, targets(name, q, k, rows, segment_ids)):
                    return torch.inf, 1.0
                error = float(((actual - exact).abs() / (band * exact + 1e-12)).max())
                if error != error:
                    return torch.inf, 1.0
                worst = max(worst, error)
    return worst, 1.0


def measure(session: Session, tokens: int, share: float, name: str, run: Callable[[], object]) -> Result | None:
    cell = {"dtype": SHAPE.dtype_name, "output": name == DENSE, "query_blocks": share, "block_q": BLOCK}
    cell |= {"block_k": BLOCK}
    quantities = ("attention_map_ms", "extra_memory_mib")
    blanks = [session.blank(what, model=str(SHAPE), context=tokens, impl=name, cell=cell) for what in quantities]

    def checked() -> dict[str, dict[str, object]]:
        if name != DENSE:
            session.check(name, lambda: check(name, session.device))
        memory = {"value": round(extra_memory(run, session.device) / 2**20, 3), "n": 1}
        return {"attention_map_ms": device_time(run, session.device).fields(), "extra_memory_mib": memory}

    return session.measured_together(blanks, checked, label=f"{tokens:>7,} tokens, {share:.0%}, {name}")[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072], help="tokens")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 1.0], help="of the query blocks, in (0, 1]")
    parser.add_argument("--launches", nargs="*", default=list(LAUNCHES), choices=list(LAUNCHES), help="configurations")
    parser.add_argument("--check-only", action="store_true", help="compare with the oracle and stop")
    parser.add_argument("--out", type=Path, help="file to which the rows are appended as JSON lines")
    parser.add_argument("--time-limit", type=float, help="seconds after which nothing new is begun")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    if not all(0 < share <= 1 for share in args.shares):
        parser.error(f"--shares must be in (0, 1], got {args.shares}")
    torch.set_grad_enabled(False)
    device = torch.device("cuda")
    session = Session(device, ResultsFile(args.out, device), say=partial(print, flush=True), time_limit=args.time_limit)

    if args.check_only:
        for name in (OP, OP_L2, *args.launches):
            if session.out_of_time:
                session.left_out.append(f"check of {name}")
                continue
            try:
                session.check(name, lambda name=name: check(name, device))
            except Exception as error:
                session.failures.append(f"{name}: {error}")
                print(f"FAILED {name}: {error}", flush=True)

    names = (DENSE, OP, OP_L2, *args.launches)
    table: dict[tuple[int, float], dict[str, float]] = {}
    for tokens in [] if args.check_only else args.lengths:
        q, k, v = random_qkv(SHAPE, tokens, device)
        for share in args.shares:
            rows = some_rows(tokens, share)
            times = table.setdefault((tokens, share), {})
            for name in names:
                if name == DENSE and share < 1:
                    continue
                run = partial(attention_map, q, k, v, impl="triton") if name == DENSE else None
                row = measure(session, tokens, share, name, run or partial(targets, name, q, k, rows))
                if row is not None and row.value is not None:
                    times[name] = row.value
        session.release()

    if table:
        print("\nms")
        print("tokens".rjust(8), "rows".rjust(6), *(name.rjust(17) for name in names))
    for (tokens, share), times in table.items():
        cells = (f"{times[name]:.3f}" if name in times else "-" for name in names)
        print(str(tokens).rjust(8), f"{share:.0%}".rjust(6), *(cell.rjust(17) for cell in cells))
    for label in session.left_out:
        print(f"left out, the time was up: {label}")
    for reason in session.failures:
        print(f"FAILED {reason}")
    return bool(session.failures)


if __name__ == "__main__":
    raise SystemExit(main())
