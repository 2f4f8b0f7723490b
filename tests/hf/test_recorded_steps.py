"""Steps that a GPU repeats from a record give what steps by the host give."""

import pytest
import torch

import seerattn
from seerattn import TokenBudget, TopK, TopP
from seerattn.hf import decode_graph, fixed_step
from tests.hf.test_decode_graph import BLOCK, answer, equal, model, prompts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="steps are recorded on a GPU")


def test_models_whose_steps_are_recorded_are_known_beforehand() -> None:
    for name, policy, expected in (
        ("llama", TopK(density=0.3), True),
        ("llama", None, True),
        ("llama", TopP(p=0.9), False),
        ("gemma3", None, False),
    ):
        assert decode_graph.fits_graphs(model(name, policy).cuda()) is expected, (name, policy)


# The models are fp32 on purpose, and torch's compiler advises TF32 for that; every other warning stays an error.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32 matrix multiplication:UserWarning")
@pytest.mark.parametrize("lengths", [(250, 250), (250, 131)], ids=["alike", "padded"])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "policy", [TokenBudget(tokens=3 * BLOCK), TopK(density=0.3), None], ids=["budget", "share", "dense"]
)
def test_recorded_steps_are_those_that_run(
    policy, compile: bool, lengths, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decode_graph._tell.cache_clear()
    monkeypatch.setattr(fixed_step, "KEY_DTYPE", torch.float32)
    gated = model(decode_policy=policy).to("cuda")
    asked = {name: x.cuda() for name, x in prompts(*lengths).items()}
    with seerattn.decode_graphs(gated, compile=compile):
        found = answer(gated, asked)
    assert "without a CUDA graph" not in caplog.text
    equal(found, answer(gated, asked, disable_compile=True))
