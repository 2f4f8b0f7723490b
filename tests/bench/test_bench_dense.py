import pytest
import torch

from seerattn.bench.check import check_dense
from seerattn.bench.dense import dense_attention, flex_block_mask, sdpa_backend
from seerattn.bench.inputs import Shape, random_blocks, random_qkv

CPU = torch.device("cpu")
SHAPE = Shape(4, 2, 32, torch.float32)


@pytest.mark.parametrize("name", ["sdpa", "flash"])
def test_dense_attention_matches_its_oracle(name) -> None:
    error, bound = check_dense(lambda *x: dense_attention(name, *x)(), SHAPE, CPU, tokens=130)
    assert 0 < error <= bound


@pytest.mark.parametrize("tokens", [128, 1000, 1024])
@pytest.mark.parametrize("mask_heads", [4, 2])
def test_block_mask_of_flex_attention_holds_the_lists_and_masks_the_diagonal_alone(tokens, mask_heads) -> None:
    sizes = {"tokens": tokens, "block_q": 128, "block_k": 128, "density": 0.4}
    blocks = random_blocks(mask_heads=mask_heads, device=CPU, **sizes)
    mask = flex_block_mask(blocks, heads=4)
    expected = blocks.to_mask().repeat_interleave(4 // mask_heads, 1)
    assert torch.equal(mask.to_dense().bool(), expected)
    assert mask.kv_num_blocks.eq(1).all()
    rows = torch.arange(expected.shape[2]).expand(1, 4, -1)
    assert torch.equal(mask.kv_indices[..., 0].long(), rows)
    assert torch.equal(mask.full_kv_num_blocks.long(), expected.sum(-1) - 1)
    assert mask.seq_lengths == (tokens, tokens)


def test_what_cannot_run_here_says_so() -> None:
    q, k, v = random_qkv(SHAPE, 64, CPU)
    for name, message in {"flash5": "must be among", "flash4": "CUDA device", "flex": "CUDA device"}.items():
        with pytest.raises(ValueError, match=message):
            dense_attention(name, q, k, v)
    with pytest.raises(ValueError, match="cudnn must run on a CUDA device"):
        dense_attention("cudnn", q, k, v)()
    with pytest.raises(ValueError, match="backend must be one of"), sdpa_backend("flash4", CPU):
        pass
