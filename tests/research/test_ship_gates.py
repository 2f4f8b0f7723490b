"""Gates that are given away: half the bytes, the same gates."""

import copy
import gzip
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import seerattn
from seerattn import GateSelector, TopK
from seerattn.gate_files import CONFIG, WEIGHTS
from seerattn.hf.capture import AttentionCall, watch_attention
from seerattn.hf.state import layer_states

sys.path.insert(0, str(Path(__file__).parents[2] / "research"))
import ship_gates

ASSETS = Path(__file__).parents[2] / "assets"
REFERENCE = ASSETS / "reference-model"
SHIPPED = sorted(path.parent for path in ASSETS.rglob(WEIGHTS))


def model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()


def test_shipped_gates_hold_16_bits_a_weight() -> None:
    assert len(SHIPPED) == 4
    for folder in SHIPPED:
        assert {tensor.dtype for tensor in load_file(folder / WEIGHTS).values()} == {torch.float16}


@pytest.mark.parametrize("path", ["attach", "from_pretrained"])
def test_gates_of_16_bits_run_in_fp32(path: str) -> None:
    folder = ASSETS / "reference-gates" / "best"
    if path == "attach":
        gated = seerattn.attach(model(), folder)
    else:
        gated = AutoModelForCausalLM.from_pretrained(REFERENCE)
        gated.load_adapter(folder)
    saved = load_file(folder / WEIGHTS)
    for state in layer_states(gated):
        for name, parameter in state.gate.named_parameters():
            assert parameter.dtype == torch.float32
            (key,) = (key for key in saved if f".{state.layer}." in key and key.endswith(name))
            assert torch.equal(parameter, saved[key].float())


@pytest.mark.parametrize("name", ["best", "paper"])
@torch.no_grad()
def test_rounding_to_16_bits_changes_one_block_of_a_thousand_at_most(name: str) -> None:
    """The shipped weights, and others that are rounded to them."""
    gated = seerattn.attach(model(), ASSETS / "reference-gates" / name)
    book = gzip.decompress(
        (ASSETS / "books" / "evaluate" / "harte-from-sand-hill-to-pine.txt.gz").read_bytes()
    ).decode()
    ids = AutoTokenizer.from_pretrained(REFERENCE)(book, return_tensors="pt").input_ids[:, :2048]
    calls: dict[int, AttentionCall] = {}
    with watch_attention(gated, lambda call: calls.setdefault(call.layer, call)):
        gated(input_ids=ids, logits_to_keep=1)
    generator = torch.Generator().manual_seed(0)
    replaced = kept = 0
    for state in layer_states(gated):
        call, unrounded = calls[state.layer], copy.deepcopy(state.gate)
        for parameter in unrounded.parameters():
            # Just less than half a step of fp16, which has 11 bits.
            parameter *= 1 + 0.98 * 2**-12 * (2 * torch.rand(parameter.shape, generator=generator) - 1)
        for gate, weights in zip(state.gate.parameters(), unrounded.parameters()):
            normal = gate.abs() >= 2**-14
            assert torch.equal(weights.half().float()[normal], gate[normal]) and not torch.equal(weights, gate)
        ours, theirs = (
            GateSelector(gate, TopK(density=0.2), "reference").select(call.query, call.key, call.context).to_mask()
            for gate in (state.gate, unrounded)
        )
        replaced += int((ours & ~theirs).sum())
        kept += int(ours.sum())
    assert kept > 3000 and replaced <= kept / 1000


def test_shipping_halves_the_weights_and_names_the_model(tmp_path: Path) -> None:
    trained, out = tmp_path / "trained", tmp_path / "out"
    trained.mkdir()
    weights = {name: x.float() * (1 + 2**-13) for name, x in load_file(SHIPPED[0] / WEIGHTS).items()}
    save_file(weights, trained / WEIGHTS, metadata={"format": "pt"})
    (trained / CONFIG).write_bytes((SHIPPED[0] / CONFIG).read_bytes())
    ship_gates.main(trained, out, "someone/model")
    assert json.loads((out / CONFIG).read_text())["base_model_name_or_path"] == "someone/model"
    halved = load_file(out / WEIGHTS)
    assert halved.keys() == weights.keys()
    assert all(torch.equal(halved[name], weights[name].half()) for name in weights)
