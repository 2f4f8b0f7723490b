"""Index lists against brute force over token pairs."""

from dataclasses import replace

import pytest
import torch

from seerattn.selection import BlockIndices
from seerattn.selection.block_indices import causal_block_mask, forced_block_mask, num_query_blocks

GEOMETRIES = [(0, 1), (0, 64), (0, 65), (0, 200), (10, 200), (63, 2), (128, 128), (130, 70), (200, 1)]
BLOCKS = [(64, 64), (32, 64), (64, 32), (128, 32)]


def brute(q_start: int, q_len: int, block_q: int, block_k: int, sink: int = 1):
    """Causal, diagonal and forced blocks by looking at every pair of tokens."""
    rows = num_query_blocks(q_start, q_len, block_q)
    keys = -(-(q_start + q_len) // block_k)
    causal, forced = torch.zeros(2, rows, keys, dtype=torch.bool)
    for t in range(q_start, q_start + q_len):
        i = t // block_q - q_start // block_q
        for s in range(t + 1):
            causal[i, s // block_k] = True
            if s // block_k < sink:
                forced[i, s // block_k] = True
        forced[i, t // block_k] = True
    return causal, forced


def random_lists(q_start: int, q_len: int, block_q: int, block_k: int, seed: int = 0):
    causal, forced = brute(q_start, q_len, block_q, block_k, sink=0)
    g = torch.Generator().manual_seed(seed)
    mask = (torch.rand(2, 3, *causal.shape, generator=g) < 0.4) & causal | forced
    built = BlockIndices.from_mask(mask, block_q=block_q, block_k=block_k, q_start=q_start, q_len=q_len)
    return mask, causal, built


@pytest.mark.parametrize(("q_start", "q_len"), GEOMETRIES)
@pytest.mark.parametrize(("block_q", "block_k"), BLOCKS)
def test_causal_and_forced_masks_match_brute_force(q_start, q_len, block_q, block_k) -> None:
    causal, forced = brute(q_start, q_len, block_q, block_k)
    shape = (q_start, q_len, *causal.shape, block_q, block_k)
    assert torch.equal(causal_block_mask(*shape)[0], causal)
    assert torch.equal(forced_block_mask(*shape)[0], forced)


@pytest.mark.parametrize(("q_start", "q_len"), GEOMETRIES)
@pytest.mark.parametrize(("block_q", "block_k"), BLOCKS)
def test_lists_survive_a_round_trip_and_count_what_they_hold(q_start, q_len, block_q, block_k) -> None:
    mask, causal, built = random_lists(q_start, q_len, block_q, block_k)
    assert torch.equal(built.to_mask(), mask)
    assert torch.equal(built.counts, mask.sum(-1, dtype=torch.int32))
    for b in range(2):
        for h in range(3):
            for i in range(mask.shape[2]):
                kept = mask[b, h, i].nonzero().flatten().tolist()
                row = built.indices[b, h, i].tolist()
                assert row == kept + [-1] * (len(row) - len(kept))
    expected = mask.sum((-1, -2)).double() / causal.sum()
    assert torch.equal(built.density(), expected)


@pytest.mark.parametrize(("q_start", "q_len"), GEOMETRIES)
def test_transpose_lists_the_rows_of_every_key_block(q_start, q_len) -> None:
    mask, _, built = random_lists(q_start, q_len, 64, 32)
    rows, counts = built.transpose()
    assert torch.equal(counts, mask.sum(2, dtype=torch.int32))
    for b in range(2):
        for h in range(3):
            for j in range(mask.shape[3]):
                kept = mask[b, h, :, j].nonzero().flatten().tolist()
                assert rows[b, h, j].tolist() == kept + [-1] * (rows.shape[-1] - len(kept))


@pytest.mark.parametrize(("q_start", "q_len"), GEOMETRIES)
@pytest.mark.parametrize(("block_q", "block_k"), BLOCKS)
def test_dense_lists_hold_every_causal_block(q_start, q_len, block_q, block_k) -> None:
    causal, _ = brute(q_start, q_len, block_q, block_k)
    sizes = {"q_len": q_len, "k_len": q_start + q_len, "block_q": block_q, "block_k": block_k}
    built = BlockIndices.dense(batch=2, heads=3, **sizes)
    same = BlockIndices.from_mask(
        causal.expand(2, 3, -1, -1), block_q=block_q, block_k=block_k, q_start=q_start, q_len=q_len
    )
    for name in ("indices", "counts", "q_start", "q_len"):
        assert getattr(built, name).dtype == torch.int32
        assert torch.equal(getattr(built, name), getattr(same, name))


def test_the_threshold_of_skipping_stays_with_lists_however_they_are_cut_and_joined() -> None:
    _, _, built = random_lists(10, 200, 64, 64)
    skipping = replace(built, skip_threshold=0.1)
    stacked = BlockIndices.stack([skipping.row(0), skipping.row(1)])
    for lists in (skipping.row(1), stacked, stacked.with_dense_rows(1)):
        assert lists.skip_threshold == 0.1
    assert torch.equal(skipping.density(), built.density())
    with pytest.raises(ValueError, match=r"rows must share .* skip_threshold"):
        BlockIndices.stack([built, skipping])


def test_stack_keeps_every_row_and_its_geometry() -> None:
    masks, lists = [], []
    for seed, (q_start, q_len) in enumerate([(0, 200), (10, 65), (0, 1)]):
        mask, _, built = random_lists(q_start, q_len, 64, 64, seed)
        masks.append(mask)
        lists.append(built)
    stacked = BlockIndices.stack(lists)
    assert stacked.q_start.tolist() == [0, 0, 10, 10, 0, 0]
    for b in range(6):
        assert torch.equal(stacked.row(b).to_mask()[0], masks[b // 2][b % 2])
        assert torch.equal(stacked.density()[b], lists[b // 2].density()[b % 2])


def test_dense_keeps_every_causal_block_and_drops_the_rest() -> None:
    built = BlockIndices.dense(batch=1, heads=2, q_len=130, k_len=200, block_q=64, block_k=64)
    causal, _ = brute(70, 130, 64, 64)
    assert torch.equal(built.to_mask()[0, 0], causal)
    assert torch.equal(built.density(), torch.ones(1, 2, dtype=torch.float64))


def test_a_row_without_its_diagonal_cannot_be_built() -> None:
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    mask[0, 0, 1, 1] = False
    with pytest.raises(ValueError, match="diagonal block of every query row"):
        BlockIndices.from_mask(mask, block_q=64, block_k=64)


def test_a_tall_query_block_needs_all_blocks_its_diagonal_crosses() -> None:
    mask = torch.tensor([[[[False, True]]]])
    with pytest.raises(ValueError, match="diagonal block of every query row"):
        BlockIndices.from_mask(mask, block_q=128, block_k=64)


@pytest.mark.parametrize(("q_start", "q_len"), GEOMETRIES)
@pytest.mark.parametrize(("block_q", "block_k"), BLOCKS)
@pytest.mark.parametrize("rows", [0, 1, 2, 50])
def test_dense_rows_match_brute_force(q_start, q_len, block_q, block_k, rows: int) -> None:
    mask, causal, built = random_lists(q_start, q_len, block_q, block_k)
    expected = mask.clone()
    first = max(0, causal.shape[0] - rows)
    expected[:, :, first:] = causal[first:]
    dense = built.with_dense_rows(rows)
    assert torch.equal(dense.to_mask(), expected)
    same = BlockIndices.from_mask(expected, block_q=block_q, block_k=block_k, q_start=q_start, q_len=q_len)
    assert torch.equal(dense.counts, same.counts) and dense.counts.dtype == torch.int32
    width = same.indices.shape[-1]
    assert torch.equal(dense.indices[..., :width], same.indices) and (dense.indices[..., width:] == -1).all()


def test_dense_rows_are_those_of_each_sequence_of_a_stack() -> None:
    built = [random_lists(0, length, 32, 32, seed)[2] for seed, length in enumerate((70, 333, 32))]
    together = BlockIndices.stack(built).with_dense_rows(2)
    for number, alone in enumerate(built * 2):
        expected = alone.with_dense_rows(2)
        row = together.row(2 * (number % 3) + number // 3)
        assert torch.equal(row.to_mask()[..., : expected.num_k_blocks], expected.to_mask()[number // 3 :][:1])


def test_dense_rows_reject_negative_numbers() -> None:
    with pytest.raises(ValueError, match="rows must be at least 0, got -1"):
        random_lists(0, 64, 32, 32)[2].with_dense_rows(-1)
