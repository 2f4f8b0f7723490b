"""`impl="flash4"` on a Hopper GPU: checks against fp64, compile times, and times beside dense attention.

    python research/kernels/flash4.py --check-only
    python research/kernels/flash4.py --out research/records/h100-flash4.jsonl     # under two minutes

Checks come first, on few heads (the kernels are the same): ragged lengths, S > T also from inside a block, left padding
with NaN in it, packed sequences, softcap and sinks. Outputs are full of NaN before each run, and every case runs twice
and must give equal bits. A kernel that fails a check is not timed. Times are of the public op: list conversion and
whatever packs heads are included. Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattn.bench.dense import dense_attention
from seerattn.bench.inputs import Shape, random_blocks, random_qkv
from seerattn.bench.timing import device_time
from seerattn.ops.block_sparse_attention import block_sparse_attention, flash4
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result
from seerattn.selection.block_indices import BlockIndices, causal_block_mask, forced_block_mask, num_query_blocks

DEVICE = torch.device("cuda")
SHAPE = Shape()  # that is timed
SMALL = Shape(heads=8, kv_heads=2)  # that is checked; the group is the same, so the kernels are


@dataclass(frozen=True)
class Kind:
    """Block sizes, and whether a KV group shares its lists."""

    block_q: int
    block_k: int
    shared: bool

    def __str__(self) -> str:
        return f"{self.block_q}x{self.block_k} per {'group' if self.shared else 'head'}"

    def mask_heads(self, shape: Shape) -> int:
        return shape.kv_heads if self.shared else shape.heads


KINDS = [
    Kind(128, 128, False),
    Kind(64, 64, True),
    Kind(64, 128, True),
    Kind(128, 128, True),
    Kind(32, 64, True),
    Kind(64, 64, False),
]
DENSE = ("flash", "cudnn", "flash4")
# (T, S) of the checks: ragged, whole, a chunk from a block boundary on, one from inside a block.
LENGTHS = [(1000, 1000), (4096, 4096), (512, 1536), (333, 1000)]
# What is timed: tokens, density, and which of KINDS.
TIMED = [
    (131072, 0.1, KINDS),
    (131072, 0.5, KINDS[:2]),
    (32768, 0.1, KINDS),
    (32768, 0.5, KINDS[:2]),
    (8192, 0.1, KINDS[:3]),
]


def attend(*args: Tensor | BlockIndices, **kwargs: object) -> tuple[Tensor, Tensor]:
    """The op, on an output that is full of NaN before it runs."""
    empty = torch.empty

    def poisoned(*size: object, **options: object) -> Tensor:
        x = empty(*size, **options)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    with mock.patch.object(torch, "empty", poisoned):
        return block_sparse_attention(*args, impl="flash4", return_lse=True, **kwargs)


def random_call(
    q_tokens: int, k_tokens: int, kind: Kind, *, dim: int = 128, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, BlockIndices]:
    """Inputs whose last query is the last key, and lists of density 0.3."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    heads = ((SMALL.heads, q_tokens), (SMALL.kv_heads, k_tokens), (SMALL.kv_heads, k_tokens))
    shapes = [(1, h, tokens, dim) for h, tokens in heads]
    qkv = [torch.randn(s, dtype=dtype, device=DEVICE, generator=generator) for s in shapes]
    start = k_tokens - q_tokens
    rows, columns = num_query_blocks(start, q_tokens, kind.block_q), -(-k_tokens // kind.block_k)
    geometry = (start, q_tokens, rows, columns, kind.block_q, kind.block_k)
    keep = torch.rand(1, kind.mask_heads(SMALL), rows, columns, device=DEVICE, generator=generator) < 0.3
    keep = (keep | forced_block_mask(*geometry).to(DEVICE)[:, None]) & causal_block_mask(*geometry).to(DEVICE)[:, None]
    sizes = {"block_q": kind.block_q, "block_k": kind.block_k}
    return *qkv, BlockIndices.from_mask(keep, q_start=start, q_len=q_tokens, **sizes)


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockIndices,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of plain PyTorch in the dtype of the inputs, with softmax in fp32 or better."""
    group, q_tokens, k_tokens = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    positions = torch.arange(k_tokens - q_tokens, k_tokens, device=q.device)
    keys = torch.arange(k_tokens, device=q.device)
    mask = blocks.to_mask().repeat_interleave(q.shape[1] // blocks.num_heads, 1)
    rows = positions // blocks.block_q - (k_tokens - q_tokens) // blocks.block_q
    mask = mask[:, :, rows][..., keys // blocks.block_k] & (keys <= positions[:, None])
    scores = (q @ k.repeat_interleave(group, 1).transpose(2, 3)) * q.shape[3] ** -0.5
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores, v = torch.cat((scores, column), -1), F.pad(v, (0, 0, 0, 1))
    return scores.softmax(-1).to(q.dtype) @ v.repeat_interleave(group, 1), scores.logsumexp(-1)


def compare(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices, **extra: object) -> str:
    """Error and bound as text.

    Raises:
        AssertionError: the error is above twice that of plain PyTorch plus one rounding, or the LSE, which is fp32
            throughout but for approximate exponentials, is off by 1e-4.
    """
    exact, exact_lse = plain(q.double(), k.double(), v.double(), blocks, **extra)
    eager, _ = plain(q, k, v, blocks, **extra)
    eps = torch.finfo(q.dtype).eps
    bound = 2 * float((eager.double() - exact).abs().max()) + eps / 2 * float(exact.abs().max())
    error, lse_error = float((out.double() - exact).abs().max()), float((lse.double() - exact_lse).abs().max())
    assert error <= bound, f"error {error:.2e} above bound {bound:.2e}"
    assert lse_error <= 1e-4, f"LSE is off by {lse_error:.2e}"
    return f"error {error:.2e}, bound {bound:.2e}, LSE error {lse_error:.0e}"


def check_call(
    q_tokens: int, k_tokens: int, kind: Kind, *, extra: dict[str, object] | None = None, **inputs: object
) -> str:
    """A call, the same again, and once more in the memory layout of a model's projections."""
    extra = extra or {}
    q, k, v, blocks = random_call(q_tokens, k_tokens, kind, **inputs)
    out, lse = attend(q, k, v, blocks, **extra)
    again, lse_again = attend(q, k, v, blocks, **extra)
    assert torch.equal(out, again) and torch.equal(lse, lse_again), "two runs differ"
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(out, attend(*strided, blocks, **extra)[0]), "the result depends on the strides of the inputs"
    return compare(out, lse, q, k, v, blocks, **extra)


def check_padding(kind: Kind) -> str:
    """Rows of a left-padded batch with NaN in the padding, and packed sequences, against each row alone."""
    lengths = [700, 300, 65]
    alone = [random_call(n, n, kind, seed=n) for n in lengths]
    blocks = BlockIndices.stack([row[3] for row in alone])
    q, k, v = (
        torch.cat([F.pad(row[i], (0, 0, lengths[0] - n, 0), value=torch.nan) for row, n in zip(alone, lengths)])
        for i in range(3)
    )
    out, lse = attend(q, k, v, blocks, lengths=torch.tensor(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    joined, joined_lse = attend(*(torch.cat([row[i] for row in alone], 2) for i in range(3)), blocks, cu_seqlens=bounds)
    for b, n in enumerate(lengths):
        begin = int(bounds[b])
        said = compare(out[b : b + 1, :, -n:], lse[b : b + 1, :, -n:], *alone[b])
        compare(joined[:, :, begin : begin + n], joined_lse[:, :, begin : begin + n], *alone[b])
        assert bool((out[b, :, :-n] == 0).all()) and bool((lse[b, :, :-n] == -torch.inf).all()), "padding is not zero"
    return said


def attempt(label: str, run: Callable[[], str]) -> bool:
    """Runs a check and prints how it went and what it took; says whether it passed."""
    begin, compiled = time.perf_counter(), len(flash4._kernels)
    try:
        said = run()
        torch.cuda.synchronize()
    except Exception:
        # A case that fails must not cost the others their turn.
        print(f"FAILED {label}\n{traceback.format_exc()[-1800:]}", flush=True)
        return False
    seconds = time.perf_counter() - begin
    compiled = len(flash4._kernels) - compiled
    print(f"ok {label}: {said} ({seconds:.1f} s{f', {compiled} compiled' if compiled else ''})", flush=True)
    return True


def check_all() -> tuple[list[Kind], bool]:
    """The kinds that passed all their checks, and whether everything passed."""
    passed = []
    for kind in KINDS:
        results = [attempt(f"{kind}, T {t}, S {s}", partial(check_call, t, s, kind)) for t, s in LENGTHS]
        if all(results):
            passed.append(kind)
    extra = {"softcap": 20.0, "sinks": torch.linspace(-2, 3, SMALL.heads, device=DEVICE)}
    half = partial(check_call, 700, 1000, dim=64, dtype=torch.float16, extra=extra)
    others = [attempt(f"{kind}, T 1, S 700", partial(check_call, 1, 700, kind)) for kind in KINDS[:2]]
    others += [attempt(f"{kind}, padding and packed sequences", partial(check_padding, kind)) for kind in KINDS[:2]]
    others += [attempt(f"{kind}, D 64, fp16, softcap, sinks", partial(half, kind)) for kind in KINDS[:2]]
    others.append(attempt(f"{KINDS[1]}, D 256", partial(check_call, 700, 1000, KINDS[1], dim=256)))
    return passed, len(passed) == len(KINDS) and all(others)


def time_all(file: ResultsFile, passed: list[Kind]) -> bool:
    """Times of dense attention and of what passed, printed and appended; whether all that was tried could be timed."""
    blank = Result(
        what="attention_ms",
        value=None,
        n=0,
        unit="runs",
        model=str(SHAPE),
        method="dense",
        kind="dense",
        name="dense",
        context=0,
        text="random",
        realised_density=1.0,
    )
    cell = {"device": torch.cuda.get_device_name(), "dtype": SHAPE.dtype_name, "clock": "device"}
    done: dict[tuple[int, str], float] = {}

    def measure(label: str, tokens: int, prepare: Callable[[], Callable[[], object]], **values: object) -> str:
        timing = device_time(prepare(), DEVICE)
        file.append(replace(blank, context=tokens, **values, **timing.fields()))
        done[tokens, label] = timing.median
        return f"{timing.median:.3f} ms"

    whole = True
    for tokens in sorted({tokens for tokens, _, _ in TIMED}, reverse=True):
        qkv = random_qkv(SHAPE, tokens, DEVICE)
        for name in DENSE:
            prepare = partial(dense_attention, name, *qkv)
            run = partial(measure, name, tokens, prepare, cell=cell | {"impl": name})
            whole &= attempt(f"{tokens:>7,} tokens, dense {name}", run)
        for kind, density in ((k, d) for t, d, kinds in TIMED if t == tokens for k in kinds if k in passed):
            sizes = {"block_q": kind.block_q, "block_k": kind.block_k, "mask_heads": kind.mask_heads(SHAPE)}
            blocks = random_blocks(tokens=tokens, density=density, device=DEVICE, **sizes)
            prepare = partial(partial, block_sparse_attention, *qkv, blocks, impl="flash4")
            label = f"{tokens:>7,} tokens, {kind}, density {density:g}"
            share = "head" if kind.mask_heads(SHAPE) == SHAPE.heads else "group"
            own = sizes | {"share": share, "rows_alike": 1, "impl": "flash4"}
            values = {"method": "random", "kind": "static", "name": "random", "density": density, "seed": 0}
            values |= {"cell": cell | own}
            run = partial(measure, label, tokens, prepare, realised_density=float(blocks.density().mean()), **values)
            whole &= attempt(label, run)
            if (tokens, label) in done:
                faster = {name: done[tokens, name] / done[tokens, label] for name in DENSE if (tokens, name) in done}
                print("    " + ", ".join(f"{x:.1f}x {name}" for name, x in faster.items()), flush=True)
        del qkv
        torch.cuda.empty_cache()
    return whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check-only", action="store_true", help="no times")
    parser.add_argument("--out", type=Path, help="file to which results are appended as JSON lines")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    begin = time.perf_counter()
    passed, whole = check_all()
    print(f"checks took {time.perf_counter() - begin:.0f} s", flush=True)
    if args.check_only:
        return 0 if whole else 1
    whole &= time_all(ResultsFile(args.out, DEVICE), passed)
    print(f"all took {time.perf_counter() - begin:.0f} s", flush=True)
    return 0 if whole else 1


if __name__ == "__main__":
    raise SystemExit(main())
