"""Context parallelism: a prompt over two processes gives what one process gives, with its blocks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_models import tiny_model, tokens
from torch import nn
from two_processes import in_two_processes

import seerattn
from seerattn import AttnGateConfig, KeepAll, Policy, Threshold, TopK
from seerattn.hf.parts import PARTS
from seerattn.methods.streaming import StreamingSelector

SMALL = {"block_q": 32, "block_k": 32, "query_subblocks": 4, "key_subblocks": 4}
FORMS = {"heads": AttnGateConfig(**SMALL), "group": AttnGateConfig(**SMALL, share="kv_group")}
# One without windows, one of which layers have some, one with products of queries and keys that are bounded.
FAMILIES = ("llama", "gemma3", "gemma2")
# The parts of the first are equal; of the others the last part is shorter.
LENGTHS = (320, 331, 65)
POLICIES: dict[str, Policy | None] = {
    "dense": None,
    "all": KeepAll(),
    "top-k": TopK(density=0.6),
    "threshold": Threshold(threshold=0.05),
}


def gated(family: str, form: str) -> nn.Module:
    model = seerattn.attach(tiny_model(family, dtype=torch.float64), FORMS[form], impl="reference")
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "seer_gate" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def run(model: nn.Module, length: int) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Logits of this process's tokens and the densities of its heads; none where nothing chooses."""
    with torch.no_grad(), seerattn.record_density(model) as meter:
        logits = model(input_ids=tokens(2, length)).logits
    return logits, meter.by_head()


def cases() -> list[tuple[str, str, int]]:
    return [(form, name, length) for form in FORMS for name in POLICIES for length in LENGTHS]


def work(folder: Path) -> None:
    """One process of two."""
    dist.init_process_group("gloo")
    found = {}
    for family in FAMILIES:
        for form in FORMS:
            model = gated(family, form)
            with seerattn.context_parallel(model) as spread:
                for name, policy in POLICIES.items():
                    with seerattn.policy(model, policy):
                        for length in LENGTHS:
                            logits, densities = run(model, length)
                            whole = spread.gather(logits)
                            assert torch.equal(spread.last(logits[:, -1:]), whole[:, -1])
                            found[family, form, name, length] = whole, densities
                refuse(model)
            assert run(model, 65)[0].shape[1] == 65, "a model is as it was afterwards"
    torch.save(found, folder / f"{dist.get_rank()}.pt")


def refuse(model: nn.Module) -> None:
    """What cannot be spread is refused before anything is exchanged, and nothing stays behind."""
    ids = tokens(2, 40)
    padded = torch.ones_like(ids)
    padded[0, 0] = 0
    for options, got in (
        ({"input_ids": ids, "attention_mask": padded}, "padding"),
        ({"input_ids": ids, "position_ids": torch.arange(40)[None]}, "position_ids"),
        ({"input_ids": ids, "labels": ids}, "labels"),
        ({"inputs_embeds": torch.zeros(2, 40, 64)}, "inputs_embeds"),
        ({"input_ids": ids[:, :1]}, "1"),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=f"got {got}"):
            model(**options)
    with pytest.raises(ValueError, match="got gradients"):
        model(input_ids=ids)
    assert PARTS.get() is None


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("spread")
    in_two_processes(__file__, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_spread_prompt_gives_what_one_process_gives(parts: list[dict], family: str) -> None:
    for form in FORMS:
        model = gated(family, form)
        for name, policy in POLICIES.items():
            seerattn.set_policy(model, policy)
            for length in LENGTHS:
                expected, densities = run(model, length)
                for part in parts:
                    logits, _ = part[family, form, name, length]
                    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9, msg=f"{form} {name} {length}")
                for layer, density in densities.items():
                    # The first half of the heads is in the first process.
                    halves = [part[family, form, name, length][1][layer] for part in parts]
                    assert torch.equal(torch.cat(halves), density), (form, name, length, layer)
                    assert name != "top-k" or length < 300 or density.max() < 0.7


def test_models_without_gates_and_other_selectors_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)

    def refusal(model: nn.Module) -> str:
        with pytest.raises(ValueError) as error, seerattn.context_parallel(model):
            pass
        return str(error.value)

    model = tiny_model("llama")
    assert "model must have gates to spread its prompts" in refusal(model)
    seerattn.attach(model, StreamingSelector(TopK(density=0.5)))
    assert "model must have gates to spread its prompts" in refusal(model)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
    assert "must divide the heads of every layer, got 3 processes" in refusal(gated("llama", "heads"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]))
