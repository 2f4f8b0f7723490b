"""The Triton kernels inside whole models, in Triton's interpreter: the logits of the reference implementation."""

from dataclasses import replace

import pytest
import torch
from interpreted import large_steps
from tiny_models import tiny_model, tokens

import seerattn
from seerattn import AttnGateConfig, TopK
from seerattn.hf.state import layer_states

pytest.importorskip("triton")

GATE = AttnGateConfig(block_q=32, block_k=32, query_subblocks=2, key_subblocks=2)
POLICY = TopK(density=0.5, rule="row_share")


def logits(model: torch.nn.Module, impl: str, **inputs: torch.Tensor) -> torch.Tensor:
    seerattn.set_policy(model, POLICY, impl=impl)
    if impl == "triton":
        chosen = {state.layer: replace(state.selector, impl="triton") for state in layer_states(model)}
        seerattn.attach(model, chosen.get, impl="triton")
    with torch.no_grad():
        return model(**inputs).logits


# Sinks, a soft cap with partial layers, and plain attention.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, on padding that is masked afterwards
@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="kernels are compiled for the GPU here, and the models of this suite are on the CPU",
)
@pytest.mark.parametrize("name", ["llama", "gpt-oss", "gemma2"])
def test_fused_gate_and_kernel_give_the_logits_of_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    large_steps(monkeypatch)
    model = seerattn.attach(tiny_model(name), GATE, POLICY).eval()
    ids = tokens(2, 130)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    expected = logits(model, "reference", input_ids=ids, attention_mask=mask)
    got = logits(model, "triton", input_ids=ids, attention_mask=mask)
    dense = logits(model, "auto", input_ids=ids, attention_mask=mask)
    real = mask.bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-4)
    assert (expected - dense)[real].abs().max() > 1e-2
