"""Gate, selection and index lists in one op on a GPU: checks against torch, times, and where the time goes.

    python research/kernels/gate.py --check-only
    python research/kernels/gate.py --out research/records/h100-gate.jsonl
    python research/kernels/gate.py --forms paper --lengths 131072 --sweep     # other launches beside the chosen one
    python research/kernels/gate.py --quick --time-limit 60 --forms paper salient --lengths 131072

Kernels are compiled beforehand, by a process a core. Every form is checked first, at 4096 and at ragged lengths, from
the start of a prompt and in its middle, with every policy, and twice for equal bits. Choices may differ from those of
the torch modules only where scores are closer than what the precision of the form loses, which is measured: torch's own
products in that precision (fp32, or TF32 where a block pair has more than 8 scores) against fp64. The share of blocks
that differ and their largest distance from the edge of a choice are printed. A form that fails is not timed. Exit code
1 if anything failed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from seerattn.bench.attention import Sparse, share_of
from seerattn.bench.check import gate_scores
from seerattn.bench.inputs import Shape, random_qkv
from seerattn.bench.model import GATE_FORMS, PLAIN_FORM, layer_context, random_gate
from seerattn.bench.timing import device_time, extra_memory
from seerattn.gate import AttnGate, AttnGateConfig
from seerattn.gate_selector import GateSelector, pool
from seerattn.ops.gate_scores import triton_select
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result
from seerattn.selection import AttentionContext, BlockIndices, KeepAll, Policy, Threshold, TokenBudget, TopK, TopP
from seerattn.selection.block_indices import forced_block_mask

DEVICE = torch.device("cuda")
SHAPE = Shape()
FORMS = GATE_FORMS | {
    "queries": AttnGateConfig.paper(q_linear=True, query_subblocks=8),
    "queries-group": AttnGateConfig.paper(q_linear=True, query_subblocks=8, share="kv_group"),
    "queries-normalised": replace(PLAIN_FORM, key_subblocks=1),
}
DENSITY = 0.1
LENGTHS = [8192, 32768, 131072]
# (T, S) of the checks.
CALLS = [(4096, 4096), (1000, 1000), (333, 1000), (65, 4161)]
POLICIES = [
    TopK(density=DENSITY),
    TopK(density=0.3, rule="row_share", last_rows_dense=2, sink_blocks=2),
    TokenBudget(tokens=1024),
    Threshold(threshold=0.02),
    TopP(p=0.9),
    KeepAll(),
]
QUICK_CALLS, QUICK_POLICIES = [(4096, 4096), (333, 1000)], POLICIES[:1]
# Seconds before the end of a time limit from which on nothing new begins.
RESERVE = 5.0


class Clock:
    """Time since the start of the script; ``limit`` in seconds, 0 for none."""

    def __init__(self, limit: float) -> None:
        # The imports are most of what the process did so far.
        self._begin, self._limit = time.monotonic() - time.process_time(), limit or 1e9

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begin

    @property
    def left(self) -> float:
        return self._limit - RESERVE - self.seconds

    def over(self, what: str) -> bool:
        """Whether it is too late for something, which is then named."""
        if self.left > 0:
            return False
        print(f"left out, as the time is over: {what}", flush=True)
        return True


def compile_one(
    name: str, q_tokens: int, k_tokens: int, policy: Policy, launch: triton_select.Launch | None
) -> str | None:
    """Runs a call on zeros in a process of its own, which leaves its kernels in Triton's cache; what went wrong."""
    with torch.no_grad():
        try:
            selector = GateSelector(random_gate(FORMS[name], SHAPE, DEVICE), policy, "triton")
            batch = 2 if k_tokens == 1000 else 1
            q, k = (
                torch.zeros(batch, n, h, SHAPE.head_dim, dtype=SHAPE.dtype, device=DEVICE).transpose(1, 2)
                for n, h in ((k_tokens, SHAPE.heads), (k_tokens, SHAPE.kv_heads))
            )
            with chosen(launch):
                selector.select(q[:, :, k_tokens - q_tokens :], k, layer_context(SHAPE, k_tokens, DEVICE))
            torch.cuda.synchronize()
        except Exception as error:
            return f"{name} at {q_tokens}/{k_tokens}: {repr(error)[:160]}"
    return None


def compile_ahead(jobs: list[tuple], clock: Clock) -> None:
    """Compiles what the ``jobs``, arguments of `compile_one`, need; has to come before this process touches CUDA."""
    # Forked, so that nothing is imported again.
    with multiprocessing.get_context("fork").Pool(min(len(jobs), os.cpu_count() or 1, 16)) as pool:
        if not pool.apply(torch.cuda.is_available):
            return
        waiting = [pool.apply_async(compile_one, job) for job in jobs]
        share = clock.left / 2
        for result in waiting:
            result.wait(max(0.0, min(clock.left - share, 600.0)))
        failures = [result.get() for result in waiting if result.ready() and result.get() is not None]
    print(*failures, sep="\n", end="\n" * bool(failures))
    print(f"compiled in {clock.seconds:.0f} s", flush=True)


@contextmanager
def chosen(launch: triton_select.Launch | None) -> Iterator[None]:
    """Lets calls use this launch instead of the chosen one."""
    if launch is None:
        yield
    else:
        with mock.patch.object(triton_select, "choose_launch", lambda *_, **__: launch):
            yield


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def planes(config: AttnGateConfig) -> int:
    return triton_select.choose_launch(config, num_q_blocks=64, gate_width=128).planes


def inputs(q_tokens: int, k_tokens: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Queries and keys in the memory layout of a model, as they are after RoPE."""
    rows = [random_qkv(SHAPE, k_tokens, DEVICE, seed=seed, drift=1.0) for seed in range(batch)]
    q, k = (torch.cat([row[i] for row in rows]) for i in range(2))
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    return q[:, :, k_tokens - q_tokens :], k


def rounding(gate: AttnGate) -> float:
    """Largest error of the block scores of torch in the precision of the form, against fp64."""
    context = layer_context(SHAPE, 4096, DEVICE)
    q, k = (context.unrotate(x, 0) for x in inputs(4096, 4096))
    exact = gate_scores(gate, q.double(), k.double())
    with tf32(planes(gate.config) == 1):
        scores = gate(q, k)[0]
    real = exact.squeeze(0).isfinite()
    return float((scores.squeeze(0) - exact.squeeze(0))[real].abs().max())


def compare(gate: AttnGate, policy: Policy, q_tokens: int, k_tokens: int, batch: int) -> tuple[float, float]:
    """Share of blocks that are chosen otherwise than by torch, and how far from the edge of the choice they score.

    Raises:
        AssertionError: two runs differ, or lists are malformed.
    """
    q, k = inputs(q_tokens, k_tokens, batch)
    context = layer_context(SHAPE, k_tokens, DEVICE)
    expected = GateSelector(gate, policy, "reference").select(q, k, context)
    got, again = (GateSelector(gate, policy, "triton").select(q, k, context) for _ in range(2))
    assert torch.equal(got.indices, again.indices) and torch.equal(got.counts, again.counts), "two runs differ"
    want, have = expected.to_mask(), got.to_mask()
    assert torch.equal(have.sum(-1).int(), got.counts), "counts are not those of the lists"
    steps = got.indices.diff(dim=-1)
    assert bool(((steps > 0) | (got.indices[..., 1:] == -1)).all()), "lists do not ascend"
    start = k_tokens - q_tokens
    scores = gate(context.unrotate(q, start), context.unrotate(k, 0))
    missed, extra = want & ~have, have & ~want
    # The lowest score that torch keeps for its height, and the highest that it leaves out.
    forced = forced_block_mask(start, q_tokens, *scores.shape[2:], gate.config.block_q, gate.config.block_k)
    free = want & ~forced[:, None].to(DEVICE) & (scores != -torch.inf)
    kept = scores.masked_fill(~free, torch.inf).amin(-1, keepdim=True)
    left = scores.masked_fill(want, -torch.inf).amax(-1, keepdim=True)
    gap = torch.where(missed, scores - kept, torch.where(extra, left - scores, 0.0))
    return float((missed | extra).sum() / want.sum()), float(gap.max())


def check(name: str, gate: AttnGate, calls: list[tuple[int, int]], policies: list[Policy]) -> None:
    """Raises AssertionError with what is wrong."""
    error = rounding(gate)
    # Two scores, each off by up to twice the error of torch; torch's own fp32 scores stand in for the exact ones.
    bound = 4 * error + 2 * torch.finfo(torch.float32).eps * 16
    worst, shares = 0.0, []
    for q_tokens, k_tokens in calls:
        for policy in policies:
            share, gap = compare(gate, policy, q_tokens, k_tokens, batch=2 if k_tokens == 1000 else 1)
            assert gap <= bound, (
                f"{policy} at {q_tokens}/{k_tokens}: gap {gap:.1e} above {bound:.1e}, share {share:.1e}"
            )
            worst, shares = max(worst, gap), [*shares, share]
    print(f"ok {name}: {max(shares):.1e} of the kept blocks differ, gap {worst:.1e}, bound {bound:.1e}", flush=True)


def check_pooling() -> None:
    """Pooled features for training against torch."""
    context = layer_context(SHAPE, 3000, DEVICE)
    q, _ = inputs(3000, 3000)
    salience = torch.randn(SHAPE.heads, SHAPE.head_dim, device=DEVICE) * SHAPE.head_dim**-0.5
    # A logit is off by roundings of the product of the lengths of token and salience, a weight by twice that.
    loss = 2 * float(q.float().norm(dim=-1).max() * salience.norm(dim=-1).max())
    for size in (8, 64):
        arguments = {"start": 0, "size": size, "kinds": ("salient", "avg", "max", "min"), "salience": salience}
        expected, got = (pool(q, context, impl=impl, **arguments).features for impl in ("reference", "triton"))
        rounding = 8 * torch.finfo(torch.float32).eps * float(expected.abs().max())
        bounds = {"salient": rounding * (1 + loss), "others": rounding}
        errors = (expected - got).abs().tensor_split([SHAPE.head_dim], dim=-1)
        for (kinds, bound), error in zip(bounds.items(), errors):
            assert error.max() <= bound, f"{kinds}, windows of {size}: error {error.max():.1e} above {bound:.1e}"
            print(f"ok pooled features, {kinds}, {size}: error {error.max():.1e}, bound {bound:.1e}", flush=True)


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """The call as replays of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def parts(run: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of every kernel of a call, the mean of five."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(5):
            run()
        torch.cuda.synchronize()
    return {e.key[:28]: round(e.device_time_total / 5e3, 4) for e in seen.key_averages() if e.device_time_total > 0}


def launches(config: AttnGateConfig, tokens: int) -> dict[str, triton_select.Launch]:
    """The chosen launch and others around it, one change at a time."""
    blocks = -(-tokens // config.block_q)
    base = triton_select.choose_launch(config, num_q_blocks=blocks, gate_width=128)
    changes: list[dict[str, int | None]] = [{}]
    changes += [{"windows_q": n} for n in (16, 32, 64, 128)]
    changes += [{"windows_k": n} for n in (64, 128)]
    changes += [{"num_warps": 4}, {"num_warps": 8}, {"num_warps": 4, "windows_q": 64, "programs": 2, "num_stages": 2}]
    changes += [{"num_stages": n} for n in (2, 3, 4)] + [{"programs": n} for n in (1, 2, 3)]
    changes += [{"programs": 3, "registers": 168, "num_stages": 2}, {"programs": 4, "registers": 128, "num_stages": 2}]
    changes += [{"num_warps": 8, "programs": 1}, {"planes": 1}, {"planes": 2, "windows_k": 64}]
    changes += [{"pool_step": n} for n in (1, 2, 4)] + [{"pool_stages": n} for n in (3, 5, 8)]
    changes += [{"pool_programs": n} for n in (1, 2, 3, 4)] + [{"pool_windows": n} for n in (16, 32, 64, 128)]
    changes += [{"pool_step": 2, "pool_programs": 3, "pool_stages": 4}]
    found: dict[triton_select.Launch, str] = {}
    for change in changes:
        launch = replace(base, **change)
        if launch.windows_q >= config.query_subblocks:
            found.setdefault(launch, ", ".join(f"{k}={v}" for k, v in change.items()) or str(base))
    return {name: launch for launch, name in found.items()}


def sweep(name: str, gate: AttnGate, tokens: int, clock: Clock) -> None:
    """Times of other launches, split by kernel, fastest first; for choosing one."""
    q, k = inputs(tokens, tokens)
    context = layer_context(SHAPE, tokens, DEVICE)
    selector = GateSelector(gate, TopK(density=DENSITY), "triton")
    base, rows = selector.select(q, k, context), []
    for label, launch in launches(gate.config, tokens).items():
        if clock.over(f"{name} at {tokens}, {label}"):
            continue
        with chosen(launch):
            run = lambda: selector.select(q, k, context)  # noqa: E731
            try:
                blocks = run()
                times = parts(run)
            except Exception as error:
                print(f"  left out {label}: {str(error).splitlines()[0][:120]}", flush=True)
                continue
        same = torch.equal(blocks.counts, base.counts)
        share = float((blocks.indices != base.indices).float().mean()) if same else 1.0
        rows.append((sum(times.values()), times, share, label))
    print(f"{name} at {tokens}: total ms, by kernel, entries unlike the chosen launch")
    for total, times, share, label in sorted(rows, key=lambda row: row[0]):
        print(f"  {total:.3f} {times} {share:.1e} {label}", flush=True)


def measure(file: ResultsFile, name: str, gate: AttnGate, context: AttentionContext, q: Tensor, k: Tensor) -> str:
    """Times of one form at one length, written down; a line for people."""
    tokens, c = q.shape[2], gate.config
    selector = GateSelector(gate, TopK(density=DENSITY), "triton")

    def run() -> BlockIndices:
        return selector.select(q, k, context)

    realised = float(run().density().mean())
    times = {"eager": device_time(run, DEVICE), "graph": device_time(graphed(run), DEVICE)}
    memory = extra_memory(lambda: run().indices, DEVICE) / 2**20
    cell = {"impl": "triton", "device": torch.cuda.get_device_name(), "dtype": SHAPE.dtype_name}
    cell |= Sparse("triton", c.block_q, c.block_k, share_of(c)).cell(SHAPE)
    for how, timing in times.items():
        file.setdefault(
            Result(
                what="selection_ms",
                unit="runs",
                model=str(SHAPE),
                method="gate",
                kind="learned",
                name=name,
                settings=selector.policy.to_dict(),
                density=DENSITY,
                realised_density=realised,
                context=tokens,
                text="random",
                seed=0,
                cell=cell | {"launch": how},
                **timing.fields(),
            )
        )
    return (
        f"{name:<20}{tokens:>8}{times['eager'].median:>9.3f}{times['graph'].median:>9.3f}{memory:>9.1f}  {parts(run)}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS), help="forms of gates")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens")
    parser.add_argument("--check-only", action="store_true", help="compare with torch and stop")
    parser.add_argument("--sweep", action="store_true", help="time other launches instead of the chosen one")
    parser.add_argument("--quick", action="store_true", help="check with top-k at two lengths only")
    parser.add_argument("--time-limit", type=float, default=0, help="seconds for all of it; 0 for no limit")
    parser.add_argument("--out", type=Path, help="file to which the rows are appended as JSON lines")
    args = parser.parse_args()
    clock = Clock(args.time_limit)
    calls, policies = (QUICK_CALLS, QUICK_POLICIES) if args.quick else (CALLS, POLICIES)
    timed = [] if args.check_only else [(name, n) for n in args.lengths for name in args.forms]
    jobs = [(name, n, n, TopK(density=DENSITY), None) for name, n in timed]
    jobs += [(name, *call, policy, None) for name in args.forms for call in calls for policy in policies]
    if args.sweep:
        jobs += [
            (name, n, n, TopK(density=DENSITY), launch)
            for name, n in timed
            for launch in list(launches(FORMS[name], n).values())[1:]
        ]
    compile_ahead(jobs, clock)
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    torch.set_grad_enabled(False)
    file = ResultsFile(args.out, DEVICE)
    gates, failed, lines = {}, False, []
    for name in args.forms:
        if clock.over(f"checks of {name}"):
            continue
        gate = random_gate(FORMS[name], SHAPE, DEVICE)
        try:
            check(name, gate, calls, policies)
            gates[name] = gate
        except Exception:
            # A form that fails must not cost the others their turn.
            failed = True
            print(f"FAILED {name}\n{traceback.format_exc()[-1500:]}", flush=True)
    try:
        check_pooling()
    except Exception:
        failed = True
        print(f"FAILED pooled features\n{traceback.format_exc()[-1500:]}", flush=True)
    if args.check_only:
        return failed
    print(f"checked in {clock.seconds:.0f} s", flush=True)
    for tokens in args.lengths:
        if clock.over(f"{tokens} tokens"):
            continue
        q, k = inputs(tokens, tokens)
        context = layer_context(SHAPE, tokens, DEVICE)
        for name, gate in gates.items():
            if clock.over(f"{name} at {tokens}"):
                continue
            try:
                if args.sweep:
                    sweep(name, gate, tokens, clock)
                else:
                    lines.append(measure(file, name, gate, context, q, k))
                    print(lines[-1], flush=True)
            except Exception:
                failed = True
                print(f"FAILED {name} at {tokens}\n{traceback.format_exc()[-1500:]}", flush=True)
    if lines:
        print(f"\n{'form':<20}{'tokens':>8}{'ms':>9}{'graph':>9}{'MiB':>9}  by kernel", *lines, sep="\n")
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
