import pytest
import torch
from baseline_calls import CONTEXT, calls, rows_of

from seerattn.methods.a_shape import AShape, ShapeSelector
from seerattn.methods.tri_shape import TriShape


@pytest.mark.parametrize(("q_len", "k_len"), [(333, 333), (77, 333), (1, 65), (130, 200)])
@pytest.mark.parametrize(("block_q", "block_k"), [(32, 32), (64, 32), (32, 64)])
@pytest.mark.parametrize(
    ("n_init", "n_local", "n_last"), [(1, 1, 0), (0, 35, 0), (40, 65, 0), (32, 32, 14), (5, 100, 100), (0, 1, 999)]
)
def test_shape_is_the_blocks_that_hold_a_kept_token(q_len, k_len, block_q, block_k, n_init, n_local, n_last) -> None:
    selector = ShapeSelector(n_local, n_init, n_last, block_q, block_k)
    mask = selector.select(*calls(q_len, k_len, batch=2), CONTEXT).to_mask()
    expected = torch.zeros_like(mask)
    for row, positions in enumerate(rows_of(q_len, k_len, block_q).values()):
        for i in positions:
            for j in range(i + 1):
                if j < n_init or i - j < n_local or i >= k_len - n_last:
                    expected[:, :, row, j // block_k] = True
    assert torch.equal(mask, expected)


def test_shape_in_chunks_on_block_boundaries_matches_one_shot() -> None:
    selector = ShapeSelector(n_local=90, n_init=40, block_q=32, block_k=32)
    q, k = calls(333, 333)
    whole = selector.select(q, k, CONTEXT).to_mask()
    for begin, end in ((0, 96), (96, 256), (256, 333)):
        part = selector.select(q[:, :, begin:end], k[:, :, :end], CONTEXT).to_mask()
        assert torch.equal(part, whole[:, :, begin // 32 : -(-end // 32), : part.shape[-1]])


def test_shapes_tune_the_window_and_keep_the_rest() -> None:
    shape, triangle = AShape(n_init=100), TriShape(n_last=70, block_k=32)
    assert shape.selectors().at(512.4)(0) == ShapeSelector(n_local=512, n_init=100)
    assert triangle.selectors().at(77)(3) == ShapeSelector(n_local=77, n_last=70, block_k=32)
    assert triangle.block_sizes == (64, 32)
    assert shape.settings() == {"n_init": 100, "n_last": 0} and triangle.settings() == {"n_init": 128, "n_last": 70}


@pytest.mark.parametrize("values", [{"n_local": 0}, {"n_init": -1}, {"n_last": -1}])
def test_shape_rejects_impossible_sizes(values) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        ShapeSelector(**values)
