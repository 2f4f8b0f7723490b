"""Gates of processes that have some heads each: together they choose what the gate of all heads chooses."""

from __future__ import annotations

import pytest
import torch

from seerattn import AttnGate, AttnGateConfig, GateSelector, KeepAll, Threshold, TopK
from seerattn.gate.heads import Heads
from seerattn.selection.selector import AttentionContext

H, HKV, D = 8, 4, 32
FORMS = {
    "default": AttnGateConfig(distance_bias=4, qk_norm=True, init="normal"),
    "published": AttnGateConfig.paper(),
    "kv group": AttnGateConfig(share="kv_group", init="normal"),
}


def gate_of(form: AttnGateConfig, part: Heads | None = None) -> AttnGate:
    frequencies = 10000.0 ** (-torch.arange(0, D, 2) / D)
    heads, kv_heads = (H, HKV) if part is None else (len(part.query), len(part.kv))
    return AttnGate(form, num_heads=heads, num_kv_heads=kv_heads, head_dim=D, inv_freq=frequencies, part=part).eval()


def filled(form: AttnGateConfig) -> AttnGate:
    torch.manual_seed(1)
    gate = gate_of(form)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return gate


@pytest.mark.parametrize(("rank", "ranks", "query", "kv"), [
    (0, 1, range(8), range(4)),
    (1, 2, range(4, 8), range(2, 4)),
    (3, 4, range(6, 8), range(3, 4)),
    (5, 8, range(5, 6), range(2, 3)),
])  # fmt: skip
def test_heads_are_dealt_out_in_order_with_the_kv_heads_that_they_attend_to(
    rank: int, ranks: int, query: range, kv: range
) -> None:
    heads = Heads.of_rank(H, HKV, rank, ranks)
    assert (heads.query, heads.kv) == (query, kv)
    # Query head h attends to KV head h // G.
    assert {h // (H // HKV) for h in heads.query} == set(heads.kv)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("form", list(FORMS))
def test_gates_of_all_ranks_choose_together_what_the_whole_gate_chooses(form: str, ranks: int) -> None:
    """Each rank sees its own heads alone; a policy has a setting of its own for every head."""
    config, layer = FORMS[form], 2
    gate = filled(config)
    torch.manual_seed(2)
    q, k = torch.randn(1, H, 300, D), torch.randn(1, HKV, 300, D)
    mask_heads = H if config.share == "query_head" else HKV
    densities = [[], [], [0.2 + 0.08 * head for head in range(mask_heads)]]
    policies = [TopK(density=densities, rule="row_share"), Threshold(threshold=densities, on="softmax"), KeepAll()]
    context = AttentionContext(layer=layer, scale=1.0, softcap=None, unrotate=lambda x, start: x.float())
    for policy in policies:
        whole = GateSelector(gate, policy, impl="reference").select(q, k, context).to_mask()
        found = []
        for rank in range(ranks):
            heads = Heads.of_rank(H, HKV, rank, ranks)
            if config.share == "kv_group" and ranks > HKV:
                with pytest.raises(ValueError, match="processes must be at most the 4 KV heads"):
                    gate_of(config, heads)
                return
            own = gate_of(config, heads)
            own.load_state_dict(gate.state_dict())
            selector = GateSelector(own, policy, impl="reference")
            found.append(selector.select(q[:, heads.query], k[:, heads.kv], context).to_mask())
        assert torch.equal(torch.cat(found, 1), whole)
