"""Gate and selection of one layer, of a prompt in chunks: with what earlier chunks left, and pooling all keys again.

    python research/kernels/gate_chunks.py --out rows.jsonl
    python research/kernels/gate_chunks.py --forms default paper --tokens 131072 --chunks 8192 5000
    python research/kernels/gate_chunks.py --rehearse     # small, on a CPU, to the very end

Before anything is timed, lists of the chunks are compared with those of one call: they must be equal, of every query
block that the end of no chunk cuts. Whole prompts are timed by `seerattn bench ttft --set chunks=0,8192`. Exit code 1
if lists differ.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from seerattn.bench.attention import share_of
from seerattn.bench.inputs import Shape, random_qkv
from seerattn.bench.model import gate_form, layer_context, random_gate
from seerattn.bench.timing import device_time
from seerattn.gate_selector import GateSelector
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result
from seerattn.selection import BlockIndices, TopK
from seerattn.selection.selector import Memory

DENSITY = 0.1


class Prompt:
    """Queries and keys of a prompt, and how a gate of a form chooses for it in chunks.

    Args:
        form: name of the form.
        shape: of the layer.
        tokens: of the prompt.
        chunk: tokens of a call.
        device: where.
        density: that is chosen.
    """

    def __init__(
        self, form: str, shape: Shape, tokens: int, chunk: int, device: torch.device, density: float = DENSITY
    ) -> None:
        self.form, self.shape, self.tokens, self.chunk = form, shape, tokens, chunk
        q, k, _ = random_qkv(shape, tokens, device, drift=1.0)
        gate = random_gate(gate_form(form), shape, device)
        self.selector = GateSelector(gate, TopK(density=density, length=tokens))
        self.ends = [*range(chunk, tokens, chunk), tokens]
        self.q, self.k = q.split(chunk, 2), [k[:, :, :end] for end in self.ends]
        self.whole = (q, k)
        self.contexts = [layer_context(shape, end, device) for end in self.ends]
        self.memory = Memory()

    def at_once(self) -> list[BlockIndices]:
        """One call."""
        return [self.selector.select(*self.whole, self.contexts[-1])]

    def again(self) -> list[BlockIndices]:
        """Chunks that know nothing of each other."""
        return [self.selector.select(q, k, context) for q, k, context in zip(self.q, self.k, self.contexts)]

    def remembered(self) -> list[BlockIndices]:
        """Chunks that take what the one before left."""
        lists, kept, begin = [], None, 0
        for q, k, context, end in zip(self.q, self.k, self.contexts, self.ends):
            memory = Memory(begin, kept)
            lists.append(self.selector.select(q, k, replace(context, memory=memory)))
            kept, begin = memory.kept, end
        self.memory = memory
        return lists

    def differing(self) -> int:
        """Query blocks, of all heads, whose lists are not those of one call, boundaries within a block left out."""
        block_q, expected = self.selector.gate.config.block_q, self.at_once()[0]
        wrong, begin = 0, 0
        for blocks, end in zip(self.remembered(), self.ends):
            first, full = begin // block_q, (end if end < self.tokens else end + block_q - 1) // block_q
            width = expected.indices.shape[-1]
            found = torch.nn.functional.pad(blocks.indices, (0, width - blocks.indices.shape[-1]), value=-1)
            same = (found[:, :, : full - first] == expected.indices[:, :, first:full]).all(-1)
            wrong, begin = wrong + int((~same).sum()), end
        return wrong


def result(prompt: Prompt, way: str, run: Callable[[], object], device: torch.device) -> Result:
    """The time of one way to choose for a prompt."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    config = prompt.selector.gate.config
    cell = {"impl": "auto", "device": name, "dtype": prompt.shape.dtype_name, "chunk": prompt.chunk, "keys": way}
    cell |= {"block_q": config.block_q, "block_k": config.block_k, "share": share_of(config)}
    return Result(
        what="gate_chunks_ms", model=str(prompt.shape), method="gate", kind="learned", name=prompt.form,
        density=prompt.selector.policy.density,
        settings=prompt.selector.policy.to_dict(), context=prompt.tokens, text="random", seed=0, unit="runs", cell=cell,
        realised_density=float(prompt.at_once()[0].density().mean()),
        **device_time(run, device, budget_ms=200.0).fields(),
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", default=["default"])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--chunks", type=int, nargs="+", default=[8192, 5000], help="tokens of a call")
    parser.add_argument("--rehearse", action="store_true", help="4,096 tokens of a small layer on a CPU")
    parser.add_argument("--out", type=Path, help="file of results that is appended to")
    args = parser.parse_args()
    shape, tokens, chunks, device = Shape(), args.tokens, args.chunks, torch.device("cuda")
    if args.rehearse:
        shape, tokens, chunks, device = Shape(4, 2, 32, torch.float32), 4096, [512, 300], torch.device("cpu")
    torch.set_grad_enabled(False)
    file, failed = ResultsFile(args.out, device), 0
    for form in args.forms:
        for chunk in chunks:
            prompt = Prompt(form, shape, tokens, chunk, device)
            wrong = prompt.differing()
            failed += wrong
            share = prompt.memory.kept.nbytes / prompt.whole[1].nbytes
            print(f"{form}, {tokens:,} tokens in chunks of {chunk:,}: {wrong} lists differ from those of one call")
            print(f"kept: {prompt.memory.kept.nbytes / 2**20:.2f} MiB, {share:.3f} of the keys", flush=True)
            ways = {"one call": prompt.at_once, "again": prompt.again, "remembered": prompt.remembered}
            for way, run in ways.items():
                row = result(prompt, way, run, device)
                file.append(row)
                print(f"{way:>12} {row.value:10.3f} ms", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
