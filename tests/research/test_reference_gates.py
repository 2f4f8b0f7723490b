"""The recipe trains the gates of all layers as heads of one; taken apart they must be the same gates."""

import sys
from pathlib import Path

import pytest
import torch

from seerattn.gate import AttnGate, AttnGateConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "research"))
import reference_gates

LAYERS, H, HKV, D = 3, 4, 2, 16


@pytest.mark.parametrize(
    "config",
    [
        AttnGateConfig.paper(block_q=32, block_k=32),
        AttnGateConfig(block_q=32, block_k=32, share="kv_group", query_subblocks=2, key_subblocks=4, qk_norm=True),
        AttnGateConfig(block_q=32, block_k=32, rope=False, distance_bias=4),
    ],
    ids=["paper", "group-norm", "distance"],
)
def test_gates_of_single_layers_score_like_the_gate_that_held_them_side_by_side(config: AttnGateConfig) -> None:
    torch.manual_seed(0)
    inv_freq = 10_000.0 ** -(torch.arange(D // 2) / (D // 2))
    stacked = AttnGate(config, num_heads=LAYERS * H, num_kv_heads=LAYERS * HKV, head_dim=D, inv_freq=inv_freq)
    with torch.no_grad():
        for parameter in stacked.parameters():
            parameter.normal_(1, 0.3)
    q, k = torch.randn(2, LAYERS * H, 150, D), torch.randn(2, LAYERS * HKV, 150, D)
    expected = stacked(q, k).chunk(LAYERS, dim=1)
    gates = reference_gates.split_layers(stacked, LAYERS)
    for gate, one_q, one_k, scores in zip(gates, q.chunk(LAYERS, 1), k.chunk(LAYERS, 1), expected, strict=True):
        torch.testing.assert_close(gate(one_q, one_k), scores, rtol=1e-5, atol=1e-5)
        assert not any(parameter.requires_grad for parameter in gate.parameters())
