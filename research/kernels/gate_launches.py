"""Forms of gates by launches: the time of gate, selection and lists, and of each kernel, checked in the same run.

    python research/kernels/gate_launches.py --time-limit 100 --out rows.jsonl
    python research/kernels/gate_launches.py --cases 131072:8x8:chosen,narrow 8192:4x8-salient/smollm2:chosen
    TRITON_INTERPRET=1 python research/kernels/gate_launches.py --rehearse     # tiny, on a CPU, to the very end

A case is a length, a form and launches; "chosen" is the launch that a call takes. Kernels are compiled beforehand, by a
process a core. Every launch is checked on the call that is timed: a few query blocks, the first and the last among
them, are scored by the torch modules, and no block that was left out may outscore one that was kept by more than what
torch itself loses in the precision of the form against fp64; lists must ascend and be as long as the rule says, and two
runs equal bit by bit. Times are medians of CUDA events with the work queued ahead of the device, so that no launch is
waited for; "no choice" is the same call where all rows keep one block and nothing is sought. The L2 cache is as the
last run left it, unlike in `research/kernels/gate.py`, which matters for short prompts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from torch import Tensor

from seerattn.bench.attention import share_of
from seerattn.bench.inputs import Shape, random_qkv
from seerattn.bench.model import PLAIN_FORM, SALIENT, layer_context, random_gate
from seerattn.gate import AttnGate, AttnGateConfig
from seerattn.gate_selector import GateSelector
from seerattn.ops.gate_scores import triton_select
from seerattn.ops.gate_scores.triton_select import Launch
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result
from seerattn.selection import AttentionContext, BlockIndices, TokenBudget, TopK
from seerattn.selection.block_indices import forced_block_mask

SHAPES = {"llama": Shape(), "smollm2": Shape(heads=9, kv_heads=3, head_dim=64), "tiny": Shape(4, 2, 32, torch.float32)}
POLICY = TopK(density=0.1)
KERNELS = ("halve_kernel", "vectors_kernel", "score_and_choose_kernel")
PARTS = ("halve", "vectors", "score_and_choose", "no choice")
ROWS = 8  # query blocks that are checked

SHARED = {"share": "kv_group"}
ONE_SALIENT = {"q_pooling": ("salient",), "k_pooling": SALIENT}
SUM = {"target_keys": "sum", "target_power": 2}


def form(name: str) -> AttnGateConfig:
    """A form by its name: sub-blocks, then any of "group", "salient" and "sum"."""
    sizes, *changes = name.split("-")
    pieces = dict(zip(("query_subblocks", "key_subblocks"), map(int, sizes.split("x"))))
    options = {"group": SHARED, "salient": ONE_SALIENT, "sum": SUM}
    return replace(PLAIN_FORM, **pieces, **{k: v for change in changes for k, v in options[change].items()})


TWO = Launch(128, 128, 8, 2, 2, 1, registers=128)
LAUNCHES: dict[str, Launch] = {
    "one": Launch(128, 128, 8, 3, 1, 1),
    "two-p4": replace(TWO, pool_programs=4, pool_registers=128),
    "two-r168": replace(TWO, pool_programs=3, pool_registers=168),
    "narrow": Launch(128, 64, 4, 2, 2, 1, pool_programs=4, pool_registers=128, pool_windows=32),
    "small-three": Launch(64, 128, 4, 2, 3, 1, registers=168, pool_programs=3, pool_stages=3),
    "tiny": Launch(64, 64, 4, 2, 2, 1, pool_step=8),
}
CASES = (
    "131072:8x8:one,two-p4,narrow",
    "131072:8x8-salient-sum:one,two-p4",
    "131072:4x8-salient-sum:two-p4",
    "131072:8x8-salient-sum-group:two-r168",
    "131072:4x8-salient-sum-group:two-r168",
    "131072:8x8-sum:two-p4",
    "32768:8x8-salient-sum:one,two-p4",
    "8192:8x8-salient-sum:one,two-p4",
    "8192:16x16-salient-sum/smollm2:one,small-three",
    "8192:8x8-salient-sum/smollm2:one,small-three",
)
REHEARSAL = ("192:4x4/tiny:chosen,tiny", "200:2x8-salient-group/tiny:tiny", "256:8x8-sum/tiny:tiny")


@dataclass(frozen=True)
class Case:
    """One form at one length, by some launches."""

    tokens: int
    name: str
    shape: Shape
    launches: tuple[str, ...]

    @property
    def form(self) -> AttnGateConfig:
        return form(self.name)


def parse(text: str) -> Case:
    tokens, name, launches = text.split(":")
    name, _, shape = name.partition("/")
    return Case(int(tokens), name, SHAPES[shape or "llama"], tuple(launches.split(",")))


@contextmanager
def launched(name: str):
    """Calls take this launch."""
    if name == "chosen":
        yield
        return
    with mock.patch.object(triton_select, "choose_launch", lambda *_, **__: LAUNCHES[name]):
        yield


def inputs(case: Case, device: torch.device, *, zeros: bool = False) -> tuple[Tensor, Tensor, AttentionContext]:
    """Queries and keys in the memory layout of a model, as they are after RoPE."""
    shape = case.shape
    if zeros:
        q, k = (torch.zeros(1, case.tokens, h, shape.head_dim, dtype=shape.dtype, device=device).transpose(1, 2)
                for h in (shape.heads, shape.kv_heads))  # fmt: skip
    else:
        q, k, _ = random_qkv(shape, case.tokens, device, seed=1, drift=1.0)
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    return q, k, layer_context(shape, case.tokens, device)


def compile_one(text: str, launch: str) -> str | None:
    """Runs a call on zeros in a process of its own, which leaves its kernels in Triton's cache; what went wrong."""
    case, device = parse(text), torch.device("cuda")
    with torch.no_grad():
        try:
            q, k, context = inputs(case, device, zeros=True)
            with launched(launch):
                for policy in (POLICY, TokenBudget(tokens=case.form.block_k)):
                    GateSelector(random_gate(case.form, case.shape, device), policy, "triton").select(q, k, context)
            torch.cuda.synchronize()
        except Exception as error:
            return f"{text} {launch}: {repr(error)[:200]}"
    return None


def compile_ahead(jobs: list[tuple[str, str]], seconds: float) -> None:
    """Compiles what the jobs need; has to come before this process touches CUDA."""
    # Forked, so that nothing is imported again.
    with multiprocessing.get_context("fork").Pool(min(len(jobs), os.cpu_count() or 1, 16), maxtasksperchild=4) as pool:
        if not pool.apply(torch.cuda.is_available):
            return
        begin = time.monotonic()
        waiting = [pool.apply_async(compile_one, job) for job in jobs]
        for result in waiting:
            result.wait(max(0.0, seconds - (time.monotonic() - begin)))
        said = [result.get() for result in waiting if result.ready() and result.get()]
    print(*said, sep="\n", end="\n" * bool(said))
    print(f"compiled {len(jobs)} launches in {time.monotonic() - begin:.0f} s", flush=True)


class Marked:
    """A kernel with events around its launches."""

    def __init__(self, kernel: object, marks: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> None:
        self._kernel, self._marks = kernel, marks

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        def launch(*args: object, **kwargs: object) -> None:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            self._kernel[grid](*args, **kwargs)
            end.record()
            self._marks.append((begin, end))

        return launch


def timed(run: Callable[[], object], device: torch.device, budget_ms: float) -> tuple[list[float], dict[str, float]]:
    """Milliseconds of every run, and the median of each kernel."""
    run()
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return [1e3 * (time.perf_counter() - begin)], {}
    torch.cuda.synchronize()
    marks: dict[str, list] = {name: [] for name in KERNELS}
    whole, runs = [], 3
    with mock.patch.multiple(
        triton_select, **{name: Marked(getattr(triton_select, name), marks[name]) for name in KERNELS}
    ):
        while len(whole) < runs:
            # The device waits while the host launches all of it.
            torch.cuda._sleep(3_000_000)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            whole.append(begin.elapsed_time(end))
            if len(whole) == 3:
                runs = int(max(5, min(40, budget_ms / max(median(whole), 1e-3))))
    parts = {}
    for name, pairs in marks.items():
        per_run = len(pairs) // runs
        sums = [sum(a.elapsed_time(b) for a, b in pairs[i * per_run : (i + 1) * per_run]) for i in range(runs)]
        parts[name.removesuffix("_kernel")] = round(median(sums), 4)
    return whole, parts


class Oracle:
    """Scores of some query blocks by torch, in fp32 and as exact as the check needs."""

    def __init__(self, case: Case, gate: AttnGate, q: Tensor, k: Tensor, context: AttentionContext) -> None:
        c = case.form
        blocks = -(-case.tokens // c.block_q)
        picked = {0, 1, blocks - 1, *(round(i * (blocks - 1) / (ROWS - 2)) for i in range(ROWS - 1))}
        self.rows = torch.tensor(sorted(row for row in picked if 0 <= row < blocks))
        here = self.rows.to(q.device)
        q, k = context.unrotate(q, 0), context.unrotate(k, 0)
        self.scores = gate(q, k, rows=self.rows)[0]
        tf32 = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        coarse = gate(q, k, rows=self.rows)[0]
        torch.backends.cuda.matmul.allow_tf32 = tf32
        real = self.scores.isfinite()
        # On a CPU nothing is TF32: a rounding to its 11 bits of all parts of the largest score stands in.
        error = float((coarse - self.scores)[real].abs().max()) or 2.0**-10 * float(self.scores[real].abs().max())
        self.bound = 4 * error
        geometry = {"q_start": 0, "q_len": case.tokens, "block_q": c.block_q, "block_k": c.block_k}
        blank = torch.zeros(1, 1, blocks, -(-case.tokens // c.block_k))
        blank += torch.arange(blank.shape[-1])  # all of them different
        self.counts = POLICY.select(blank, **geometry).counts[0, 0].to(q.device)
        forced = forced_block_mask(0, case.tokens, blocks, blank.shape[-1], c.block_q, c.block_k)
        self.forced = forced[0].to(q.device)[here]
        self.here = here

    def check(self, got: BlockIndices) -> tuple[float, float]:
        """Share of kept free blocks that torch would exchange, and the largest distance in score.

        Raises:
            AssertionError: with what is wrong.
        """
        assert torch.equal(got.counts, self.counts.expand_as(got.counts)), "counts are not those of the rule"
        steps = got.indices.diff(dim=-1)
        assert bool(((steps > 0) | (got.indices[..., 1:] == -1)).all()), "lists do not ascend"
        lists = got.indices[0][:, self.here].long()  # [H, rows, K]
        kept = torch.zeros(*lists.shape[:2], self.scores.shape[-1] + 1, dtype=torch.bool, device=lists.device)
        kept = kept.scatter_(-1, lists.masked_fill(lists < 0, kept.shape[-1] - 1), True)[..., :-1]
        assert torch.equal(kept.sum(-1).int(), got.counts[0][:, self.here]), "counts are not those of the lists"
        assert bool((kept | ~self.forced).all()), "a forced block is missing"
        free = kept & ~self.forced
        worst = self.scores.masked_fill(~free, torch.inf).amin(-1, keepdim=True)
        best = self.scores.masked_fill(kept, -torch.inf).amax(-1, keepdim=True)
        gap = float((best - worst).clamp(min=0.0).max())
        assert gap <= self.bound, f"a block that was left out outscores a kept one by {gap:.1e}, above {self.bound:.1e}"
        return float((free & (self.scores < best)).sum() / free.sum().clamp(min=1)), gap


@dataclass(frozen=True)
class Measured:
    """Times of one launch, and how it was checked."""

    ms: list[float]
    parts: dict[str, float]
    exchanged: float
    gap: float
    bound: float
    density: float

    def result(self, case: Case, launch: str, device: torch.device) -> Result:
        c, shape = case.form, case.shape
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        cell = {"impl": "triton", "device": name, "dtype": shape.dtype_name, "launch": launch}
        cell |= {"configuration": str(LAUNCHES.get(launch, launch)), "block_q": c.block_q, "block_k": c.block_k}
        samples = {"quantiles": [0.0, 0.5, 1.0], "ms": [min(self.ms), median(self.ms), max(self.ms)]}
        samples |= {name: [value] for name, value in self.parts.items()}
        samples |= {"exchanged": [self.exchanged], "gap": [self.gap], "bound": [self.bound]}
        return Result(
            what="gate_launch_ms",
            value=round(median(self.ms), 4),
            n=len(self.ms),
            unit="runs",
            model=str(shape),
            method="gate",
            kind="learned",
            name=case.name,
            settings=POLICY.to_dict(),
            density=POLICY.density,
            realised_density=self.density,
            context=case.tokens,
            text="random",
            seed=1,
            cell=cell | {"share": share_of(c)},
            samples=samples,
        )

    def line(self, case: Case, launch: str) -> str:
        """For people: the case, milliseconds, and the check."""
        times = [median(self.ms), *(self.parts.get(name, 0.0) for name in PARTS)]
        numbers = "".join(f"{x:>10.3f}" for x in times) + "".join(
            f"{x:>10.1e}" for x in (self.exchanged, self.gap, self.bound)
        )
        return f"{case.tokens:>7} {case.name:<22}{case.shape.head_dim:>4} {launch:<12}{numbers}"


def measure(
    case: Case, launch: str, gate: AttnGate, oracle: Oracle, tokens: tuple[Tensor, Tensor, AttentionContext],
    budget_ms: float,
) -> Measured:  # fmt: skip
    """Checks and times one launch.

    Raises:
        AssertionError: the check has failed; with what is wrong.
    """
    device = tokens[0].device
    policies = (POLICY, TokenBudget(tokens=case.form.block_k))
    select, keep_one = (GateSelector(gate, policy, "triton").select for policy in policies)
    with launched(launch):
        got, again = select(*tokens), select(*tokens)
        assert torch.equal(got.indices, again.indices), "two runs differ"
        share, gap = oracle.check(got)
        density = float(got.density().mean())
        del got, again
        whole, parts = timed(lambda: select(*tokens), device, budget_ms)
        _, without = timed(lambda: keep_one(*tokens), device, budget_ms / 4)
    if without:
        parts["no choice"] = without["score_and_choose"]
    return Measured(whole, parts, share, gap, oracle.bound, density)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="tokens:form[/shape]:launch,launch")
    parser.add_argument("--rehearse", action="store_true", help="tiny cases on a CPU")
    parser.add_argument("--time-limit", type=float, default=0, help="seconds for all of it; 0 for no limit")
    parser.add_argument("--budget-ms", type=float, default=120.0, help="of timed runs, for each launch")
    parser.add_argument("--out", type=Path, help="file of results that is appended to")
    args = parser.parse_args()
    # The imports are most of what the process did so far.
    begin = time.monotonic() - time.process_time()
    cases = list(REHEARSAL) if args.rehearse else args.cases
    limit = args.time_limit or 1e9
    if not args.rehearse:
        compile_ahead([(text, launch) for text in cases for launch in parse(text).launches], limit * 0.6)
        if not torch.cuda.is_available():
            parser.error("this benchmark needs a CUDA device, or --rehearse")
    device = torch.device("cpu" if args.rehearse else "cuda")
    torch.set_grad_enabled(False)
    file = ResultsFile(args.out, device)
    failed, lines = False, []
    for text in cases:
        case = parse(text)
        gate, oracle = random_gate(case.form, case.shape, device), None
        for launch in case.launches:
            if time.monotonic() - begin > limit - 4:
                print(f"left out, the time is up: {text} {launch}", flush=True)
                continue
            try:
                if oracle is None:
                    tokens = inputs(case, device)
                    oracle = Oracle(case, gate, *tokens)
                measured = measure(case, launch, gate, oracle, tokens, args.budget_ms)
            except Exception:
                failed = True
                print(f"FAILED {text} {launch}\n{traceback.format_exc()[-800:]}", flush=True)
                continue
            file.append(measured.result(case, launch, device))
            lines.append(measured.line(case, launch))
            print(lines[-1], flush=True)
    head = "".join(f"{name:>10}" for name in ("ms", *PARTS, "exchanged", "gap", "bound"))
    head = head.replace("score_and_choose", "    scores")
    print(f"\n{'tokens':>7} {'form':<22}{'D':>4} {'launch':<12}{head}", *lines, sep="\n")
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
