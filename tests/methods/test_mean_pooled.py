import math

import pytest
import torch
from baseline_calls import CONTEXT, calls, kept, rows_of

from seerattn.methods.mean_pooled import MeanPooledSelector
from seerattn.selection import TokenBudget


@pytest.mark.parametrize(("q_len", "k_len"), [(333, 333), (77, 333), (1, 65), (130, 200)])
@pytest.mark.parametrize(("block_q", "block_k"), [(32, 32), (64, 32), (32, 64)])
@pytest.mark.parametrize("sinks", [0, 1])
def test_pooled_blocks_match_top_k_of_fp64_means(q_len, k_len, block_q, block_k, sinks) -> None:
    q, k = calls(q_len, k_len, batch=2)
    policy = TokenBudget(tokens=3 * block_k, sink_blocks=sinks)
    mask = MeanPooledSelector(policy, block_q, block_k).select(q, k, CONTEXT).to_mask()
    start = k_len - q_len
    for b in range(2):
        for h in range(4):
            expected = {}
            for row, positions in rows_of(q_len, k_len, block_q).items():
                mean_q = q[b, h, positions[0] - start : positions[-1] + 1 - start].double().mean(0).tolist()
                scores = []
                for block in range(positions[-1] // block_k + 1):
                    mean_k = k[b, h // 2, block * block_k : (block + 1) * block_k].double().mean(0).tolist()
                    scores.append(math.fsum(x * y for x, y in zip(mean_q, mean_k)))
                keep = {i // block_k for i in positions} | set(range(min(sinks, len(scores))))
                others = sorted(set(range(len(scores))) - keep, key=lambda block: -scores[block])
                expected[row] = keep | set(others[: max(0, 3 - len(keep))])
            assert kept(mask[b, h], start // block_q) == expected


def test_pooled_in_chunks_on_block_boundaries_matches_one_shot() -> None:
    selector = MeanPooledSelector(TokenBudget(tokens=128), 32, 32)
    q, k = calls(333, 333)
    whole = selector.select(q, k, CONTEXT).to_mask()
    for begin, end in ((0, 96), (96, 256), (256, 333)):
        part = selector.select(q[:, :, begin:end], k[:, :, :end], CONTEXT).to_mask()
        # A key block that the chunk ends in has another mean, but is the diagonal.
        assert torch.equal(part, whole[:, :, begin // 32 : -(-end // 32), : part.shape[-1]])
