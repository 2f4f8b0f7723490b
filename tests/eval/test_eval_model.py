"""A model that is measured: gates by folder, selectors for a while, and the same model afterwards."""

import shutil

import pytest
import torch
from tiny_corpus import tiny_tokenizer
from tiny_models import tiny_model, tokens

from seerattn.data.windows import Window
from seerattn.hf.eval_model import EvalModel, Loading
from seerattn.hf.state import layer_states
from seerattn.methods.gate import gate_selectors
from seerattn.methods.streaming import Streaming
from seerattn.selection import TopK


@pytest.fixture
def fresh() -> EvalModel:
    return EvalModel(tiny_model("llama"), tiny_tokenizer(), name="tiny")


def logits(model: EvalModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.model(input_ids=ids).logits


def test_gates_are_loaded_once_by_folder_whether_the_model_is_held_or_not(fresh, gate_folders) -> None:
    ids, chosen = tokens(1, 300), {}
    before = logits(fresh, ids)
    first = fresh.gates(gate_folders[0])
    assert fresh.gates(gate_folders[0]) is first and sorted(first.gates) == [0, 1]
    assert (first.policy, first.budgets) == (None, None) and not layer_states(fresh.model)
    with fresh.held():
        held = fresh.gates(gate_folders[1])
        assert torch.equal(logits(fresh, ids), before)
        with fresh.attached(gate_selectors(held, TopK(density=0.4))) as run:
            chosen["held"] = logits(fresh, ids)
            assert 0 < run.density() < 1
        assert torch.equal(logits(fresh, ids), before)
    assert not layer_states(fresh.model) and torch.equal(logits(fresh, ids), before)
    with fresh.attached(gate_selectors(fresh.gates(gate_folders[1]), TopK(density=0.4))):
        chosen["not"] = logits(fresh, ids)
    assert torch.equal(chosen["held"], chosen["not"]) and not torch.equal(chosen["not"], before)


def test_gates_of_another_model_are_refused_and_leave_this_one_as_it_was(fresh, gate_folders, tmp_path) -> None:
    ids = tokens(1, 100)
    other = EvalModel(tiny_model("llama", num_attention_heads=2, num_key_value_heads=1), tiny_tokenizer(), name="other")
    before = logits(other, ids)
    with pytest.raises(ValueError, match="num_attention_heads"):
        other.gates(gate_folders[0])
    with other.held():
        with pytest.raises(ValueError, match="num_attention_heads"):
            other.gates(gate_folders[0])
        assert torch.equal(logits(other, ids), before)
    assert torch.equal(logits(other, ids), before) and not layer_states(other.model)
    folder = shutil.copytree(gate_folders[0], tmp_path / "gates")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="safetensors"):
        fresh.gates(folder)


def test_gates_are_not_loaded_onto_a_model_with_selectors(fresh, gate_folders) -> None:
    with fresh.attached(Streaming().selectors().at(0.5)), pytest.raises(ValueError, match="model"):
        fresh.gates(gate_folders[0])


def test_dense_calls_are_watched_and_observed_alike_whether_the_model_is_held_or_not(fresh) -> None:
    windows = [Window(0, tokens(1, 90)[0].tolist()), Window(1, tokens(1, 90, seed=1)[0].tolist())]

    def seen() -> list[torch.Tensor]:
        watched, observed, steps = [], [], []
        fresh.watch(windows, lambda call: watched.append(call.query), batch=2, advance=steps.append)
        fresh.observe(windows, lambda q, k, context: observed.append(q), batch=2, advance=steps.append)
        assert len(watched) == len(observed) == 2 and steps == [2, 2]
        assert all(torch.equal(a, b) for a, b in zip(watched, observed))
        return [*watched, *observed]

    free = seen()
    with fresh.held():
        held = seen()
        assert layer_states(fresh.model)
    assert all(torch.equal(a, b) for a, b in zip(free, held)) and not layer_states(fresh.model)


def test_an_untouched_model_counts_as_dense_and_an_unknown_implementation_is_refused(fresh) -> None:
    with fresh.untouched() as run:
        run.model(input_ids=tokens(1, 70))
        assert run.density() == 1 and run.head_density() == []
    with pytest.raises(ValueError, match="impl"):
        EvalModel(tiny_model("llama"), tiny_tokenizer(), name="tiny", impl="magic")
    for values in ({"dtype": "int8"}, {"device": "abacus"}):
        with pytest.raises(ValueError, match=next(iter(values))):
            _ = Loading(**values).place
