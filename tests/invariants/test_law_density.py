"""Law 6: the density that is reported is that of the blocks the kernel visited."""

import pytest
import torch

from seerattn.gate import AttnGate, AttnGateConfig
from seerattn.gate_selector import GateSelector
from seerattn.ops.block_sparse_attention import block_sparse_attention
from seerattn.selection import AttentionContext, KeepAll, Threshold, TokenBudget, TopK, TopP
from seerattn.selection.block_indices import causal_block_mask

BLOCK, D, H, HKV = 32, 64, 4, 2


@pytest.mark.parametrize(
    "policy",
    [TopK(density=0.3), TopK(density=0.2, rule="row_share"), TopP(p=0.5), TokenBudget(tokens=90), KeepAll()]
    + [Threshold(threshold=0.05, last_rows_dense=1)],
    ids=lambda policy: type(policy).__name__,
)
@pytest.mark.parametrize(("q_len", "k_len"), [(700, 700), (100, 650), (33, 33)])
@pytest.mark.parametrize("share", ["query_head", "kv_group"])
def test_reported_density_is_the_share_of_blocks_that_the_output_mixes(policy, q_len, k_len, share) -> None:
    torch.manual_seed(0)
    config = AttnGateConfig(block_q=BLOCK, block_k=BLOCK, rope=False, init="normal", share=share)
    gate = AttnGate(config, num_heads=H, num_kv_heads=HKV, head_dim=D).requires_grad_(False)
    q, k = torch.randn(2, H, q_len, D), torch.randn(2, HKV, k_len, D)
    context = AttentionContext(layer=0, scale=D**-0.5, softcap=None, unrotate=lambda x, start: x)
    blocks = GateSelector(gate, policy).select(q, k, context)

    # The value of every key names its block, so channel j of an output is the probability mass on block j.
    v = torch.eye(D)[torch.arange(k_len) // BLOCK].expand(2, HKV, k_len, D)
    mass = block_sparse_attention(q, k, v, blocks, impl="reference")
    start = k_len - q_len
    rows = (start + torch.arange(q_len)) // BLOCK - start // BLOCK
    visited = torch.stack([mass[:, :, rows == i].amax(2) > 0 for i in range(blocks.num_q_blocks)], dim=2)
    causal = causal_block_mask(start, q_len, blocks.num_q_blocks, blocks.num_k_blocks, BLOCK, BLOCK).sum()
    counted = visited.sum((-1, -2)).double() / causal
    reported = blocks.density().repeat_interleave(H // blocks.num_heads, dim=1)
    assert torch.equal(counted, reported)
