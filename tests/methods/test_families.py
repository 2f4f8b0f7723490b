"""What holds for every family: the ends of its knob, monotone density, rows of a padded batch."""

import json

import pytest
import torch
from baseline_calls import CONTEXT, calls, profile
from tiny_models import tiny_model, tokens

from seerattn import attach, detach
from seerattn.methods.flexprefill import flexprefill_family
from seerattn.methods.mean_pooled import pooled_family
from seerattn.methods.oracle import oracle_family
from seerattn.methods.random import random_family
from seerattn.methods.shapes import a_shape_family, tri_shape_family
from seerattn.methods.streaming import streaming_family
from seerattn.methods.xattention.estimate import xattention_family, xattention_profile_family

PROFILE = [[0.3, 0.9, 0.6, 1.0]] * 2
BLOCKS = {"block_q": 32, "block_k": 32}
FAMILIES = {
    "streaming": streaming_family(**BLOCKS),
    "oracle": oracle_family(**BLOCKS),
    "oracle-sum": oracle_family(**BLOCKS, target="sum:2"),
    "random": random_family(**BLOCKS),
    "pooled": pooled_family(**BLOCKS),
    "a_shape": a_shape_family(**BLOCKS, n_init=32),
    "tri_shape": tri_shape_family(**BLOCKS, n_init=32, n_last=1),
    "xattention": xattention_family(stride=8, block=32),
    "xattention-profile": xattention_profile_family(profile(PROFILE, stride=8, block=32)),
    "flexprefill": flexprefill_family(block=32),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def density(family, knob: float, q, k) -> torch.Tensor:
    """Realised by head, ``[B, H]``."""
    blocks = family.at(knob)(CONTEXT.layer).select(q, k, CONTEXT)
    assert (blocks.block_q, blocks.block_k) == (family.block_q, family.block_k)
    return blocks.density().expand(-1, q.shape[1]) if blocks.num_heads == q.shape[1] else blocks.density()


def test_density_goes_from_the_forced_blocks_to_everything_and_never_falls(family) -> None:
    q, k = calls(1000, 1000, batch=2)
    if family.scale == "log":
        steps = torch.logspace(0, 11, 24, base=2).tolist()
    else:
        steps = torch.linspace(family.sparsest, family.densest, 24).tolist()
    realised = torch.stack([density(family, knob, q, k) for knob in (*steps, family.densest)])
    assert (realised.diff(dim=0) >= 0).all()
    assert (realised[-1] == 1).all()
    rows = 32
    # The first block and the diagonal; a window of one token and a last row are all that a shape adds.
    extra = rows - 2 if family.name == "tri_shape" else 0
    floor = (2 * rows - 1 + extra) / (rows * (rows + 1) / 2)
    assert realised[0].flatten().tolist() == pytest.approx([floor] * realised[0].numel())
    assert len(set(realised.mean((1, 2)).tolist())) > 5


def test_family_settings_are_json_and_its_selector_is_the_same_for_every_layer(family) -> None:
    assert json.loads(json.dumps(dict(family.settings))) == dict(family.settings)
    choose = family.at((family.sparsest + family.densest) / 2)
    assert choose(0) is choose(1)


@pytest.mark.parametrize("name", FAMILIES)
def test_row_of_a_padded_batch_matches_the_row_alone(name: str) -> None:
    family = FAMILIES[name]
    knob = {"a_shape": 40, "tri_shape": 40}.get(name, family.densest * 0.4)
    model = tiny_model("llama")
    attach(model, family.at(knob), impl="reference")
    try:
        ids = tokens(2, 333)
        mask = torch.ones_like(ids)
        mask[1, :110] = 0
        with torch.no_grad():
            together = model(input_ids=ids.masked_fill(mask == 0, 0), attention_mask=mask).logits
            alone = model(input_ids=ids[1:, 110:]).logits
            first = model(input_ids=ids[:1]).logits
            dense = detach(model)(input_ids=ids[1:, 110:]).logits
    finally:
        detach(model)
    assert torch.allclose(together[1:, 110:], alone, atol=1e-4)
    assert torch.allclose(together[:1], first, atol=1e-4)
    assert not torch.allclose(alone, dense, atol=1e-2)
