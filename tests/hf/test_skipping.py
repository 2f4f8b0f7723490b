"""Policies that let attention skip: in a model they compute what lists of the blocks that are not skipped compute."""

import pytest
import torch
from tiny_models import tiny_model, tokens

import seerattn
from seerattn import AttnGateConfig, KeepAll, TopK
from seerattn.hf.meters import record_density
from seerattn.methods.blasst import BlasstSelector, SkippingSelector

GATE = AttnGateConfig(block_q=32, block_k=32, query_subblocks=1, key_subblocks=1)
# Of random weights, whose attention is flat, little is skipped.
THRESHOLD = 0.95


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 20
    return seerattn.attach(model, GATE, KeepAll(), impl="reference").eval()


def listed(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with lists of the blocks that BLASST keeps."""
    plain = seerattn.detach(model)
    return seerattn.attach(plain, lambda layer: BlasstSelector(THRESHOLD, 32, 32), impl="reference")


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_skipping_in_full_lists_computes_the_blocks_of_blasst_and_meters_tell(model, padding: str) -> None:
    ids, mask = tokens(2, 230), torch.ones(2, 230, dtype=torch.long)
    if padding != "none":
        mask[1, slice(0, 75) if padding == "left" else slice(155, 230)] = 0
    seerattn.set_policy(model, KeepAll(skip_threshold=THRESHOLD))
    with record_density(model) as full, record_density(model) as again:
        skipping = model(input_ids=ids, attention_mask=mask).logits
    other = listed(model)
    with record_density(other) as kept:
        expected = other(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(skipping[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-5)
    assert full.mean() == again.mean() == 1
    assert full.skipped() == again.skipped() == pytest.approx(1 - kept.mean())
    assert 0 < full.skipped() < 0.9 and kept.skipped() == 0


@torch.no_grad()
def test_a_selector_that_skips_runs_without_gates(model) -> None:
    ids = tokens(1, 230)
    expected = listed(model)(input_ids=ids).logits
    plain = seerattn.detach(model)
    other = seerattn.attach(plain, lambda layer: SkippingSelector(THRESHOLD, 32, 32), impl="reference")
    torch.testing.assert_close(other(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_skipping_changes_no_list_of_a_gate(model) -> None:
    ids = tokens(1, 230)
    meters, outs = {}, {}
    for threshold in (None, 1e-30, THRESHOLD):
        seerattn.set_policy(model, TopK(density=0.5, last_rows_dense=1, skip_threshold=threshold))
        with record_density(model) as meters[threshold]:
            outs[threshold] = model(input_ids=ids).logits
    assert torch.equal(outs[None], outs[1e-30]) and not torch.equal(outs[None], outs[THRESHOLD])
    assert meters[None].skipped() == meters[1e-30].skipped() == 0 < meters[THRESHOLD].skipped()
    # The first layer sees the same; later ones what the first one gave.
    by_head = [meter.by_head()[0] for meter in meters.values()]
    assert torch.equal(by_head[0], by_head[1]) and torch.equal(by_head[0], by_head[2])


def test_a_policy_that_skips_is_saved_with_its_gates(model, tmp_path) -> None:
    policy = TopK(density=0.5, skip_threshold=1e-3)
    seerattn.set_policy(model, policy)
    model.save_pretrained(tmp_path)
    again = seerattn.attach(tiny_model("llama"), tmp_path)
    assert again.peft_config["default"].policy == policy.to_dict()


def test_a_forward_with_gradients_is_refused_in_a_sentence(model) -> None:
    seerattn.set_policy(model, KeepAll(skip_threshold=0.1))
    with pytest.raises(ValueError, match=r"no skip_threshold where gradients are taken.*torch\.no_grad"):
        model(input_ids=tokens(1, 100))


def test_a_meter_that_saw_nothing_tells_no_skipped_share(model) -> None:
    with record_density(model) as meter, pytest.raises(ValueError, match="must have seen at least one prefill"):
        meter.skipped()
