"""The laws of the system on real architectures: what must be equal, whatever the model.

Models are fp64, so that equal means equal up to 1e-10 and not up to a kernel's rounding. Models that only have eager
attention compute its softmax in fp32 whatever their type; they are fp32, and so is their bound.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from tiny_models import EAGER, SUPPORTED, tiny_model, tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, PreTrainedTokenizerFast, pipeline

import seerattn
from seerattn import AttnGateConfig, KeepAll, TopK
from seerattn.hf.distillation import GateLosses

PROMPTS = (1, 2, 63, 64, 65, 127, 130)
GATE = AttnGateConfig(block_q=32, block_k=32, query_subblocks=2, key_subblocks=2, init="normal")
SPARSE = TopK(density=0.5, rule="row_share", sink_blocks=0)


class Pair(NamedTuple):
    """A model as it was, the same model with gates, and how far their logits may differ."""

    plain: PreTrainedModel
    gated: torch.nn.Module
    tolerance: float


@pytest.fixture(scope="module", params=SUPPORTED)
def pair(request: pytest.FixtureRequest) -> Pair:
    eager = request.param in EAGER
    plain = tiny_model(request.param, torch.float32 if eager else torch.float64)
    gated = seerattn.attach(copy.deepcopy(plain), GATE, KeepAll(), impl="reference").eval()
    return Pair(plain, gated, 2e-5 if eager else 1e-10)


@pytest.fixture
def sparse(pair: Pair):
    seerattn.set_policy(pair.gated, SPARSE)
    yield pair
    seerattn.set_policy(pair.gated, KeepAll())


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    return model(input_ids=ids, **kwargs).logits


def padded_batch(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A left-padded batch with the positions that `generate` would make."""
    width = max(lengths)
    mask = (torch.arange(width, 0, -1) <= torch.tensor(lengths)[:, None]).long()
    return {
        "input_ids": tokens(len(lengths), width) * mask,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("length", PROMPTS)
def test_keep_all_matches_the_unpatched_model(pair: Pair, length: int) -> None:
    ids = tokens(2, length)
    with seerattn.record_density(pair.gated) as meter:
        out = logits(pair.gated, ids)
    assert difference(out, logits(pair.plain, ids)) < pair.tolerance
    if length > 1:
        assert meter.mean() == 1.0
    else:
        assert meter.layers == []


def test_keep_all_matches_the_unpatched_model_on_a_padded_batch(pair: Pair) -> None:
    batch = padded_batch((130, 64, 1))
    del batch["position_ids"]
    real = batch["attention_mask"].bool()
    out, expected = (model(**batch).logits[real] for model in (pair.gated, pair.plain))
    assert difference(out, expected) < pair.tolerance


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"num_beams": 2, "length_penalty": 0.0},
        {"prefill_chunk_size": 48},
    ],
    ids=["dynamic", "static", "beams", "chunked-prefill"],
)
def test_keep_all_generates_what_the_unpatched_model_does(pair: Pair, options: dict) -> None:
    batch = padded_batch((100, 65, 7)) if "prefill_chunk_size" not in options else padded_batch((100,))
    del batch["position_ids"]
    sides = [
        model.generate(
            **batch, **options, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        for model in (pair.gated, pair.plain)
    ]
    assert torch.equal(sides[0].sequences, sides[1].sequences)
    assert difference(torch.stack(sides[0].logits), torch.stack(sides[1].logits)) < pair.tolerance


def turns(model: torch.nn.Module, ids: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """Logits of a prompt that arrives in pieces on one cache."""
    config = model.config if isinstance(model, PreTrainedModel) else model.get_base_model().config
    cache = DynamicCache(config=config)
    pieces = ids.tensor_split(cuts, dim=1)
    return torch.cat([logits(model, piece, past_key_values=cache, use_cache=True) for piece in pieces], 1)


def test_keep_all_matches_the_unpatched_model_over_two_turns(pair: Pair) -> None:
    # 70 tokens, 3 decoded one by one, then a second turn.
    ids, cuts = tokens(2, 150), [70, 71, 72, 73]
    assert difference(turns(pair.gated, ids, cuts), turns(pair.plain, ids, cuts)) < pair.tolerance


def test_chunks_on_block_boundaries_match_one_shot_prefill(sparse: Pair) -> None:
    ids = tokens(2, 200)
    one_shot = logits(sparse.gated, ids)
    assert difference(turns(sparse.gated, ids, [32, 128]), one_shot) < sparse.tolerance
    assert difference(one_shot, logits(sparse.plain, ids)) > 1e-2, "the policy must really drop something"


def test_sparse_rows_of_a_padded_batch_match_the_rows_alone(sparse: Pair) -> None:
    lengths = (130, 97, 33, 1)
    batch = padded_batch(lengths)
    together = sparse.gated(**batch).logits
    for row, length in enumerate(lengths):
        alone = logits(sparse.gated, batch["input_ids"][row : row + 1, -length:])
        assert difference(together[row : row + 1, -length:], alone) < sparse.tolerance


def test_disabled_adapter_is_the_unpatched_model_bit_for_bit(sparse: Pair) -> None:
    batch = padded_batch((130, 64, 3))
    with sparse.gated.disable_adapter():
        assert torch.equal(sparse.gated(**batch).logits, sparse.plain(**batch).logits)
        ids = tokens(2, 130)
        assert torch.equal(turns(sparse.gated, ids, [70, 71]), turns(sparse.plain, ids, [70, 71]))
    assert difference(sparse.gated(**batch).logits, sparse.plain(**batch).logits) > 1e-2


def test_policy_none_is_the_unpatched_model_bit_for_bit(sparse: Pair) -> None:
    seerattn.set_policy(sparse.gated, None)
    batch = padded_batch((130, 64, 3))
    assert torch.equal(sparse.gated(**batch).logits, sparse.plain(**batch).logits)


def test_detached_model_is_the_unpatched_model(pair: Pair) -> None:
    model = copy.deepcopy(pair.plain)
    names = list(model.state_dict())
    detached = seerattn.detach(seerattn.attach(model, GATE, SPARSE))
    assert list(detached.state_dict()) == names
    assert detached.config._attn_implementation == pair.plain.config._attn_implementation
    assert torch.equal(logits(detached, tokens(1, 70)), logits(pair.plain, tokens(1, 70)))


# Properties that do not depend on the architecture.


@pytest.fixture(scope="module")
def llama() -> Pair:
    plain = tiny_model("llama", torch.float64)
    gated = seerattn.attach(copy.deepcopy(plain), GATE, SPARSE, impl="reference", layers=[1]).eval()
    return Pair(plain, gated, 1e-10)


def test_chunk_within_a_block_changes_only_that_query_block(llama: Pair) -> None:
    # Only the last layer is sparse, so that a difference cannot spread to later tokens.
    ids = tokens(1, 300)
    one_shot, chunked = logits(llama.gated, ids), turns(llama.gated, ids, [150])
    changed = ((one_shot - chunked).abs().amax(-1)[0] > 1e-9).nonzero()[:, 0] // GATE.block_q
    assert changed.unique().tolist() in ([], [150 // GATE.block_q])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_keep_all_stays_within_the_error_of_the_dtype(dtype: torch.dtype) -> None:
    exact = tiny_model("llama", torch.float64)
    ids = tokens(2, 130)
    expected = logits(exact, ids)
    plain = copy.deepcopy(exact).to(dtype)
    own = difference(logits(plain, ids).double(), expected)
    gated = seerattn.attach(plain, GATE, KeepAll(), impl="reference").eval()
    out = logits(gated, ids)
    assert out.dtype == dtype
    # The unpatched model's own error against fp64, twice, and one rounding of the largest logit.
    assert difference(out.double(), expected) < 2 * own + torch.finfo(dtype).eps * float(expected.abs().max())


def every_path(base: str, gates: str) -> dict[str, Callable[[], torch.nn.Module]]:
    def load_adapter() -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(base)
        model.load_adapter(gates)
        return model

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")))
    return {
        "attach": lambda: seerattn.attach(AutoModelForCausalLM.from_pretrained(base), gates),
        "AutoModelForCausalLM": lambda: AutoModelForCausalLM.from_pretrained(gates),
        "AutoPeftModelForCausalLM": lambda: AutoPeftModelForCausalLM.from_pretrained(gates),
        "PeftModel": lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), gates),
        "load_adapter": load_adapter,
        "pipeline": lambda: pipeline("text-generation", model=gates, tokenizer=words).model,
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, torch.Tensor]:
    """Folders of a base model and of its gates, and the sparse logits of a prompt."""
    folder = tmp_path_factory.mktemp("saved")
    base, gates = str(folder / "base"), str(folder / "gates")
    tiny_model("llama").save_pretrained(base)
    gated = seerattn.attach(AutoModelForCausalLM.from_pretrained(base), GATE, SPARSE, impl="reference").eval()
    gated.save_pretrained(gates)
    return base, gates, logits(gated, tokens(2, 130))


@pytest.mark.parametrize("path", every_path("", ""))
def test_every_way_of_loading_gives_identical_logits(saved: tuple, path: str) -> None:
    base, gates, expected = saved
    model = every_path(base, gates)[path]()
    seerattn.set_policy(model, SPARSE, impl="reference")
    assert torch.equal(logits(model, tokens(2, 130)), expected)


def test_saved_and_loaded_gates_are_identical_and_lose_identically(saved: tuple) -> None:
    from peft import PeftModel

    def loss_fn(gate, q, k, target, segment_ids):
        rows = -(target * gate(q, k).softmax(-1).clamp(min=1e-9).log()).sum(-1)
        return rows.mean(), {}

    base, gates, _ = saved
    losses = []
    for _ in range(2):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), gates, is_trainable=True)
        out = model(input_ids=tokens(2, 130), gate_losses=GateLosses(loss_fn), use_cache=False)
        out["loss"].backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        losses.append((out["loss"].detach(), grads))
    assert losses[0][1].keys() == {n for n, p in model.named_parameters() if "seer_gate" in n}
    assert torch.equal(losses[0][0], losses[1][0])
    assert all(torch.equal(losses[0][1][name], losses[1][1][name]) for name in losses[0][1])
