"""`impl="triton"` of `select_blocks`: two kernels; one before them halves weights, one after them expands lists."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from triton.tools.tensor_descriptor import TensorDescriptor

from seerattn.ops.gate_scores.api import Gate, GateForm, KeyVectors, Rotary, Rule
from seerattn.ops.gate_scores.kernels import choice
from seerattn.ops.gate_scores.kernels.launch import POOL_WARPS, POOL_WINDOWS, rotation_of, table_refusal
from seerattn.ops.gate_scores.kernels.scores import score_and_choose_kernel
from seerattn.ops.gate_scores.kernels.vectors import halve_kernel, vectors_kernel
from seerattn.ops.launch import multiprocessors, on_device, power_of_2
from seerattn.selection.block_indices import BlockIndices, num_query_blocks

LOG2_E = 1.4426950408889634
RULES = {
    "count": choice.COUNT.value,
    "share": choice.SHARE.value,
    "softmax": choice.SOFTMAX.value,
    "score": choice.SCORE.value,
    "mass": choice.MASS.value,
}
MAX_KEY_BLOCKS = 8192


@dataclass(frozen=True)
class Launch:
    """How a call is walked.

    Attributes:
        windows_q: query windows of a strip, whose scores a program holds in its scratch.
        windows_k: key windows of a tile.
        num_warps: warps of a program that scores and chooses.
        num_stages: depth of its pipeline of key tiles.
        programs: its resident programs of a multiprocessor.
        registers: most registers of its threads, so that so many programs fit; None leaves it to the compiler.
        planes: 2 multiplies as accurately as fp32, 1 as TF32.
        pool_windows: windows that are projected at once.
        pool_step: tokens of each window that are read at once.
        pool_stages: depth of the pipeline of these steps.
        pool_programs: resident programs of a multiprocessor that pool and project.
        pool_registers: most registers of their threads.
    """

    windows_q: int
    windows_k: int
    num_warps: int
    num_stages: int
    programs: int
    planes: int
    registers: int | None = None
    pool_windows: int = 64
    pool_step: int = 1
    pool_stages: int = 5
    pool_programs: int = 2
    pool_registers: int | None = None


def choose_launch(form: GateForm, *, num_q_blocks: int, gate_width: int) -> Launch:
    """Picks a launch from the form of a gate and the size of a call.

    More than 8 scores a block pair: one H200, bf16, 32/8 heads of 128, ms (`research/kernels/gate_launches.py`). 8 x 8
    sub-blocks at 128k tokens: two programs a multiprocessor that score and four that pool 5.24; one and two 6.07; two
    of 4 warps with tiles of 128 x 64 6.43. Pooled by salience, of sums, the first two take 5.32 and 6.23, at 32k .56
    and .64, at 8k .128 and .140. With 9/3 heads of 64 at 8k, three programs of 64 x 128 take .054 (8 x 8) and .060
    (16 x 16), one of 128 x 128 .058 and .079. One list a KV group, 128k: 2.12, and 1.54 with 4 x 8; no other launch
    was timed there, and none for gates of more than 128 channels or calls of fewer than 1024 query windows.

    Up to 8: one H100, the same shape, 128k tokens, an earlier version of the kernels, by strip x tile, warps and
    stages. Paper's form: 32 x 64, 4, 3: 2.38; 16 x 64: 2.58; 64 x 64: 2.65; 32 x 128: 2.70; in the end 1.93. Programs
    that pool (2 to 8 a multiprocessor) moved it by less than 10 %.
    """
    if form.query_subblocks * form.key_subblocks > 8:
        # So many products that each is one of fp16 parts, or the multiplication would take most of the time.
        short = num_q_blocks * form.query_subblocks < 1024
        if gate_width > 128:
            launch = Launch(64 if short else 128, 64, 8, 3, 1, 1, pool_windows=32)
        elif short or (gate_width <= 64 and num_q_blocks <= 256):
            # Strips of few rows make enough programs.
            launch = Launch(64, 128, 4, 2, 3, 1, registers=168, pool_programs=3, pool_stages=3)
        elif form.share == "kv_group":
            launch = Launch(128, 128, 8, 2, 2, 1, registers=128, pool_programs=3, pool_registers=168)
        else:
            launch = Launch(128, 128, 8, 2, 2, 1, registers=128, pool_programs=4, pool_registers=128)
        # Sub-blocks of a block are of one tile, and those of keys are made together, as they share a scale.
        return replace(
            launch,
            windows_q=max(launch.windows_q, form.query_subblocks),
            windows_k=max(launch.windows_k, form.key_subblocks),
            pool_windows=max(launch.pool_windows, form.key_subblocks),
        )
    if form.query_subblocks > 1:
        return Launch(128 if num_q_blocks > 256 else 64, 64, 8, 3, 1, 2)
    pool = {"pool_windows": 16, "pool_programs": 2 if form.q_linear else 3}
    if num_q_blocks <= 256:
        # Strips of few rows make enough programs of a short prompt.
        return Launch(16, 64, 4, 3, 2 if gate_width <= 128 else 1, 2, **pool)
    return Launch(32, 64, 4, 2, 3, 2, registers=168, **pool)


def refusal(q: Tensor, k: Tensor, gate: Gate, rule: Rule | None, rotary: Rotary) -> str | None:
    """Why this implementation cannot serve a call, in a sentence; None if it can."""
    if rule is None:
        return "it does not know this policy"
    if gate.config.distance_bias:
        return "it has no distance bias"
    if gate.gate_dim > 256:
        return f"it takes gates of width 256 at most, got {gate.gate_dim}"
    if -(-k.shape[2] // gate.config.block_k) > MAX_KEY_BLOCKS:
        return f"it holds rows of {MAX_KEY_BLOCKS} key blocks at most, got {-(-k.shape[2] // gate.config.block_k)}"
    weights = [w for w in (gate.q_salience, gate.k_salience, gate.q_weight, gate.k_weight) if w is not None]
    if any(w.dtype != torch.float32 for w in weights):
        return f"it takes gates in fp32, got {weights[-1].dtype}"
    return table_refusal(q, rotary) or table_refusal(k, rotary)


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k: Tensor,
    gate: Gate,
    rule: Rule,
    rotary: Rotary,
    inv_freq: Tensor | None = None,
    keys: KeyVectors | None = None,
    launch: Launch | None = None,
) -> BlockIndices:
    """See `api.select_blocks`, which validates the arguments."""
    form, device = gate.config, q.device
    batch, q_heads, q_len, dim = q.shape
    k_heads, k_len = k.shape[1], k.shape[2]
    q_start, heads = k_len - q_len, gate.mask_heads
    num_q_blocks = num_query_blocks(q_start, q_len, form.block_q)
    num_k_blocks = -(-k_len // form.block_k)
    half = max(16, power_of_2(gate.gate_dim // 2))
    launch = launch or choose_launch(form, num_q_blocks=num_q_blocks, gate_width=2 * half)

    # Gate vectors [planes, B, heads, windows, 2 * half]. Key windows are padded to whole tiles.
    q_rows = num_q_blocks * form.query_subblocks
    k_windows = -(-k_len // form.k_size)
    k_rows = -(-k_windows // launch.windows_k) * launch.windows_k
    made_k_heads = gate.k_weight.shape[0]
    gate_q = torch.empty(launch.planes, batch, heads, q_rows, 2 * half, dtype=torch.float16, device=device)
    gate_k = torch.empty(launch.planes, batch, made_k_heads, k_rows, 2 * half, dtype=torch.float16, device=device)
    q_scales = torch.empty(batch, heads, q_rows, dtype=torch.float32, device=device)
    k_scales = torch.empty(batch, made_k_heads, k_rows // form.key_subblocks, dtype=torch.float32, device=device)
    finished = 0 if keys is None else _take(keys, launch, gate_k, k_scales, (k_len - 1) // form.block_k)
    k_begin = finished * form.block_k
    first_window = q_start // form.block_q * form.query_subblocks
    q_side = _side("Q", form.q_size, form.q_pooling, form.q_linear, launch)
    k_side = _side("K", form.k_size, form.k_pooling, True, launch)
    q_tiles = -(-q_rows // q_side["Q_M"])
    k_tiles = -(-k_windows // k_side["K_M"]) - k_begin // form.k_size // k_side["K_M"]
    k_items = k_tiles * batch * k_heads
    items = k_items + q_tiles * batch * heads
    programs = min(items, launch.pool_programs * multiprocessors(device))
    slot = max(k_side["K_M"] * len(form.k_pooling), q_side["Q_M"] * len(form.q_pooling)) * dim
    coarse = launch.planes == 1
    features = torch.empty(programs, slot, dtype=torch.float16 if coarse else torch.float32, device=device)
    scales = max(k_side["K_M"], q_side["Q_M"])
    feature_scales = torch.empty(programs, scales, dtype=torch.float32, device=device)
    k_weight, k_weight_scales = _halved(gate.k_weight) if coarse else (gate.k_weight, feature_scales)
    q_weight, q_weight_scales = k_weight, k_weight_scales
    if form.q_linear:
        q_weight, q_weight_scales = _halved(gate.q_weight) if coarse else (gate.q_weight, feature_scales)
    cos, sin, cos_strides, sin_strides, rotation = rotation_of(rotary, q, dim)
    vectors_kernel[(programs,)](
        q,
        *q.stride()[:3],
        k,
        *k.stride()[:3],
        cos,
        *cos_strides,
        sin,
        *sin_strides,
        gate.k_weight if gate.q_salience is None else gate.q_salience,
        gate.k_weight if gate.k_salience is None else gate.k_salience,
        q_weight,
        q_weight_scales,
        k_weight,
        k_weight_scales,
        gate.q_norm.weight if form.qk_norm else gate.k_weight,
        gate.k_norm.weight if form.qk_norm else gate.k_weight,
        gate.k_weight if not form.rope else gate.inv_freq if inv_freq is None else inv_freq,
        features,
        feature_scales,
        gate_q,
        gate_q.stride(0),
        q_scales,
        gate_k,
        gate_k.stride(0),
        k_scales,
        heads,
        q_tiles,
        q_rows,
        first_window,
        k_heads,
        k_tiles,
        k_rows,
        k_items,
        items,
        q_start,
        q_len,
        k_begin,
        **q_side,
        Q_MEMBERS=q_heads // heads,
        Q_LINEAR=form.q_linear,
        **k_side,
        K_OUTPUTS=made_k_heads // k_heads,
        K_TILE=launch.windows_k,
        K_SUBBLOCKS=form.key_subblocks,
        FEATURES=slot,
        SCALES=scales,
        D=dim,
        HALF=max(16, power_of_2(dim // 2)),
        **rotation,
        NORM=form.qk_norm,
        ROPE=form.rope,
        DG=gate.gate_dim,
        GATE_HALF=half,
        # Without rotation any pairs serve, and halves are the fastest.
        PAIRED=gate.pairing.width if form.rope else gate.gate_dim,
        ALTERNATING=gate.pairing.interleaved and form.rope,
        PLANES=launch.planes,
        PRECISION="tf32" if coarse else "tf32x3",
        DEPTH=64 if coarse else 32,
        STAGES=launch.pool_stages,
        CONTINUED=k_begin > 0,
        num_warps=POOL_WARPS,
        num_stages=2,
        maxnreg=launch.pool_registers,
    )

    if keys is not None:
        keys.blocks, keys.vectors, keys.scales = k_len // form.block_k, gate_k, k_scales
        keys.layout = _layout(launch)

    # Block scores and the choice.
    strip = launch.windows_q // form.query_subblocks
    items = -(-num_q_blocks // strip) * batch * heads
    programs = min(items, launch.programs * multiprocessors(device))
    tile = _row_tile(num_k_blocks, strip, launch.num_warps)
    stride = max(k_rows // form.key_subblocks, tile["C"] * tile["P"] * tile["L"])
    scratch_rows = launch.windows_q if form.normalize_subblocks else strip
    scratch = torch.empty(programs, scratch_rows, stride, dtype=torch.float32, device=device)
    log_totals = torch.empty(programs, launch.windows_q, dtype=torch.float32, device=device)
    counts = torch.empty(batch, heads, num_q_blocks, dtype=torch.int32, device=device)
    listed = rule.kind in ("count", "share")
    if listed:
        geometry = (q_start, q_len, form.block_q, form.block_k)
        width = _list_width(rule, geometry)
        indices = torch.empty(batch, heads, num_q_blocks, width, dtype=torch.int32, device=device)
        words, word_stride = counts, 1
    else:
        word_stride = -(-num_k_blocks // 32)
        words = torch.empty(batch, heads, num_q_blocks, word_stride, dtype=torch.int32, device=device)
        indices, width = counts, 1
    per_head = isinstance(rule.setting, tuple)
    score_and_choose_kernel[(programs,)](
        gate_q,
        gate_q.stride(0),
        q_scales,
        TensorDescriptor.from_tensor(gate_k.view(-1, 2 * half), [launch.windows_k, 2 * half]),
        k_scales,
        scratch,
        log_totals,
        on_device(rule.setting, torch.float32, device) if per_head else q_scales,
        indices,
        counts,
        words,
        items,
        heads,
        heads // made_k_heads,
        q_rows,
        k_rows,
        batch * made_k_heads * k_rows,
        stride,
        width,
        word_stride,
        q_start,
        k_len,
        first_window,
        num_q_blocks,
        gate.gate_dim**-0.5 * LOG2_E,
        0.0 if per_head else float(rule.setting),
        rule.sink_blocks,
        num_q_blocks - rule.last_rows_dense,
        BM=launch.windows_q,
        BN=launch.windows_k,
        WIDTH_D=2 * half,
        BLOCK_Q=form.block_q,
        BLOCK_K=form.block_k,
        Q_SUBBLOCKS=form.query_subblocks,
        K_SUBBLOCKS=form.key_subblocks,
        PLANES=launch.planes,
        NORMALIZE=form.normalize_subblocks,
        SUM=form.target_keys == "sum" and form.key_subblocks > 1,
        POWER=form.target_power if form.target_power and form.query_subblocks > 1 else math.inf,
        FORCED_SCORED=rule.forced_scored,
        RULE=RULES[rule.kind],
        PER_HEAD=per_head,
        **tile,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        maxnreg=launch.registers,
    )
    if not listed:
        width = max(int(counts.max()), 1)
        indices = torch.empty(batch, heads, num_q_blocks, width, dtype=torch.int32, device=device)
        expand_chunk = min(1024, power_of_2(num_k_blocks))
        choice.expand_kernel[(counts.numel(),)](
            words, counts, indices, word_stride, width, CHUNK=max(128, expand_chunk), num_warps=1
        )
    host = {"dtype": torch.int32, "device": "cpu"}
    return BlockIndices(
        indices,
        counts,
        form.block_q,
        form.block_k,
        torch.full((batch,), q_start, **host),
        torch.full((batch,), q_len, **host),
    )


def _layout(launch: Launch) -> tuple:
    """What decides where a gate key lies among others."""
    return launch.planes, launch.windows_k


def _take(keys: KeyVectors, launch: Launch, gate_k: Tensor, scales: Tensor, most: int) -> int:
    """Copies gate keys of an earlier call to where this one has them; of how many blocks they are, ``most`` at most."""
    old = keys.vectors
    if old is None or keys.layout != _layout(launch) or old.device != gate_k.device:
        return 0
    if old[:, :, :, 0].shape != gate_k[:, :, :, 0].shape:
        return 0
    rows, blocks = min(old.shape[3], gate_k.shape[3]), min(keys.scales.shape[2], scales.shape[2])
    gate_k[:, :, :, :rows] = old[:, :, :, :rows]
    scales[:, :, :blocks] = keys.scales[:, :, :blocks]
    return min(keys.blocks, most)


def _halved(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of each head in fp16 and the power of two that they lack; kept until somebody writes to the weights."""
    if weight.is_inference() or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _halve(weight)
    state = weight.data_ptr(), weight._version
    found = _HALVED.get(weight)
    if found is None or found[0] != state:
        found = _HALVED[weight] = state, _halve(weight)
    return found[1]


# By the tensor itself, weakly. To launch the kernel again in every layer takes the host 40 us for queries and for keys.
_HALVED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@torch.inference_mode(False)
def _halve(weight: Tensor) -> tuple[Tensor, Tensor]:
    heads, count = weight.shape[0], weight[0].numel()
    weight = weight.contiguous()
    out = torch.empty_like(weight, dtype=torch.float16)
    scales = torch.empty(heads, dtype=torch.float32, device=weight.device)
    halve_kernel[(heads,)](weight, out, scales, COUNT=count, CHUNK=8192, num_warps=8)
    return out, scales


def _side(name: str, size: int, kinds: tuple[str, ...], linear: bool, launch: Launch) -> dict[str, Any]:
    """Constants of the pooling of queries or keys."""
    windows = launch.pool_windows if linear and size <= 16 else POOL_WINDOWS
    step = min(launch.pool_step, size)
    values = {"M": windows, "SIZE": size, "STEP": step, "PART": POOL_WINDOWS, "KINDS": kinds}
    return {f"{name}_{key}": value for key, value in values.items()}


def _row_tile(num_k_blocks: int, strip: int, num_warps: int) -> dict[str, int]:
    """Shape ``[R, C, P, L]`` of rows that are chosen for at once: 64 scores a thread, a row to a warp if it fits.

    `P` is how many places in a row are counted in one word.
    """
    width = max(128, power_of_2(num_k_blocks))
    rows = min(strip, max(1, 64 * 32 * num_warps // width))
    lanes = min(width, 128 * max(1, num_warps // rows))
    packed = min(width // lanes, 4 if lanes < 256 else 2)
    return {"R": rows, "C": width // lanes // packed, "P": packed, "L": lanes}


def _list_width(rule: Rule, geometry: tuple[int, int, int, int]) -> int:
    settings = rule.setting if isinstance(rule.setting, tuple) else (rule.setting,)
    return _longest_list(rule.kind, max(settings), rule.sink_blocks, rule.last_rows_dense, *geometry)


@lru_cache(maxsize=256)
def _longest_list(
    kind: str,
    setting: float,
    sink_blocks: int,
    last_rows_dense: int,
    q_start: int,
    q_len: int,
    block_q: int,
    block_k: int,
) -> int:
    """Blocks that a count or a share keeps of the fullest row; known without looking at a score."""
    block = torch.arange(q_start // block_q, (q_start + q_len - 1) // block_q + 1)
    begin, last = (block * block_q).clamp(min=q_start), ((block + 1) * block_q).clamp(max=q_start + q_len) - 1
    causal = last // block_k + 1
    first_diagonal = begin // block_k
    forced = causal - first_diagonal + first_diagonal.clamp(max=sink_blocks)
    kept = (causal * setting).ceil() if kind == "share" else torch.full_like(causal, int(setting))
    kept = torch.minimum(torch.maximum(kept.long(), forced), causal)
    if last_rows_dense:
        kept[-last_rows_dense:] = causal[-last_rows_dense:]
    return max(1, int(kept.max()))
