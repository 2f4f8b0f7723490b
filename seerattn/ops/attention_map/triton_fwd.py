"""`impl="triton"`: dense causal attention that emits its block maps on the way, and rows of the maps alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from seerattn.ops.attention_map.kernel import attention_map_fwd
from seerattn.ops.attention_map.maps import AttentionMaps
from seerattn.ops.checks import scale_refusal
from seerattn.ops.launch import new_output, on_device, power_of_2, row_geometry, tma_ready
from seerattn.selection.block_indices import num_query_blocks
from seerattn.selection.map_form import MapForm

BLOCK_SIZES = (32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2_E = 1.4426950408889634
# All scratch together. Programs are left out beyond it: at 128k tokens 126 of 132 run with 64-token key blocks.
SCRATCH_BYTES = 126 << 20
# Heads are walked in sections whose keys and values fit in half of the L2 of an H100, but that hold some tiles for
# every program: the last section begins with long tiles too, and with few tiles in all most programs would wait for it.
SECTION_BYTES = 24 << 20
SECTION_TILES = 3


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched.

    Attributes:
        rows: query rows of a tile, a multiple of block_q.
        keys: keys of a step.
        num_warps: warps of a program.
        num_stages: depth of the pipeline of key and value tiles.
        programs_per_sm: resident programs of a multiprocessor.
        max_registers: cap of registers per thread, so that `programs_per_sm` fit; None leaves it to the compiler.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1
    max_registers: int | None = None


def choose_launch(*, block_q: int, head_dim: int, element_size: int, tokens: int, lean: bool) -> Launch:
    """Picks a launch from the shapes of a call.

    One H100, bf16, 32/8 heads, head dim 128, 64 x 64 blocks, ms at 8k / 32k / 64k by (rows, keys, warps, stages,
    programs): (128, 128, 8, 3, 1) 1.12 / 17.4 / 74.6; (128, 128, 8, 2, 1) 1.25 / 18.7 / 75.3; (128, 64, 8, 3, 1)
    1.25 / 18.5 / 76.6; (64, 64, 4, 2, 2) 1.27 / 20.3 / 83.3; (128, 64, 4, 2, 2) 1.41 / 22.4 / 87.6. The other widths
    and fp32 were not measured.

    Lean calls, without an output and with one kind of scratch, need no accumulator, so two programs fit on a
    multiprocessor and one can multiply while the other exponentiates; ms for a tenth of the query blocks, of the
    published map, at 32k / 128k: (128, 128, 8, 2, 2) 1.05 / 23.0, (64, 64, 4, 3, 3) 1.12 / 17.1, (64, 128, 4, 2, 2)
    1.20 / 17.9, (128, 128, 8, 3, 1) 1.27 / 18.0. At 128k the bound on scratch leaves programs out, so the smaller ones
    win.
    """
    width = power_of_2(head_dim)
    if element_size == 4:
        # Full fp32 products run on the ordinary units and hold whole rows of q and K in registers.
        return Launch(rows=max(64, block_q), keys=32, num_warps=16, num_stages=1)
    if width == 256:
        return Launch(rows=128, keys=64, num_warps=8, num_stages=2)
    if lean and tokens > 1 << 16 and block_q <= 64:
        return Launch(rows=64, keys=64, num_warps=4, num_stages=3, programs_per_sm=3, max_registers=168)
    if lean:
        return Launch(rows=128, keys=128, num_warps=8, num_stages=2, programs_per_sm=2, max_registers=128)
    return Launch(rows=128, keys=128, num_warps=8, num_stages=3)


def refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    block_q: int,
    block_k: int,
    scale: float,
    softcap: float | None = None,
    **_others: object,
) -> str | None:
    """Why this implementation cannot serve a call of `attention_maps`, in a sentence; None if it can."""
    if q.dtype not in DTYPES:
        return f"it takes fp16, bf16 or fp32, got {q.dtype}"
    if q.shape[3] % 8:
        return f"it takes head dims that are multiples of 8, got {q.shape[3]}"
    if block_q not in BLOCK_SIZES or block_k not in BLOCK_SIZES:
        return f"it takes blocks of {BLOCK_SIZES} tokens, got {block_q} x {block_k}"
    return scale_refusal(scale, softcap)


@torch.no_grad()
def attention_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    forms: tuple[MapForm, ...],
    query_blocks: list[int] | None,
    block_q: int,
    block_k: int,
    scale: float,
    lengths: list[int],
    segment_ids: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    launch: Launch | None = None,
) -> AttentionMaps:
    """See `api`, which validates the arguments. ``lengths`` holds the keys of every row; no ``v``, no output.

    ``query_blocks`` are the rows of the maps that are wanted, of whole sequences (``T == S``) and without an output.
    Documents of ``segment_ids`` are runs of equal ids. The output has the memory layout ``[B, T, H, D]``. q, k and v
    are copied only if their channels are not contiguous or (k, v) their strides no multiples of 16 bytes.
    """
    batch, heads, q_tokens, dim = q.shape
    kv_heads, k_tokens = k.shape[1:3]
    kinds = {form.keys for form in forms}
    lean = v is None and len(kinds) == 1
    launch = launch or choose_launch(
        block_q=block_q, head_dim=dim, element_size=q.element_size(), tokens=k_tokens, lean=lean
    )
    device = q.device

    q_len = [min(q_tokens, n) for n in lengths]
    q_start = [n - t for n, t in zip(lengths, q_len)]
    if query_blocks is None:
        num_q_blocks, listed = max(num_query_blocks(s, t, block_q) for s, t in zip(q_start, q_len)), None
    else:
        # Not cached on the device: they are drawn anew for every call. The host does not wait for the copy.
        num_q_blocks = len(query_blocks)
        listed = torch.tensor(query_blocks, dtype=torch.int32).to(device, non_blocking=True)
    num_k_blocks = -(-max(lengths) // block_k)
    num_tiles = -(-num_q_blocks * block_q // launch.rows)

    whole = all(n == k_tokens for n in lengths)
    geometry = None if whole else on_device(tuple(row_geometry(q_tokens, k_tokens, lengths)), torch.int32, device)
    out = None if v is None else new_output(q, padded=not whole)
    maps = torch.zeros(len(forms), batch, heads, num_q_blocks, num_k_blocks, dtype=torch.float32, device=device)

    # One column of scratch a key block, or a step of the walk if that is shorter.
    column = min(block_k, launch.keys)
    columns = -(-max(lengths) // launch.keys) * (launch.keys // column)
    slot = columns * launch.rows
    work = batch * heads * num_tiles
    programs = max(1, min(work, _resident(device, launch), SCRATCH_BYTES // (4 * slot * len(kinds))))
    maxima, sums = (
        torch.empty(programs * slot, dtype=torch.float32, device=device) if kind in kinds else None
        for kind in ("max", "sum")
    )

    q = q if q.stride(3) == 1 else q.contiguous()
    block_dim = power_of_2(dim)
    tile = [1, 1, launch.keys, block_dim]
    group = heads // kv_heads
    fitting = SECTION_BYTES // ((1 if v is None else 2) * k_tokens * dim * k.element_size())
    section = max(1, fitting, -(-SECTION_TILES * programs // (group * num_tiles)))
    attention_map_fwd[(programs,)](
        q,
        TensorDescriptor.from_tensor(tma_ready(k), tile),
        None if v is None else TensorDescriptor.from_tensor(tma_ready(v), tile),
        out,
        maps,
        maxima,
        sums,
        sinks,
        geometry,
        None if segment_ids is None else _document_starts(segment_ids, lengths),
        listed,
        torch.zeros(1, dtype=torch.int32, device=device),
        k_tokens - q_tokens,
        q_tokens,
        k_tokens,
        *q.stride()[:3],
        *((0, 0, 0) if out is None else out.stride()[:3]),
        heads,
        batch * heads,
        min(section, batch * kv_heads) * group,
        num_tiles,
        num_q_blocks,
        num_k_blocks,
        slot,
        (scale if softcap is None else softcap) * LOG2_E,
        0.0 if softcap is None else 2 * LOG2_E * scale / softcap,
        GROUP=group,
        ROWS=launch.rows,
        KEYS=launch.keys,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        COLUMN=column,
        D=dim,
        BLOCK_D=block_dim,
        SUMS=tuple(form.keys == "sum" for form in forms),
        POWERS=tuple(form.power for form in forms),
        CAPPED=softcap is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        maxnreg=launch.max_registers,
    )
    return AttentionMaps(out, maps.unbind())


def _resident(device: torch.device, launch: Launch) -> int:
    """Programs that run at once; one in the interpreter, where they run one after the other."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count * launch.programs_per_sm


def _document_starts(segment_ids: Tensor, lengths: list[int]) -> Tensor:
    """Position of the first token of each token's document, int32 ``[B, S]`` in the slots of ``segment_ids``."""
    tokens = segment_ids.shape[1]
    slot = torch.arange(tokens, dtype=torch.int32, device=segment_ids.device)
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = torch.where(begins, slot, 0).cummax(1).values
    padding = torch.tensor([tokens - n for n in lengths], dtype=torch.int32).to(starts.device, non_blocking=True)
    return (starts - padding[:, None]).clamp_(min=0)
