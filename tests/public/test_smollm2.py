"""The integration on a real public model: SmolLM2-135M-Instruct, its weights dequantised from Q4_1.

`make test-public` makes the model first (`research/public_models.py`).
"""

import gzip
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import seerattn
from seerattn import AttnGateConfig, KeepAll, TopK
from seerattn.hf.state import layer_states
from seerattn.methods.streaming import StreamingSelector
from seerattn.training import DistillConfig, distill

MODEL = Path("outputs/models/smollm2")
BOOKS = Path("assets/books/distill")
SHIPPED = Path("assets/smollm2-gates")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Gates of two steps."""
    output = tmp_path_factory.mktemp("smollm2") / "gates"
    config = DistillConfig(context=1024, steps=2, batch_size=2, logging_steps=1, save_steps=1, density=0.3)
    gated = distill(model(), tokenizer, [BOOKS], config, output=output)
    records = (output / "training.jsonl").read_text().splitlines()
    assert len(records) == 2 and len(layer_states(gated)) == 30
    return output


def test_every_layer_is_proven_and_keeping_all_blocks_is_the_model_itself(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    plain, gated = model(), seerattn.attach(model(), AttnGateConfig(), KeepAll(), impl="reference")
    assert [state.layer for state in layer_states(gated)] == list(range(30))
    ids = tokenizer(
        "Call me Ishmael. Some years ago, never mind how long precisely. " * 20, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        found, expected = gated(ids).logits, plain(ids).logits
    # fp32 over 30 layers; logits are some 20 large.
    assert (found - expected).abs().max() < 1e-3 and ids.shape[1] > 200


def test_chat_with_distilled_gates_answers_as_the_model_does_where_all_blocks_are_kept(
    gates: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    story = "The river ran past the mill, and the miller counted his sacks. " * 40
    messages = [{"role": "user", "content": f"{story} What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    gated = seerattn.attach(model(), gates, impl="reference")
    answers = {}
    for policy in (KeepAll(), TopK(density=0.3), None):
        with seerattn.policy(gated, policy), seerattn.record_density(gated) as meter:
            out = gated.generate(**inputs, max_new_tokens=12, do_sample=False)
        answers[policy] = out[0, inputs["input_ids"].shape[1] :].tolist()
        if policy is not None:
            assert (meter.mean() == 1.0) == (policy == KeepAll())
    assert answers[KeepAll()] == answers[None]
    with torch.no_grad():
        dense = model().generate(**inputs, max_new_tokens=12, do_sample=False)
    assert answers[None] == dense[0, inputs["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def test_left_padded_batch_of_prompts_gives_what_they_give_alone(
    gates: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    gated = seerattn.attach(model(), gates, TopK(density=0.5, rule="row_share"), impl="reference")
    tokenizer.padding_side = "left"
    texts = ["The sea was calm that night, and nobody spoke. " * 30, "A short one. " * 25]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    together = gated(**batch).logits
    for row, text in enumerate(texts):
        alone = gated(tokenizer(text, return_tensors="pt").input_ids).logits[0]
        assert (together[row, -len(alone) :] - alone).abs().max() < 1e-3


def test_shipped_gates_lose_less_than_half_of_what_recent_blocks_lose(tokenizer: PreTrainedTokenizerBase) -> None:
    text = gzip.decompress((BOOKS.parent / "evaluate" / "harte-from-sand-hill-to-pine.txt.gz").read_bytes()).decode()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :2048]

    def loss(base: PreTrainedModel) -> float:
        with torch.no_grad():
            return float(base(ids, labels=ids).loss)

    # Some eight blocks a row: below that recent blocks are half of what a row keeps anyway.
    policy, sparse = TopK(density=0.3), {"impl": "reference"}
    dense = loss(model())
    recent = loss(seerattn.attach(model(), StreamingSelector(policy), **sparse))
    gated = seerattn.attach(model(), SHIPPED, policy, **sparse)
    assert gated.active_peft_config.base_model_name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    with seerattn.record_density(gated) as density:
        found = loss(gated)
    assert found - dense < 0.5 * (recent - dense) and density.mean() == pytest.approx(0.3, abs=0.005)
