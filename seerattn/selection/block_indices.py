"""`BlockIndices`: which key blocks each query block attends to, as padded index lists."""

from __future__ import annotations

from dataclasses import dataclass, replace
from reprlib import repr as short  # a value may be of any size

import torch
from torch import Tensor

PAD = -1


@dataclass(frozen=True)
class BlockIndices:
    """Key blocks kept for every query block of a call.

    Blocks lie on the absolute grid ``position // block``, positions being counted from the first real token of a
    sequence. Row ``i`` of batch element ``b`` is the absolute query block ``q_start[b] // block_q + i``; the first and
    the last query block of a call may be partial.

    Args:
        indices: int32 ``[B, Hm, Nq, K]``, ascending in each row, right-padded with -1.
        counts: int32 ``[B, Hm, Nq]``, number of valid entries of each row; 0 only for a row that holds no query.
        block_q: query block size in tokens.
        block_k: key block size in tokens.
        q_start: int32 ``[B]``, position of the first query token. Like ``q_len`` it is kept on the host whatever the
            device of the lists, so that checking it against a call never waits for a GPU.
        q_len: int32 ``[B]``, number of query tokens; the last query is the last key, so there are
            ``q_start + q_len`` keys.
        skip_threshold: whoever computes the blocks leaves the values of a listed block out where its probabilities are
            below this share of one that the row has met before, see the README of `block_sparse_attention`; in (0, 1].
            None computes every listed block in full. Lists, counts and density are the same with and without.

    Raises:
        ValueError: another threshold.

    Example: 3 query blocks of 64 that keep {0}, {0, 1} and {0, 2} are
    ``indices = [[0, -1], [0, 1], [0, 2]]``, ``counts = [1, 2, 2]``.
    """

    indices: Tensor
    counts: Tensor
    block_q: int
    block_k: int
    q_start: Tensor
    q_len: Tensor
    skip_threshold: float | None = None

    def __post_init__(self) -> None:
        check_skip_threshold(self.skip_threshold)
        for name in ("q_start", "q_len"):
            object.__setattr__(self, name, getattr(self, name).cpu())

    @classmethod
    def from_mask(
        cls, mask: Tensor, *, block_q: int, block_k: int, q_start: int | Tensor = 0, q_len: int | Tensor | None = None
    ) -> BlockIndices:
        """Builds the lists from a bool mask.

        Args:
            mask: bool ``[B, Hm, Nq, Nk]``. Entries beyond the causal edge are dropped.
            block_q: query block size in tokens.
            block_k: key block size in tokens.
            q_start: position of the first query token, an int or int ``[B]``.
            q_len: number of query tokens, an int or int ``[B]``; by default all rows of the mask are full blocks.

        Raises:
            ValueError: a query row has no key to attend to: the blocks that hold its own diagonal are not selected.
        """
        if mask.ndim != 4:
            raise ValueError(f"mask must be [B, Hm, Nq, Nk], got shape {list(mask.shape)}")
        batch, _, num_q_blocks, num_k_blocks = mask.shape
        if q_len is None:
            q_len = (q_start // block_q + num_q_blocks) * block_q - q_start
        geometry = (q_start, q_len, num_q_blocks, num_k_blocks, block_q, block_k)
        allowed = causal_block_mask(*geometry, device=mask.device)[:, None]
        required = forced_block_mask(*geometry, sink_blocks=0, device=mask.device)[:, None]
        missing = (required & ~mask).flatten(2).any(-1)
        mask = mask & allowed
        counts = mask.sum(-1, dtype=torch.int32)
        # One wait for the device; a GPU that many processes share comes back to each of them only in its turn.
        is_missing, width = torch.stack((missing.any().int(), counts.max())).tolist() if counts.numel() else (0, 0)
        if is_missing:
            row, head = (int(x) for x in missing.nonzero()[0])
            raise ValueError(
                f"mask must keep the diagonal block of every query row, got none for batch row {row}, head {head}; "
                "force the diagonal in the policy"
            )
        columns = torch.arange(num_k_blocks, device=mask.device, dtype=torch.int32)
        padded = torch.where(mask, columns, num_k_blocks)
        indices = padded.sort(-1).values[..., : max(width, 1)]
        indices = torch.where(indices == num_k_blocks, PAD, indices).to(torch.int32).contiguous()
        host = torch.device("cpu")
        return cls(indices, counts, block_q, block_k, _per_row(q_start, batch, host), _per_row(q_len, batch, host))

    @classmethod
    def dense(
        cls,
        *,
        batch: int,
        heads: int,
        q_len: int,
        k_len: int,
        block_q: int,
        block_k: int,
        device: torch.device | str = "cpu",
    ) -> BlockIndices:
        """All causal blocks of ``q_len`` queries against ``k_len`` keys."""
        q_start = k_len - q_len
        geometry = (num_query_blocks(q_start, q_len, block_q), -(-k_len // block_k), block_q, block_k)
        causal = causal_block_mask(q_start, q_len, *geometry).sum(-1, dtype=torch.int32)
        columns = torch.arange(max(geometry[1], 1), dtype=torch.int32)
        row = torch.where(columns < causal[..., None], columns, PAD).to(device)
        return cls(
            row[:, None].repeat(batch, heads, 1, 1),
            causal[:, None].to(device).repeat(batch, heads, 1),
            block_q,
            block_k,
            _per_row(q_start, batch, causal.device),
            _per_row(q_len, batch, causal.device),
        )

    @classmethod
    def stack(cls, rows: list[BlockIndices]) -> BlockIndices:
        """Joins calls of different lengths along the batch; shorter ones are padded with empty rows."""
        if not rows:
            raise ValueError("rows must hold at least one BlockIndices, got an empty list")
        if len({(r.block_q, r.block_k, r.num_heads, r.skip_threshold) for r in rows}) > 1:
            raise ValueError("rows must share block_q, block_k, skip_threshold and the number of heads")
        num_q_blocks = max(r.num_q_blocks for r in rows)
        width = max(r.indices.shape[-1] for r in rows)

        def pad(r: BlockIndices) -> tuple[Tensor, Tensor]:
            more_rows = num_q_blocks - r.num_q_blocks
            indices = torch.nn.functional.pad(r.indices, (0, width - r.indices.shape[-1], 0, more_rows), value=PAD)
            return indices, torch.nn.functional.pad(r.counts, (0, more_rows))

        indices, counts = zip(*(pad(r) for r in rows))
        return cls(
            torch.cat(indices),
            torch.cat(counts),
            rows[0].block_q,
            rows[0].block_k,
            torch.cat([r.q_start for r in rows]),
            torch.cat([r.q_len for r in rows]),
            rows[0].skip_threshold,
        )

    @property
    def num_heads(self) -> int:
        return self.indices.shape[1]

    @property
    def num_q_blocks(self) -> int:
        return self.indices.shape[2]

    @property
    def num_k_blocks(self) -> int:
        """Key blocks of the longest sequence of the batch."""
        return -(-int((self.q_start + self.q_len).max()) // self.block_k) if self.q_len.numel() else 0

    def row(self, b: int) -> BlockIndices:
        """Batch element ``b`` alone, cut to its own query blocks."""
        start, length = int(self.q_start[b]), int(self.q_len[b])
        n = num_query_blocks(start, length, self.block_q)
        return replace(
            self,
            indices=self.indices[b : b + 1, :, :n],
            counts=self.counts[b : b + 1, :, :n],
            q_start=self.q_start[b : b + 1],
            q_len=self.q_len[b : b + 1],
        )

    def to_mask(self) -> Tensor:
        """Bool ``[B, Hm, Nq, Nk]``, true where the block is computed."""
        num_k_blocks = self.num_k_blocks
        mask = torch.zeros(*self.indices.shape[:3], num_k_blocks + 1, dtype=torch.bool, device=self.indices.device)
        slots = torch.where(self.indices == PAD, num_k_blocks, self.indices).long()
        return mask.scatter_(-1, slots, True)[..., :num_k_blocks]

    def transpose(self) -> tuple[Tensor, Tensor]:
        """For every key block the query-block rows that visit it, for a backward pass over keys.

        Returns:
            Row indices int32 ``[B, Hm, Nk, R]``, ascending, right-padded with -1 (rows counted within the call, not
            absolute), and their counts int32 ``[B, Hm, Nk]``.
        """
        mask = self.to_mask().transpose(-1, -2)
        counts = mask.sum(-1, dtype=torch.int32)
        width = max(int(counts.max()) if counts.numel() else 0, 1)
        columns = torch.arange(self.num_q_blocks, device=mask.device, dtype=torch.int32)
        rows = torch.where(mask, columns, self.num_q_blocks).sort(-1).values[..., :width]
        return torch.where(rows == self.num_q_blocks, PAD, rows).to(torch.int32).contiguous(), counts

    def with_dense_rows(self, rows: int) -> BlockIndices:
        """The same lists with every causal block in the last ``rows`` query-block rows of each sequence."""
        if rows < 0:
            raise ValueError(f"rows must be at least 0, got {rows}")
        geometry = (self.num_q_blocks, self.num_k_blocks, self.block_q, self.block_k)
        # Computed on the host, where the geometry is: nothing here waits for a GPU.
        causal = causal_block_mask(self.q_start, self.q_len, *geometry).sum(-1, dtype=torch.int32)
        last = (causal > 0).sum(-1, keepdim=True)
        number = torch.arange(self.num_q_blocks)
        dense = (number >= last - rows) & (number < last)
        if not dense.any():
            return self
        width = max(self.indices.shape[-1], int(causal[dense].max()))
        dense, causal = (x.to(self.counts.device)[:, None] for x in (dense, causal))
        columns = torch.arange(width, device=self.counts.device, dtype=torch.int32)
        every = torch.where(columns < causal[..., None], columns, PAD)
        kept = torch.nn.functional.pad(self.indices, (0, width - self.indices.shape[-1]), value=PAD)
        return replace(
            self,
            indices=torch.where(dense[..., None], every, kept).contiguous(),
            counts=torch.where(dense, causal, self.counts),
        )

    def density(self) -> Tensor:
        """Realised density, float64 ``[B, Hm]``: computed blocks over causal blocks, forced blocks included."""
        causal = causal_block_mask(
            self.q_start, self.q_len, self.num_q_blocks, self.num_k_blocks, self.block_q, self.block_k
        )
        return self.counts.sum(-1).double() / causal.flatten(1).sum(-1).double()[:, None].to(self.counts.device)


def check_skip_threshold(value: object) -> None:
    """Refuses what no block can be skipped by.

    Raises:
        ValueError: it is neither None nor a number in (0, 1].
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value <= 1):
        raise ValueError(f"skip_threshold must be a number above 0, at most 1, or None, got {short(value)}")


def num_query_blocks(q_start: int, q_len: int, block_q: int) -> int:
    """Query blocks that ``q_len`` tokens from position ``q_start`` on touch."""
    return (q_start + q_len - 1) // block_q - q_start // block_q + 1 if q_len > 0 else 0


def causal_block_mask(
    q_start: int | Tensor,
    q_len: int | Tensor,
    num_q_blocks: int,
    num_k_blocks: int,
    block_q: int,
    block_k: int,
    *,
    device: torch.device | None = None,
) -> Tensor:
    """Bool ``[B, Nq, Nk]``: blocks that hold at least one (query, key) pair with key <= query.

    It is made on ``device``, by default that of ``q_start`` or ``q_len``, of ints the CPU.
    """
    q_start, q_len = _rows_of(q_start, q_len, device)
    _, last = _query_block_edges(q_start, q_len, num_q_blocks, block_q)
    keys = torch.arange(num_k_blocks, device=q_start.device) * block_k
    return keys <= last[..., None]


def forced_block_mask(
    q_start: int | Tensor,
    q_len: int | Tensor,
    num_q_blocks: int,
    num_k_blocks: int,
    block_q: int,
    block_k: int,
    sink_blocks: int = 1,
    *,
    device: torch.device | None = None,
) -> Tensor:
    """Bool ``[B, Nq, Nk]``: blocks that selection keeps whatever their score: the diagonal and the first ones.

    ``device`` is as of `causal_block_mask`.
    """
    geometry = (*_rows_of(q_start, q_len, device), num_q_blocks, num_k_blocks)
    forced = _diagonal_block_mask(*geometry, block_q, block_k)
    if sink_blocks:
        forced[..., :sink_blocks] |= causal_block_mask(*geometry, block_q, block_k)[..., :sink_blocks]
    return forced


def _diagonal_block_mask(
    q_start: Tensor, q_len: Tensor, num_q_blocks: int, num_k_blocks: int, block_q: int, block_k: int
) -> Tensor:
    """Bool ``[B, Nq, Nk]``: key blocks that hold the own position of some query of the row."""
    first, last = _query_block_edges(q_start, q_len, num_q_blocks, block_q)
    keys = torch.arange(num_k_blocks, device=q_start.device) * block_k
    return (keys <= last[..., None]) & (keys + block_k > first[..., None]) & (last[..., None] >= 0)


def _query_block_edges(q_start: Tensor, q_len: Tensor, num_q_blocks: int, block_q: int) -> tuple[Tensor, Tensor]:
    """First and last position of each query block, ``[B, Nq]``; the last is -1 for a row that holds no query."""
    block = q_start[:, None] // block_q + torch.arange(num_q_blocks, device=q_start.device)
    first = torch.maximum(block * block_q, q_start[:, None])
    end = (q_start + q_len)[:, None]
    last = torch.minimum((block + 1) * block_q, end) - 1
    return first, torch.where(first < end, last, -1)


def _rows_of(q_start: int | Tensor, q_len: int | Tensor, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """Both as int32 ``[B]``."""
    batch = next((x.numel() for x in (q_start, q_len) if isinstance(x, Tensor)), 1)
    device = device or next((x.device for x in (q_start, q_len) if isinstance(x, Tensor)), torch.device("cpu"))
    return _per_row(q_start, batch, device), _per_row(q_len, batch, device)


def _per_row(value: int | Tensor, batch: int, device: torch.device) -> Tensor:
    if isinstance(value, int):
        return torch.full((batch,), value, dtype=torch.int32, device=device)
    if value.shape != (batch,):
        raise ValueError(f"q_start and q_len must be ints or [{batch}], got shape {list(value.shape)}")
    return value.to(device=device, dtype=torch.int32)
