"""One token over lists, how they are chosen, and prompts over pages: checked, then timed beside what PyTorch has.

    python research/kernels/decode.py --out rows.jsonl                    # all of it, some minutes
    python research/kernels/decode.py --parts decode --launches --out rows.jsonl  # launches of the decode kernel
    TRITON_INTERPRET=1 python research/kernels/decode.py --rehearse       # tiny, on a CPU, to the very end

Nothing is timed before it was compared: decoding with fp64, prompts in pages with the kernel in one piece, bit for bit,
chosen blocks with fp64 scores.
A time of decoding is that of a CUDA graph of many calls, divided by their number, so the host is not in it and what
lies between the two kernels is. Calls go round through lists and copies of the cache that are larger than the L2
cache. What counts as read are listed keys and values, queries and outputs; the share is that of the nominal 4.8 TB/s of
an H200, where a copy reaches about .9. Density 1.00 is full lists; "all" has no lists.
64 query heads over 8 KV heads of 128, bf16, for decoding, and 32 over 8 for prompts.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from decode_select import lines, measure_select

from seerattn.bench.dense import sdpa_backend
from seerattn.bench.inputs import Shape, random_blocks, random_lists, random_qkv
from seerattn.bench.session import CheckFailed, Session
from seerattn.bench.timing import device_time, graph_time
from seerattn.ops.block_sparse_attention import block_sparse_attention, triton_kernel
from seerattn.ops.decode_attention import decode_attention, triton_split
from seerattn.ops.paged_attention import paged_attention
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result
from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.decode_blocks import DecodeBlocks

PARTS = ("decode", "prompts", "select")
BLOCK = 64
NOMINAL = 4.8e12
# Calls of a graph read more than this together before one reads again what another one did.
COLD_BYTES = 200e6
# Keys of a step, warps, stages, programs of a multiprocessor.
LAUNCHES = [(64, 4, 4, 2), (64, 4, 3, 2), (64, 4, 3, 3), (64, 4, 2, 4), (64, 4, 5, 1), (64, 8, 4, 2), (64, 2, 4, 2)]
LAUNCHES += [(64, 2, 3, 3), (32, 4, 4, 4), (32, 4, 6, 2)]
# Of prompts in pages: rows, keys, warps, stages, registers.
PAGED_LAUNCHES = {
    "group": [(128, 64, 8, 2, 128), (128, 64, 8, 2, None), (128, 64, 8, 3, 128), (64, 64, 4, 2, 128), (64, 64, 4, 2)],
    "head": [(64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 2, 128), (64, 64, 4, 3), (64, 64, 8, 2)],
}


class Caches(NamedTuple):
    """Copies of a cache, all of which a call may read."""

    k: list[Tensor]
    v: list[Tensor]
    table: Tensor | None


def make_caches(shape: Shape, batch: int, tokens: int, page: int | None, device: torch.device, copies: int) -> Caches:
    """Random keys and values in one piece, or in pages as vLLM 0.32 has them, in a random order."""
    generator = torch.Generator(device).manual_seed(batch)

    def draw(*size: int) -> Tensor:
        x = torch.empty(size, dtype=shape.dtype, device=device)
        for part in x.view(-1).split(1 << 28):  # as a draw of many gigabytes needs more of them
            part.normal_(generator=generator)
        return x

    if page is None:
        size = (batch, shape.kv_heads, tokens, shape.head_dim)
        return Caches([draw(*size) for _ in range(copies)], [draw(*size) for _ in range(copies)], None)
    pages = batch * -(-tokens // page)
    storage = [draw(pages, shape.kv_heads, page, 2 * shape.head_dim) for _ in range(copies)]
    table = torch.randperm(pages, device=device, generator=generator).to(torch.int32).view(batch, -1)
    k, v = zip(*(x.transpose(1, 2).split(shape.head_dim, -1) for x in storage))
    return Caches(list(k), list(v), table)


@contextmanager
def decode_launched(launch: tuple[int, int, int, int] | None, device: torch.device) -> Iterator[list[int]]:
    """Calls take this launch; the splits of every call are noted."""
    noted: list[int] = []
    choose = triton_split.choose_launch

    def chosen(**sizes: int) -> triton_split.Launch:
        found = choose(**sizes)
        if launch is not None:
            keys, warps, stages, per_sm = launch
            steps = sizes["width"] * (sizes["block_k"] // keys)
            splits = triton_split.choose_splits(sizes["lists"], steps, sizes["multiprocessors"] * per_sm)
            found = triton_split.Launch(keys, warps, stages, splits)
        noted.append(found.splits)
        return found

    with mock.patch.object(triton_split, "choose_launch", chosen):
        yield noted


def masked_decode(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """``[B, H, D]`` from all keys ``[B, HKV, S, D]``, masked by bool ``[B, HKV, S]``; softmax in fp32 or better."""
    queries = q.unflatten(1, (k.shape[1], -1))
    scores = (queries @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[2] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, k.shape[1], -1, 1)
        scores = torch.cat((scores, sink.expand(*scores.shape[:3], 1)), -1)
    # A row that sees nothing has weights of NaN.
    return (scores.softmax(-1)[..., : k.shape[2]].nan_to_num(0.0).to(q.dtype) @ v).flatten(1, 2)


def check_decode(
    shape: Shape, device: torch.device, page: int | None, listed: bool, extra: bool
) -> tuple[float, float]:
    """Error and bound of one token against fp64, over random lists or all keys of odd lengths, one of them 0."""
    lengths, tokens = torch.tensor([1000, 0, 777, 64, 1], dtype=torch.int32, device=device), 1024
    k, v, table = make_caches(shape, len(lengths), tokens, page, device, 1)
    q = torch.randn(len(lengths), shape.heads, shape.head_dim, dtype=shape.dtype, device=device)
    lists, seen = None, torch.arange(tokens, device=device) < lengths[:, None, None]
    seen = seen.expand(-1, shape.kv_heads, -1)
    if listed:
        lists = random_lists(shape, lengths, tokens, block_k=BLOCK, density=0.3, seed=1)
        number = tokens // BLOCK
        mask = torch.zeros(*lists.indices.shape[:2], number + 1, dtype=torch.bool, device=device)
        mask.scatter_(-1, lists.indices.long().masked_fill(lists.indices < 0, number), True)
        seen = seen & mask[..., :number].repeat_interleave(BLOCK, -1)
    options: dict[str, Any] = {}
    if extra:
        options = {"softcap": 20.0, "sinks": torch.linspace(-2, 3, shape.heads, device=device)}
    call = {"lengths": lengths, "blocks": lists, "block_table": table, "impl": "triton"} | options
    out = decode_attention(q, k[0], v[0], **call)
    if not torch.equal(out, decode_attention(q, k[0], v[0], **call)):
        return torch.inf, 0.0
    rows = [x[0] if table is None else x[0][table.long()].flatten(1, 2)[:, :tokens].transpose(1, 2) for x in (k, v)]
    exact = masked_decode(q.double(), *(x.double() for x in rows), seen, **options)
    own = float((masked_decode(q, *rows, seen, **options).double() - exact).abs().max())
    bound = 2 * own + torch.finfo(shape.dtype).eps / 2 * float(exact.abs().max())
    return float((out.double() - exact).abs().max()), bound


class Decode:
    """The times of one token at a batch and a length."""

    def __init__(self, session: Session, shape: Shape, batch: int, tokens: int, page: int | None) -> None:
        self.session, self.shape, self.batch, self.tokens, self.page = session, shape, batch, tokens, page
        device = session.device
        self.cache_bytes = 2 * batch * shape.kv_heads * tokens * shape.head_dim * shape.dtype.itemsize
        copies = max(1, min(8, -(-int(COLD_BYTES) // self.cache_bytes)))
        self.caches = make_caches(shape, batch, tokens, page, device, copies if device.type == "cuda" else 1)
        self.lengths = torch.full((batch,), tokens, dtype=torch.int32, device=device)
        self.q = torch.randn(batch, shape.heads, shape.head_dim, dtype=shape.dtype, device=device)

    def sparse(self, density: float | None, launch: tuple[int, int, int, int] | None = None) -> Result | None:
        """The kernel at a density; without one it has no lists."""
        read = self.cache_bytes
        lists: list[DecodeBlocks | None] = [None]
        copies = len(self.caches.k)
        if density is not None:
            shape, device = self.shape, self.session.device
            first = random_lists(shape, self.lengths, self.tokens, block_k=BLOCK, density=density)
            listed = int(first.counts.sum()) * BLOCK * 2 * shape.head_dim * shape.dtype.itemsize
            read = min(read, listed)
            number = max(copies, min(96, -(-int(COLD_BYTES) // read))) if device.type == "cuda" else 1
            lists = [first] + [
                random_lists(shape, self.lengths, self.tokens, block_k=BLOCK, density=density, seed=i)
                for i in range(1, number)
            ]

        def call(i: int) -> Callable[[], object]:
            k, v = self.caches.k[i % copies], self.caches.v[i % copies]
            blocks, table, lengths = lists[i % len(lists)], self.caches.table, self.lengths
            arguments = {"lengths": lengths, "blocks": blocks, "block_table": table, "impl": "triton"}
            return lambda: decode_attention(self.q, k, v, **arguments)

        def run() -> dict[str, Any]:
            name = f"decode, page {self.page}, {'all' if density is None else 'lists'}" + (
                f", {launch}" if launch else ""
            )
            with decode_launched(launch, self.session.device) as splits:
                for extra in (False, True) if launch is None else (False,):
                    check = (self.shape, self.session.device, self.page, density is not None, extra)
                    said = f"{name}{', softcap and sinks' if extra else ''}"
                    self.session.check(said, lambda check=check: check_decode(*check))
                fields = graph_time([call(i) for i in range(max(copies, len(lists)))], self.session.device).fields()
            fields["samples"]["splits"] = [splits[-1]]
            return self._with_bytes(fields, read) | {"realised_density": read / self.cache_bytes}

        about = {"page": self.page or 0} | ({} if launch is None else {"launch": str(launch)})
        about |= {"lists": density is not None}
        return self._measured("triton", run, about, density=density)

    def sdpa(self, backend: str) -> Result | None:
        """PyTorch's attention over all keys."""

        def call(k: Tensor, v: Tensor) -> Callable[[], Tensor]:
            return lambda: F.scaled_dot_product_attention(self.q[:, :, None], k, v, enable_gqa=True)

        def run() -> dict[str, Any]:
            with sdpa_backend(backend, self.session.device):
                try:
                    first = call(self.caches.k[0], self.caches.v[0])()[:, :, 0]
                except RuntimeError as error:
                    raise ValueError(f"PyTorch has no {backend} kernel for this: {error}") from error
                own = decode_attention(self.q, self.caches.k[0], self.caches.v[0], lengths=self.lengths)
                # Both round their output, and their weights before.
                if not torch.allclose(first.float(), own.float(), rtol=0, atol=0.02 * float(own.abs().max())):
                    raise CheckFailed(f"{backend} must give what the kernel gives over all keys")
                calls = [call(k, v) for k, v in zip(self.caches.k, self.caches.v)]
                return self._with_bytes(graph_time(calls, self.session.device).fields(), self.cache_bytes)

        return self._measured(backend, run, {"page": 0}, realised_density=1.0)

    def _with_bytes(self, fields: dict[str, Any], read: int) -> dict[str, Any]:
        read += 2 * self.q.numel() * self.q.element_size()
        fields["samples"]["tb_s"] = [round(read / fields["value"] * 1e-9, 4)]
        return fields

    def _measured(
        self, impl: str, run: Callable[[], dict[str, Any]], about: dict[str, Any], **values: Any
    ) -> Result | None:
        cell = {"dtype": self.shape.dtype_name, "batch": self.batch, "clock": "graph"} | about
        if impl == "triton":
            values |= {"method": "random", "kind": "training-free", "name": "random", "seed": 0}
        blank = self.session.blank(
            "decode_attention_ms", model=str(self.shape), context=self.tokens, impl=impl, cell=cell, **values
        )
        label = f"{self.batch:>3} x {self.tokens:>7,}, {impl} {about}, density {values.get('density')}"
        return self.session.measured(blank, run, label=label)


def measure_decode(args: argparse.Namespace, session: Session, shape: Shape) -> list[Result | None]:
    """One token: lists and all keys, in one piece and in pages, beside PyTorch."""
    rows: list[Result | None] = []
    cuda = session.device.type == "cuda"
    for tokens in args.tokens:
        for batch in args.batches:
            at = Decode(session, shape, batch, tokens, None)
            launches = LAUNCHES if args.launches else [None]
            rows += [at.sparse(density, launch) for launch in launches for density in args.densities]
            if not args.launches:
                rows += [at.sparse(None), *(at.sdpa(name) for name in (("flash", "cudnn") if cuda else ("sdpa",)))]
            del at
            session.release()
            for page in [] if args.launches else args.pages:
                at = Decode(session, shape, batch, tokens, page)
                rows += [at.sparse(0.1), at.sparse(None)]
                del at
                session.release()
    return rows


def in_pages(x: Tensor, page: int, table: Tensor) -> Tensor:
    """Keys or values ``[1, HKV, T, D]`` in the pages that a table ``[1, P]`` names, heads before tokens."""
    tiles = F.pad(x[0], (0, 0, 0, -x.shape[2] % page)).unflatten(1, (-1, page)).transpose(0, 1)
    stored = torch.empty_like(tiles)
    stored[table[0].long()] = tiles
    return stored.transpose(1, 2)


@contextmanager
def prompt_launched(launch: tuple | None) -> Iterator[None]:
    """Prompts take this launch."""
    chosen = nullcontext()
    if launch is not None:
        chosen = mock.patch.object(triton_kernel, "choose_launch", lambda **_: triton_kernel.Launch(*launch))
    with chosen:
        yield


def measure_prompts(args: argparse.Namespace, session: Session, shape: Shape) -> list[Result | None]:
    """Prompts, and the last chunk of one, in pages beside one piece."""
    device, rows = session.device, []
    tokens, chunk = (args.prompt, 2048) if device.type == "cuda" else (args.prompt, 100)
    q, k, v = random_qkv(shape, tokens, device)
    for share, heads in (("group", shape.kv_heads), ("head", shape.heads)):
        sizes = {"tokens": tokens, "block_q": BLOCK, "block_k": BLOCK, "density": 0.1, "device": device}
        whole = random_blocks(mask_heads=heads, **sizes)
        first = (tokens - chunk) // BLOCK
        cut = replace(
            whole,
            indices=whole.indices[:, :, first:],
            counts=whole.counts[:, :, first:],
            q_start=torch.tensor([tokens - chunk]),
            q_len=torch.tensor([chunk]),
        )
        for blocks, queries in ((whole, q), (cut, q[:, :, -chunk:])):
            launches = PAGED_LAUNCHES[share] if args.launches else [None]
            for launch in launches:
                with prompt_launched(launch):
                    rows += _prompt(session, shape, blocks, (queries, k, v), share, args.pages, launch)
    return rows


def _prompt(
    session: Session,
    shape: Shape,
    blocks: BlockIndices,
    qkv: tuple[Tensor, Tensor, Tensor],
    share: str,
    pages: list[int],
    launch: tuple | None,
) -> list[Result | None]:
    device = session.device
    q, k, v = qkv
    queries, tokens = q.shape[2], k.shape[2]
    common = {"dtype": shape.dtype_name, "clock": "device", "share": share, "block_q": BLOCK, "block_k": BLOCK}
    common |= {"queries": queries} | ({} if launch is None else {"launch": str(launch)})
    # Laid out before it is timed, as models have them.
    packed = q[0].transpose(0, 1).contiguous()
    bounds = torch.tensor([0, queries], dtype=torch.int32, device=device)
    k_lens = torch.tensor([tokens], dtype=torch.int32, device=device)

    def measured(impl: str, about: dict[str, Any], run: Callable[[], dict[str, Any]]) -> Result | None:
        label = f"{queries:>7,} of {tokens:>7,} tokens, {share}, {impl} {about} {launch or ''}"
        values = {"method": "random", "kind": "training-free", "name": "random", "density": 0.1, "seed": 0}
        blank = session.blank(
            "attention_ms", model=str(shape), context=tokens, impl=impl, cell=common | about, **values
        )
        return session.measured(blank, run, label=label)

    def one_piece(impl: str) -> dict[str, Any]:
        return device_time(lambda: block_sparse_attention(q, k, v, blocks, impl=impl), device).fields()

    def paged(page: int) -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(page)
        table = torch.randperm(-(-tokens // page), device=device, generator=generator).to(torch.int32)[None]
        caches = [in_pages(x, page, table) for x in (k, v)]
        call = {"block_table": table, "cu_seqlens_q": bounds, "k_lens": k_lens, "impl": "triton"}

        def run() -> Tensor:
            return paged_attention(packed, *caches, blocks, **call)

        expected = block_sparse_attention(q, k, v, blocks, impl="triton")[0].transpose(0, 1)
        error = float((run() - expected).abs().max())
        if error != 0.0:
            raise CheckFailed(f"pages of {page} must change no bit of {share} lists, got a difference of {error:.1e}")
        return device_time(run, device).fields()

    impls = ("triton",) if launch or device.type != "cuda" else ("gluon", "triton")
    found = [measured(impl, {"page": 0}, lambda impl=impl: one_piece(impl)) for impl in impls]
    return found + [measured("triton", {"page": page}, lambda page=page: paged(page)) for page in pages]


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(1 << 32 if device.type == "cuda" else 1 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e3 * len(source) / device_time(lambda: target.copy_(source), device).median


def summary(rows: list[Result]) -> str:
    """A line for each time, with what it reads a second, or beside one piece."""
    told = [f"{'batch x tokens':>17} {'what':<46} {'us':>9} {'TB/s':>6} {'share':>6} {'x flash':>8} {'splits':>6}"]
    for row in (r for r in rows if r.what == "decode_attention_ms" and r.value):
        cell = row.cell
        dense = [
            r.value for r in rows
            if r.cell["impl"] in ("flash", "sdpa") and r.context == row.context and r.cell.get("batch") == cell["batch"]
        ]  # fmt: skip
        what = cell["impl"] if row.method == "dense" else f"page {cell['page']}, " if cell["page"] else "one piece, "
        if row.method != "dense":
            what += "all" if row.density is None else f"density {row.density:.2f}"
        what += f" {cell.get('launch', '')}"
        rate = row.samples["tb_s"][0]
        speed = f"{dense[0] / row.value:8.2f}" if dense else " " * 8
        told.append(
            f"{cell['batch']:>5} x {row.context:>9,} {what:<46} {1e3 * row.value:9.1f} {rate:6.2f} "
            f"{rate * 1e12 / NOMINAL:6.0%} {speed} {row.samples.get('splits', [''])[0]:>6}"
        )
    told.append(f"\n{'queries of tokens':>19} {'what':<46} {'ms':>9} {'x triton in one piece':>22}")
    for row in (r for r in rows if r.what == "attention_ms" and r.value):
        cell, same = row.cell, ("share", "queries", "launch")
        base = [
            r.value for r in rows
            if r.what == row.what and r.cell["impl"] == "triton" and not r.cell["page"]
            and all(r.cell.get(name) == cell.get(name) for name in same)
        ]  # fmt: skip
        place = f"page {cell['page']}" if cell["page"] else "one piece"
        what = f"{cell['share']} {cell['impl']} {place} {cell.get('launch', '')}"
        ratio = f"{row.value / base[0]:22.2f}" if base else ""
        told.append(f"{cell['queries']:>8,} of {row.context:>7,} {what:<46} {row.value:9.3f} {ratio}")
    return "\n".join(told + lines(rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=[*PARTS], choices=PARTS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="sequences that decode together")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072], help="lengths to decode at")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.1, 0.2, 1.0], help="of the lists")
    parser.add_argument("--pages", type=int, nargs="+", default=[16, 64, 256], help="tokens of a page")
    parser.add_argument("--prompt", type=int, default=32768, help="tokens of a prompt")
    parser.add_argument("--launches", action="store_true", help="compare launches, and nothing else")
    parser.add_argument("--time-limit", type=float, default=400, help="seconds; nothing new is begun after it")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU, by Triton's interpreter")
    parser.add_argument(
        "--out", type=Path, help="file of results, by default decode.jsonl in the folder of $OUT, if set"
    )
    args = parser.parse_args()
    if args.out is None and "OUT" in os.environ:
        args.out = Path(os.environ["OUT"]) / "decode.jsonl"
    device, begin = torch.device("cuda"), time.monotonic()
    shape, prompt_shape = Shape(64, 8, 128), Shape()
    if args.rehearse:
        device = torch.device("cpu")
        shape = prompt_shape = Shape(4, 2, 32, torch.float16)
        args.tokens, args.batches, args.densities, args.prompt = [300], [2], [0.4, 1.0], 450
    say = lambda text: print(text, flush=True)  # noqa: E731
    session = Session(device, ResultsFile(args.out, device), say, time_limit=args.time_limit)
    with torch.no_grad():
        print(f"a copy moves {copy_rate(device) / 1e12:.2f} TB/s", flush=True)
        rows: list[Result | None] = []
        if "decode" in args.parts:
            rows += measure_decode(args, session, shape)
        if "prompts" in args.parts:
            rows += measure_prompts(args, session, prompt_shape)
        if "select" in args.parts and not args.launches:
            rows += measure_select(session, shape, args.batches, args.tokens)
    print(summary([row for row in rows if row is not None]))
    for failure in session.failures:
        print(f"failed: {failure}")
    print(f"{time.monotonic() - begin:.0f} s in all, {len(session.left_out)} cells left out for the time limit")
    return 1 if session.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
