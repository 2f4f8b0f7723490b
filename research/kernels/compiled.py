"""What kernels take of a Hopper GPU, on any machine: registers, shared memory and what spills, by the compiler.

    python research/kernels/compiled.py                # all kernels, a minute
    python research/kernels/compiled.py --only decode  # calls of this name alone

Each call compiles what it would launch. Triton's interpreter, which tests run in, knows neither types that do not fit
nor layouts, so this also tells whether kernels compile at all. Exit code 1 if one does not.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import triton
from hopper import pretend
from torch import Tensor

from seerattn.bench.inputs import Shape
from seerattn.bench.model import gate_form, layer_context, random_gate
from seerattn.gate_decode import GateDecoder
from seerattn.gate_selector import GateSelector
from seerattn.ops.attention_map import attention_map
from seerattn.ops.block_sparse_attention import block_sparse_attention
from seerattn.ops.decode_attention import decode_attention
from seerattn.ops.decode_select import KeyTable
from seerattn.ops.paged_attention import paged_attention
from seerattn.selection import Policy, Threshold, TokenBudget, TopK, TopP
from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.decode_blocks import DecodeBlocks
from seerattn.selection.map_form import MapForm
from seerattn.selection.selector import RotaryTables

CPU, SHAPE, TOKENS, BLOCK, PAGE = torch.device("cpu"), Shape(8, 2, 128), 1024, 64, 64


def inputs(tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[1, H, T, D]``."""
    sizes = (SHAPE.heads, tokens, SHAPE.head_dim), (SHAPE.kv_heads, TOKENS, SHAPE.head_dim)
    q, k = (torch.randn(1, *size, dtype=SHAPE.dtype) for size in sizes)
    return q, k


def lists(heads: int) -> BlockIndices:
    """All causal blocks."""
    sizes = {"q_len": TOKENS, "k_len": TOKENS, "block_q": BLOCK, "block_k": BLOCK}
    return BlockIndices.dense(batch=1, heads=heads, **sizes)


def attention(impl: str, heads: int, *, backward: bool = False, skip: float | None = None) -> None:
    """Prompts over lists."""
    (q, k), blocks = inputs(), replace(lists(heads), skip_threshold=skip)
    q.requires_grad_(backward), k.requires_grad_(backward)
    out = block_sparse_attention(q, k, k, blocks, impl=impl)
    if backward:
        out.backward(torch.zeros_like(out))


def choose(form: str, policy: Policy) -> None:
    """Gate, selection and lists of a prompt."""
    gate, context = random_gate(gate_form(form), SHAPE, CPU), layer_context(SHAPE, TOKENS, CPU)
    GateSelector(gate, policy, impl="triton").select(*inputs(), context)


def choose_token(form: str, policy: Policy) -> None:
    """Lists of one token."""
    gate, context = random_gate(gate_form(form), SHAPE, CPU), layer_context(SHAPE, TOKENS, CPU)
    GateDecoder(gate, policy, impl="triton").select_token(*inputs(1), context)


def choose_tokens(form: str, policy: Policy, *, apart: bool) -> None:
    """Lists of one token of each of two sequences, whose gate keys lie apart, or in one fp16 tensor."""
    gate, lengths = random_gate(gate_form(form), SHAPE, CPU), torch.tensor([TOKENS, TOKENS // 2], dtype=torch.int32)
    heads, dim, pieces = gate.k_weight.shape[0], gate.gate_dim, gate.config.key_subblocks
    windows = [(n - 1) // gate.config.block_k * pieces for n in lengths.tolist()]
    keys: Tensor | KeyTable = torch.zeros(len(windows), heads, windows[0], dim, dtype=torch.float16)
    if apart:
        keys = KeyTable.of([torch.zeros(1, heads, n, dim) for n in windows], heads=heads, dim=dim, device=CPU)
    queries, angles = torch.zeros(len(windows), SHAPE.heads, SHAPE.head_dim, dtype=SHAPE.dtype), torch.ones(2, 1, 128)
    rotary = RotaryTables(angles, angles, SHAPE.head_dim)
    GateDecoder(gate, policy, impl="triton").select_many(queries, rotary, keys, lengths, tokens=TOKENS)


def decode(*, pages: bool, listed: bool) -> None:
    """Attention of one token."""
    (q, k), lengths = inputs(1), torch.tensor([TOKENS], dtype=torch.int32)
    cache = k[0].transpose(0, 1).reshape(-1, PAGE, *k.shape[1::2]) if pages else k
    table = torch.arange(TOKENS // PAGE, dtype=torch.int32)[None] if pages else None
    blocks = DecodeBlocks.dense(lengths, kv_heads=SHAPE.kv_heads, block_k=BLOCK, width=TOKENS // BLOCK)
    call = {"lengths": lengths, "blocks": blocks if listed else None, "block_table": table}
    decode_attention(q[:, :, 0], cache, cache, impl="triton", **call)


def in_pages(heads: int) -> None:
    """Prompts whose keys lie in pages."""
    q, k = inputs()
    cache = k[0].transpose(0, 1).reshape(-1, PAGE, *k.shape[1::2])
    table = torch.arange(TOKENS // PAGE, dtype=torch.int32)[None]
    ends, lengths = torch.tensor([0, TOKENS], dtype=torch.int32), torch.tensor([TOKENS], dtype=torch.int32)
    call = {"block_table": table, "cu_seqlens_q": ends, "k_lens": lengths}
    paged_attention(q[0].transpose(0, 1), cache, cache, lists(heads), impl="triton", **call)


HEADS = ("warps", "registers", "spilled B", "shared KiB")
CALLS: dict[str, Callable[[], object]] = {
    "attention gluon head": lambda: attention("gluon", SHAPE.heads),
    "attention gluon group": lambda: attention("gluon", SHAPE.kv_heads),
    "attention triton head": lambda: attention("triton", SHAPE.heads),
    "attention triton group": lambda: attention("triton", SHAPE.kv_heads),
    "attention triton skipping": lambda: attention("triton", SHAPE.heads, skip=0.01),
    "attention backward head": lambda: attention("gluon", SHAPE.heads, backward=True),
    "attention backward group": lambda: attention("gluon", SHAPE.kv_heads, backward=True),
    "pages head": lambda: in_pages(SHAPE.heads),
    "pages group": lambda: in_pages(SHAPE.kv_heads),
    "decode": lambda: decode(pages=False, listed=True),
    "decode all": lambda: decode(pages=False, listed=False),
    "decode pages": lambda: decode(pages=True, listed=True),
    "choose default": lambda: choose("default", TopK(density=0.1)),
    "choose default group": lambda: choose("default-group", TopP(p=0.9)),
    "choose paper": lambda: choose("paper", Threshold(threshold=0.01)),
    "choose token default": lambda: choose_token("default", TokenBudget(tokens=256)),
    "choose token paper": lambda: choose_token("paper", TopK(density=0.1)),
    "choose tokens default": lambda: choose_tokens("default", TokenBudget(tokens=256), apart=True),
    "choose tokens half": lambda: choose_tokens("default", TokenBudget(tokens=256), apart=False),
    "choose tokens half group": lambda: choose_tokens("default-group", TopK(density=0.1), apart=False),
    "map max": lambda: attention_map(*inputs(), impl="triton"),
    "map sum": lambda: attention_map(*inputs(), form=MapForm("sum", 4), impl="triton"),
}


def compiled() -> Iterator[tuple[str, triton.compiler.CompiledKernel]]:
    """All kernels that this process compiled, by module and name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("seerattn.ops"):
            for value in vars(module).values():
                if isinstance(value, triton.JITFunction) and value.__module__ == name:
                    for kernels, *_ in value.device_caches.values():
                        yield from (
                            (f"{name.removeprefix('seerattn.ops.')}.{value.__name__}", k) for k in kernels.values()
                        )


def resources(kernel: triton.compiler.CompiledKernel, folder: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills."""
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    place = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(place) if place.exists() else shutil.which("cuobjdump")
    text = subprocess.run([tool, "--dump-resource-usage", folder / "kernel.cubin"], capture_output=True, check=True)
    found = re.search(rb"REG:(\d+) STACK:(\d+)", text.stdout)
    return int(found[1]), int(found[2])


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="calls whose name begins so")
    only = parser.parse_args().only
    pretend()
    # No kernel fills what was allocated, and the length of some lists is read from it.
    torch.empty = torch.zeros
    seen: set[int] = set()
    failed = False
    print(f"{'call':<26}{'kernel':<58}" + "".join(f"{head:>11}" for head in HEADS))
    with tempfile.TemporaryDirectory() as folder:
        for name, call in CALLS.items():
            if not name.startswith(only):
                continue
            try:
                call()
            except Exception as error:
                failed = True
                print(f"{name:<26}does not compile: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}")
            for kernel_name, kernel in compiled():
                if id(kernel) not in seen:
                    seen.add(id(kernel))
                    numbers = kernel.metadata.num_warps, *resources(kernel, Path(folder)), kernel.metadata.shared >> 10
                    print(f"{name:<26}{kernel_name:<58}" + "".join(f"{number:>11}" for number in numbers), flush=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
