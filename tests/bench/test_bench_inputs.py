import pytest
import torch

from seerattn.bench.inputs import Shape, random_blocks, random_lists, random_qkv, uneven_qkv
from seerattn.selection.block_indices import causal_block_mask, forced_block_mask

CPU = torch.device("cpu")


@pytest.mark.parametrize("tokens", [1, 64, 1000, 2049])
@pytest.mark.parametrize("block_q, block_k", [(64, 64), (128, 32), (32, 128)])
@pytest.mark.parametrize("density", [0.01, 0.37, 1.0])
def test_random_blocks_have_the_nearest_density_in_every_head_and_keep_the_diagonal(
    tokens, block_q, block_k, density
) -> None:
    sizes = {"tokens": tokens, "block_q": block_q, "block_k": block_k}
    blocks = random_blocks(mask_heads=3, density=density, device=CPU, **sizes)
    geometry = (0, tokens, -(-tokens // block_q), -(-tokens // block_k), block_q, block_k)
    causal, diagonal = causal_block_mask(*geometry), forced_block_mask(*geometry, sink_blocks=0)
    expected = max(round(density * int(causal.sum())), int(diagonal.sum()))
    mask = blocks.to_mask()
    assert mask.sum((2, 3)).tolist() == [[expected] * 3]
    assert blocks.density().tolist() == [[expected / int(causal.sum())] * 3]
    assert bool((mask & diagonal[:, None] == diagonal[:, None]).all()) and not bool((mask & ~causal[:, None]).any())


def test_random_blocks_differ_between_heads_and_seeds_and_are_drawn_evenly() -> None:
    sizes = {"mask_heads": 2, "tokens": 4096, "block_q": 32, "block_k": 32, "density": 0.3, "device": CPU}
    first, again, other = (random_blocks(**sizes, seed=seed).to_mask() for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[:, 0], first[:, 1])
    # Off the diagonal a share p of 63 * 64 / 2 places is kept in each half of the rows; 5 standard deviations.
    off = torch.ones(128, 128, dtype=torch.bool).tril(-1)
    p = float(first[0, 0][off].float().mean())
    for rows in (slice(0, 64), slice(64, 128)):
        places = first[0, 0][rows][off[rows]].float()
        assert abs(float(places.mean()) - p) < 5 * (p * (1 - p) / len(places)) ** 0.5


def test_rows_alike_draw_the_same_blocks_apart_from_the_diagonal() -> None:
    sizes = {"mask_heads": 1, "tokens": 2048, "block_q": 64, "block_k": 64, "density": 0.3, "device": CPU}
    mask = random_blocks(**sizes, rows_alike=4).to_mask()[0, 0]
    differing = 0
    for first in range(4, 32, 4):
        differing += int((mask[first : first + 4, :first] != mask[first, :first]).sum())
    # The exact count cuts within at most one column's four rows.
    assert differing <= 3
    assert int(random_blocks(**sizes).to_mask().sum()) == int(mask.sum())


def test_drift_makes_neighbouring_tokens_alike() -> None:
    q, k, v = random_qkv(Shape(4, 2, 32, torch.float32), 1000, CPU, drift=2.0)
    assert [x.shape[1:3] for x in (q, k, v)] == [(4, 1000), (2, 1000), (2, 1000)]
    within = float((q[:, :, 1:16] * q[:, :, :15]).mean())
    across = float((q[:, :, 16:992:16] * q[:, :, 15:991:16]).mean())
    assert within == pytest.approx(4.0, rel=0.3) and abs(across) < 0.5


def test_inputs_reject_what_no_layer_has() -> None:
    with pytest.raises(ValueError, match=r"^heads must "):
        Shape(6, 4)
    assert Shape.parse("4x2x32", torch.float32) == Shape(4, 2, 32, torch.float32)
    for text in ("4x2", "4x2x32x1", "axbxc", "-4x2x32", "", "4x2x", "9" * 12 + "x1x1"):
        with pytest.raises(ValueError, match=r"^shape must "):
            Shape.parse(text, torch.float32)
    for text in ("6x4x32", "0x1x32", "4x2x0"):
        with pytest.raises(ValueError, match=r"^heads must "):
            Shape.parse(text, torch.float32)
    sizes = {"mask_heads": 1, "tokens": 64, "block_q": 64, "block_k": 64, "device": CPU}
    for density in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"^density must "):
            random_blocks(**sizes, density=density)


def test_uneven_inputs_have_sinks_and_heads_that_look_at_what_is_near() -> None:
    shape, tokens = Shape(8, 2, 64, torch.float32), 2000
    q, k, _ = uneven_qkv(shape, tokens, CPU)
    logits = (q @ k.repeat_interleave(4, 1).mT)[0, :, -500:] * 64**-0.5
    far = logits[:, :, 4:1400]
    # By KV head, whose first query head looks at nothing near. Means of 500 rows move by less than .2.
    for head, strength in ((0, 2), (4, 12)):
        assert abs(float((logits[head, :, :4] - far[head].mean()).mean()) - strength) < 0.2
        assert 0.8 < float(far[head].std()) < 1
    own = torch.stack([logits[:, row, tokens - 500 + row] for row in range(500)], 1).mean(1)
    before = torch.stack([logits[:, row, tokens - 600 + row] for row in range(500)], 1).mean(1)
    for head, strength in enumerate([0, 16 / 3, 32 / 3, 16] * 2):
        assert abs(float(own[head]) - strength) < 0.2
        assert strength * 0.3 - 0.2 < float(before[head]) < strength * 0.8 + 0.2


def test_lists_of_tokens_have_the_first_and_the_last_block_and_one_count() -> None:
    lengths = torch.tensor([1000, 700], dtype=torch.int32)
    lists = random_lists(Shape(4, 2, 32), lengths, 1000, block_k=64, density=0.25, seed=3)
    assert lists.indices.shape == (2, 2, 4) and (lists.counts == 4).all()
    assert (lists.indices[..., 0] == 0).all()
    assert lists.indices[..., 3].tolist() == [[15, 15], [10, 10]]
    assert (lists.indices.diff(dim=-1) > 0).all()
