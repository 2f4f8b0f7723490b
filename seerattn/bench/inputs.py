"""What kernels are timed on: random queries, keys and values, and random blocks of an exact density."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seerattn.selection.block_indices import BlockIndices, causal_block_mask, forced_block_mask
from seerattn.selection.decode_blocks import DecodeBlocks
from seerattn.texts import short


@dataclass(frozen=True)
class Shape:
    """Heads of an attention layer; the defaults are those of Llama-3.1-8B.

    Attributes:
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: channels of a head.
        dtype: of queries, keys and values.
    """

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_dim) < 1 or self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")

    @classmethod
    def parse(cls, text: str, dtype: torch.dtype) -> Shape:
        """Reads "32x8x128", query heads x key/value heads x channels of a head.

        Raises:
            ValueError: it is something else, or no layer has it.
        """
        numbers = text.split("x")
        if len(numbers) != 3 or not all(number.isdecimal() and len(number) < 10 for number in numbers):
            raise ValueError(f"shape must be HEADSxKV_HEADSxHEAD_DIM such as 32x8x128, got {short(text)}")
        return cls(*map(int, numbers), dtype)

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads} heads of {self.head_dim}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def random_qkv(
    shape: Shape, tokens: int, device: torch.device, *, seed: int = 0, drift: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal queries ``[1, H, T, D]``, keys and values ``[1, HKV, T, D]``.

    Args:
        shape: their heads and dtype.
        tokens: ``T``.
        device: where to draw them.
        seed: of the draw.
        drift: standard deviation of a part that 16 neighbouring tokens share, so that blocks differ from each other.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(heads: int) -> Tensor:
        x = torch.randn(1, heads, tokens, shape.head_dim, dtype=shape.dtype, device=device, generator=generator)
        if drift:
            size = (1, heads, -(-tokens // 16), shape.head_dim)
            shared = torch.randn(size, dtype=shape.dtype, device=device, generator=generator)
            x = x + drift * shared.repeat_interleave(16, 2)[:, :, :tokens]
        return x

    return draw(shape.heads), draw(shape.kv_heads), draw(shape.kv_heads)


def uneven_qkv(shape: Shape, tokens: int, device: torch.device, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as `random_qkv`, whose heads look at the beginning and at what is near, more or less.

    What a threshold on the running maximum skips depends on how uneven attention is: of normal queries and keys it
    skips next to nothing. Here a logit is the sum of three parts. The first four keys have one of 2 to 12, by KV head,
    as sinks do. Every key has one of 0 to 16 at most, by query head of a group, that falls about as the logarithm of
    its distance, as many frequencies of a rotation give. The rest is normal, with a standard deviation just below 1. No
    model was asked: times are to be read by the share that was skipped, and that share says nothing of a model.
    """
    q, k, v = random_qkv(shape, tokens, device, seed=seed)
    group, width = shape.heads // shape.kv_heads, shape.head_dim
    count = max(1, width // 8)
    frequency = torch.logspace(0, -5, count, device=device)
    angle = torch.arange(tokens, device=device)[:, None] * frequency
    place = torch.cat((angle.cos(), angle.sin()), -1)
    near = torch.linspace(0, 16, group, device=device).repeat(shape.kv_heads)
    sink = torch.linspace(2, 12, shape.kv_heads, device=device).repeat_interleave(group)
    q[..., : 2 * count] = (place * near[:, None, None] * width**0.5 / count).to(q.dtype)
    k[..., : 2 * count] = place.to(k.dtype)
    q[..., -1] = (sink * width**0.5 / 8)[:, None].to(q.dtype)
    k[..., -1] = 0
    k[:, :, :4, -1] = 8
    return q, k, v


def random_blocks(
    *,
    mask_heads: int,
    tokens: int,
    block_q: int,
    block_k: int,
    density: float,
    device: torch.device,
    seed: int = 0,
    rows_alike: int = 1,
) -> BlockIndices:
    """Blocks drawn evenly from the causal area, every head for itself, with the diagonal kept.

    Each head gets exactly the number of blocks that comes nearest to the density, the diagonal included; fewer than
    the diagonal are never kept.

    Args:
        mask_heads: heads that have lists of their own, ``H`` or ``HKV``.
        tokens: length of the prompt.
        block_q: query block size in tokens.
        block_k: key block size in tokens.
        density: share of the causal block area, in (0, 1].
        device: where the lists go.
        seed: of the draw.
        rows_alike: so many neighbouring query blocks draw the same key blocks. 1 is the worst case for caches; the
            rows of real gates overlap.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    rows, columns = -(-tokens // block_q), -(-tokens // block_k)
    geometry = (0, tokens, rows, columns, block_q, block_k)
    causal = causal_block_mask(*geometry)[0].to(device)
    forced = forced_block_mask(*geometry, sink_blocks=0)[0].to(device)
    count = max(round(density * int(causal.sum())), int(forced.sum()))
    generator = torch.Generator(device).manual_seed(seed)
    mask = torch.zeros(1, mask_heads, rows, columns, dtype=torch.bool, device=device)
    for head in range(mask_heads):
        draw = torch.rand(-(-rows // rows_alike), columns, device=device, generator=generator)
        draw = draw.repeat_interleave(rows_alike, 0)[:rows]
        draw = draw.masked_fill(~causal, -1.0).masked_fill_(forced, 2.0)
        mask[0, head].view(-1)[draw.view(-1).topk(count, sorted=False).indices] = True
    return BlockIndices.from_mask(mask, block_q=block_q, block_k=block_k, q_start=0, q_len=tokens)


def random_lists(
    shape: Shape, lengths: Tensor, tokens: int, *, block_k: int, density: float, seed: int = 0
) -> DecodeBlocks:
    """As many random blocks of every list as the density says, the first one and that of the token among them.

    Args:
        shape: whose KV heads have lists.
        lengths: int32 ``[B]``, keys of every sequence.
        tokens: the most of them, by which blocks are counted.
        block_k: key block size in tokens.
        density: share of the blocks.
        seed: of the draw.
    """
    number, device = -(-tokens // block_k), lengths.device
    count = max(min(2, number), round(density * number))
    generator = torch.Generator(device).manual_seed(seed)
    draw = torch.rand(len(lengths), shape.kv_heads, number, device=device, generator=generator)
    block = torch.arange(number, device=device)
    last = (lengths[:, None, None] - 1) // block_k
    draw = draw.masked_fill(block > last, -1).masked_fill((block == 0) | (block == last), 2)
    kept = draw.topk(count, sorted=False)
    mask = torch.zeros_like(draw, dtype=torch.bool).scatter_(-1, kept.indices, kept.values >= 0)
    return DecodeBlocks.from_mask(mask, block_k=block_k, width=count)
