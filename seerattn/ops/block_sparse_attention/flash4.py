"""`impl="flash4"`: the Hopper kernel of flash-attn-4 (CuTe DSL) over index lists.

The kernel walks two lists for each tile of query rows: key blocks that the diagonal crosses, whose scores it masks one
by one, and full ones. Our ascending lists are already the second with the first behind it, so nothing is copied: the
crossed blocks follow from the geometry alone.

Where a KV group shares its lists, its query heads are rows of one tile: each key block is loaded once for all of them,
and q and the output stay where they are. flash-attn-4 can pack heads so, but takes a list for every ``tile_m`` tokens;
ours are for ``block_q`` tokens. `_forward_class` changes that one step, from tile to list.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattn.ops.checks import scale_refusal
from seerattn.ops.launch import needs_gradients, new_output
from seerattn.selection.block_indices import BlockIndices, num_query_blocks

# Betas without a stable interface: what is used here is checked against these, and pinned in the extra `flash4`.
VERSIONS = {"flash-attn-4": "4.0.0b36", "nvidia-cutlass-dsl": "4.8.1"}
DTYPES = (torch.float16, torch.bfloat16)
BLOCK_K = (64, 128)
STAGES = 2  # of the pipeline of key and value blocks
# What a program may allocate, less the kernel's barriers and alignment.
SHARED_BYTES = 224 << 10


@dataclass(frozen=True)
class Form:
    """What a kernel is compiled for; sizes of tensors are arguments.

    Attributes:
        dtype: of q, k, v and the output.
        head_dim: of q, k and v.
        group: query heads of a KV head.
        packed: whether the heads of a group are rows of one tile and share a list.
        tile_m: query rows of a program.
        tile_n: keys of a step, the key block.
        tiles: programs of one query block, which share a list.
        softcap: as in the op.
        sinks: whether there are any.
    """

    dtype: torch.dtype
    head_dim: int
    group: int
    packed: bool
    tile_m: int
    tile_n: int
    tiles: int
    softcap: float | None
    sinks: bool

    @property
    def p_in_registers(self) -> bool:
        """Whether probabilities go to the second product from registers, as flash-attn-4 chooses by head dim."""
        return not 64 < self.head_dim <= 96

    @property
    def shared_bytes(self) -> int:
        """Shared memory of q, of the pipeline of k and v, and of probabilities that do not stay in registers."""
        width = -(-self.head_dim // 16) * 16
        p = 0 if self.p_in_registers else self.tile_m * self.tile_n
        return 2 * (width * (self.tile_m + 2 * STAGES * self.tile_n) + p)


class Diagonal(NamedTuple):
    """Key blocks that the diagonal crosses, for every query block of a call; the last ones of its list."""

    counts: Tensor  # int32 [B, Hm, Nq]
    indices: Tensor  # int32 [B, Hm, Nq, R], ascending; only the first ones are meant


class Call(NamedTuple):
    """One launch: rows of the batch, or one sequence of one row, with no padding."""

    batch: slice
    q_tokens: slice
    k_tokens: slice
    lists: slice


def refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockIndices,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    **_: object,
) -> str | None:
    """Why this implementation cannot serve a call, in a sentence; None if it can."""
    if needs_gradients(q, k, v, sinks):
        return "it has no backward pass"
    if q.dtype not in DTYPES:
        return f"it takes fp16 or bf16, got {q.dtype}"
    if q.shape[3] % 8:
        return f"it takes head dims that are multiples of 8, got {q.shape[3]}"
    if blocks.skip_threshold is not None:
        return f"it skips no blocks, got skip_threshold {blocks.skip_threshold:g}"
    if blocks.block_k not in BLOCK_K:
        return f"it takes key blocks of {BLOCK_K} tokens, got {blocks.block_k}"
    form = choose_form(q, k, blocks, softcap=softcap, sinks=sinks)
    if form is None:
        rows = f"{blocks.block_q} tokens x {blocks.num_heads} of {q.shape[1]} heads"
        return f"it takes query blocks of whole 64 rows, a row being a token of a head that shares lists, got {rows}"
    if form.shared_bytes > SHARED_BYTES:
        return f"key blocks of {blocks.block_k} x head dim {q.shape[3]} do not fit into shared memory"
    return scale_refusal(scale) or _unsupported_device(q.device) or _wrong_installation()


@functools.cache
def _unsupported_device(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, got {device}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major == 9 else f"its kernel is for compute capability 9.0 (Hopper), got {major}.{minor}"


@functools.cache
def _wrong_installation() -> str | None:
    for package, wanted in VERSIONS.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "none"
        if found != wanted:
            return f"it is written for {package} {wanted}, got {found} (pip install 'seerattn[flash4]')"
    return None


def choose_form(
    q: Tensor, k: Tensor, blocks: BlockIndices, *, softcap: float | None, sinks: Tensor | None
) -> Form | None:
    """The kernel for a call: packed if heads share lists and tiles hold whole tokens; None without a tile that fits.

    H100, bf16, 32/8 heads, head dim 128, 90 % sparse, ms at 128k (dense 204) / 32k (12.8): lists of a head 38.7 / 2.23
    (64x64), 24.2 / 1.59 (128x128); lists of a group 24.8 / 1.63 (64x64), 22.7 / 1.51 (64x128), 22.2 / 1.50 (128x128),
    27.3 / 1.67 (32x64).
    """
    group = q.shape[1] // k.shape[1]
    shared = group if blocks.num_heads == k.shape[1] else 1
    for members in sorted({shared, 1}, reverse=True):
        rows = blocks.block_q * members
        tile_m = next((m for m in (128, 64) if rows % m == 0 and m % members == 0), None)
        if tile_m is not None:
            return Form(
                dtype=q.dtype,
                head_dim=q.shape[3],
                group=group,
                packed=members > 1,
                tile_m=tile_m,
                tile_n=blocks.block_k,
                tiles=rows // tile_m,
                softcap=softcap,
                sinks=sinks is not None,
            )
    return None


@torch.no_grad()
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockIndices,
    *,
    scale: float,
    lengths: list[int],
    softcap: float | None,
    sinks: Tensor | None,
    return_lse: bool,
    cu_seqlens: list[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `api.block_sparse_attention`, which validates the arguments.

    ``lengths`` holds the keys of every row; with ``cu_seqlens`` the rows lie one after the other in a batch of one.
    Rows of different length are launched one by one. The output has the memory layout ``[B, T, H, D]``.
    """
    batch, heads, q_tokens, _ = q.shape
    form = choose_form(q, k, blocks, softcap=softcap, sinks=sinks)
    whole = cu_seqlens is not None or all(n == k.shape[2] for n in lengths)
    out = new_output(q, padded=not whole)
    # The kernel always writes it: 16 MB at 128k tokens, and one kernel less to compile.
    lse = torch.full((batch, heads, q_tokens), -torch.inf, dtype=torch.float32, device=q.device)
    sinks = None if sinks is None else sinks.float()
    indices, counts = blocks.indices, blocks.counts
    if blocks.num_heads < heads and not form.packed:
        indices, counts = (x.repeat_interleave(form.group, 1) for x in (indices, counts))

    for call in calls(q_tokens, k.shape[2], lengths, cu_seqlens):
        q_, out_ = (x[call.batch, :, call.q_tokens] for x in (q, out))
        k_, v_ = (x[call.batch, :, call.k_tokens] for x in (k, v))
        k_len, q_len = k_.shape[2], q_.shape[2]
        start = k_len - q_len
        rows = num_query_blocks(start, q_len, blocks.block_q)
        listed, count = indices[call.lists, :, :rows], counts[call.lists, :, :rows]
        diagonal = diagonal_blocks(
            start, k_len, blocks.block_q, blocks.block_k, batch=len(count), heads=count.shape[1], device=q.device
        )
        lse_ = lse[call.batch, :, call.q_tokens]
        before = start % blocks.block_q
        args = (k_, v_, listed, count - diagonal.counts, diagonal, sinks, scale, form)
        if before == 0:
            _launch(q_, out_, lse_, *args)
            continue
        # Tiles begin at the first token of a call: one that begins inside a block gets the block's earlier rows, too.
        whole_q = F.pad(q_, (0, 0, before, 0))
        whole_out = torch.empty_like(whole_q)
        whole_lse = lse.new_empty(whole_q.shape[:3])
        _launch(whole_q, whole_out, whole_lse, *args)
        out_.copy_(whole_out[:, :, before:])
        lse_.copy_(whole_lse[:, :, before:])
    return out, lse if return_lse else None


def calls(q_tokens: int, k_tokens: int, lengths: list[int], cu_seqlens: list[int] | None) -> Iterator[Call]:
    """Cuts a batch into launches without padding: a single one if all rows are whole."""
    if cu_seqlens is not None:
        for i, (begin, end) in enumerate(pairwise(cu_seqlens)):
            if begin < end:
                yield Call(slice(0, 1), slice(begin, end), slice(begin, end), slice(i, i + 1))
    elif all(n == k_tokens for n in lengths):
        if lengths:
            yield Call(slice(None), slice(None), slice(None), slice(None))
    else:
        for b, n in enumerate(lengths):
            if n:
                q_slice, k_slice = slice(max(0, q_tokens - n), q_tokens), slice(k_tokens - n, k_tokens)
                yield Call(slice(b, b + 1), q_slice, k_slice, slice(b, b + 1))


@functools.lru_cache(maxsize=64)
def diagonal_blocks(
    q_start: int, k_len: int, block_q: int, block_k: int, *, batch: int, heads: int, device: torch.device
) -> Diagonal:
    """The blocks at the end of every list that hold a key after some query of their query block.

    `BlockIndices` keeps the blocks of every query's own position, so all of them are listed. Made on the host and kept:
    layer after layer asks for the same.
    """
    block = torch.arange(q_start // block_q, -(-k_len // block_q))
    first = (block * block_q).clamp(min=q_start)
    last = ((block + 1) * block_q).clamp(max=k_len) - 1
    edge = (first + 1) // block_k  # the first block that ends after the first query
    counts = last // block_k - edge + 1
    indices = edge[:, None] + torch.arange(max(1, -(-block_q // block_k)))
    on_device = (x.to(device, torch.int32) for x in (counts, indices))
    return Diagonal(*(x.expand(batch, heads, *x.shape).contiguous() for x in on_device))


def _launch(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    diagonal: Diagonal,
    sinks: Tensor | None,
    scale: float,
    form: Form,
) -> None:
    """Runs the kernel on tensors ``[B, heads, tokens, D]`` that begin with a query block and end with the last key."""
    from flash_attn.cute.cute_dsl_utils import maybe_contiguous
    from flash_attn.cute.utils import AuxData

    q, k, v = (maybe_contiguous(x.transpose(1, 2)) for x in (q, k, v))
    # Strides of 0 would be compiled in.
    q, k, v = (x.contiguous() if 0 in x.stride() else x for x in (q, k, v))
    args = [q, k, v, out.transpose(1, 2), lse]
    lists = [diagonal.counts, diagonal.indices, counts, indices]
    with torch.cuda.device(q.device):
        if form not in _kernels:
            _kernels[form] = _compile(form, args, lists, sinks, scale)
        _kernels[form](*args, scale, *[None] * 7, sinks, (*lists, *[None] * 4), AuxData(None, None), None, None)


_kernels: dict[Form, Callable[..., None]] = {}


def _compile(form: Form, args: list[Tensor], lists: list[Tensor], sinks: Tensor | None, scale: float) -> Callable:
    """Compiles the kernel for the ranks and dtypes of these tensors; their sizes and strides stay arguments."""
    import cutlass
    from cutlass import cute
    from flash_attn.cute.block_sparsity import BlockSparseTensors
    from flash_attn.cute.cute_dsl_utils import to_cute_tensor, torch2cute_dtype_map
    from flash_attn.cute.utils import AuxData, scalar_to_ssa

    @cute.jit
    def causal(batch_idx, head_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
        return kv_idx <= q_idx + scalar_to_ssa(seqlen_info.seqlen_k - seqlen_info.seqlen_q, cutlass.Int32)

    cap = form.softcap

    @cute.jit
    def capped(scores, batch_idx, head_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
        # Exact tanh: the approximate one of the hardware is off by 5e-4, times the cap that is 2 % of a probability.
        return cap * cute.math.tanh(scores / cap)

    kernel = _forward_class()(
        torch2cute_dtype_map[form.dtype],
        form.head_dim,
        form.head_dim,
        form.group,
        is_causal=False,
        is_local=False,
        pack_gqa=form.packed,
        tile_m=form.tile_m,
        tile_n=form.tile_n,
        num_stages=STAGES,
        num_threads=(form.tile_m // 64 + 1) * 128,
        Q_in_regs=False,
        intra_wg_overlap=True,
        mma_pv_is_rs=form.p_in_registers,
        mask_mod=causal,
        score_mod=None if cap is None else capped,
        has_aux_tensors=False,
        q_subtile_factor=form.tiles,
    )
    tensors = [to_cute_tensor(x) for x in args[:4]] + [to_cute_tensor(args[4], assumed_align=4)]
    return cute.compile(
        kernel,
        *tensors,
        scale,
        *[None] * 7,
        None if sinks is None else to_cute_tensor(sinks, assumed_align=4, leading_dim=0),
        BlockSparseTensors(*(to_cute_tensor(x, assumed_align=4) for x in lists)),
        AuxData(None, None),
        None,
        None,
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
        options="--enable-tvm-ffi",
    )


@functools.cache
def _forward_class() -> Any:
    """flash-attn-4's forward kernel for Hopper, which finds the list of a tile by ``tiles`` alone.

    With packed heads it would divide the number of the tile by the size of the group first, as if a list held for
    ``tile_m`` tokens. The module is loaded a second time, so that flash-attn-4 itself stays as it is.
    """
    module = _own_instance("flash_attn.cute.flash_fwd_sm90")
    for name in ("produce_block_sparse_loads", "consume_block_sparse_loads"):
        setattr(module, name, _without_group(getattr(module, name)))
    return module.FlashAttentionForwardSm90


def _without_group(function: Callable) -> Callable:
    def call(*args: Any) -> Any:
        *rest, _, tiles = args  # the last two are the size of the group and the tiles of a list
        return function(*rest, 1, tiles)

    return call


def _own_instance(name: str) -> ModuleType:
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
