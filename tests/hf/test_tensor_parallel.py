"""Tensor parallelism: gates follow their heads, and two processes give what one gives."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_models import tiny_model, tokens
from torch import nn
from torch.distributed.tensor import DTensor
from two_processes import in_two_processes

import seerattn
from seerattn import AttnGateConfig, Policy, Threshold, TopK
from seerattn.hf.state import attachment_of
from seerattn.selection.budgets import HeadBudgets
from seerattn.training.memory import own_bytes

PROMPT, LAYERS = 331, 2
SMALL = {"block_q": 32, "block_k": 32, "query_subblocks": 4, "key_subblocks": 4}
FORMS = {
    "default": AttnGateConfig(**SMALL),
    "no-q-linear": AttnGateConfig.paper(block_q=32, block_k=32),
    "group": AttnGateConfig(**SMALL, share="kv_group", distance_bias=8),
}
FAMILIES = ("llama", "qwen3")
# By name: one of them for all heads, one with settings of every head, and one whose density budgets share.
HEADS = {"default": 4, "no-q-linear": 4, "group": 2}


def policies(form: str) -> dict[str, Policy]:
    densities = [[0.4 + 0.1 * (layer + head) for head in range(HEADS[form])] for layer in range(LAYERS)]
    return {"budgets": TopK(density=0.6), "heads": TopK(density=densities), "threshold": Threshold(threshold=0.05)}


def budgets(form: str) -> HeadBudgets:
    """Of densities that differ between the heads of the two processes."""
    heads = HEADS[form]
    row = [[0.6 + 0.12 * (head - (heads - 1) / 2) for head in range(heads)] for _ in range(LAYERS)]
    config = FORMS[form]
    made = {"block_q": config.block_q, "block_k": config.block_k, "target": str(config.target), "gain": "sum:2"}
    return HeadBudgets(ladder=(0.6,), lengths=(PROMPT,), densities=[[row]], text="none", windows=1, **made)


def runs(model: nn.Module, gates: Path) -> dict[str, torch.Tensor]:
    """What a model with gates gives, by what was asked of it; densities are those of the heads that are here."""
    found = {}
    for form in FORMS:
        gated = seerattn.attach(model, gates / form, impl="reference")
        for name, policy in policies(form).items():
            seerattn.set_policy(gated, policy)
            with torch.no_grad(), seerattn.record_density(gated) as meter:
                found[f"{form} {name}"] = gated(input_ids=tokens(2, PROMPT)).logits
            found[f"{form} {name} density"] = torch.stack(list(meter.by_head().values()))
        written = gated.generate(input_ids=tokens(1, PROMPT), max_new_tokens=4, do_sample=False)
        found[f"{form} written"] = written[0, PROMPT:]
        seerattn.detach(gated)
    return found


def work(folder: Path) -> None:
    """One process of two."""
    from transformers import AutoModelForCausalLM

    for family in FAMILIES:
        model = AutoModelForCausalLM.from_pretrained(folder / family, dtype=torch.float64, tp_plan="auto").eval()
        found = runs(model, folder / f"{family}-gates")
        with pytest.raises(ValueError, match="gates must learn on a model in one piece, got one whose heads"):
            seerattn.attach(model, AttnGateConfig())
        with pytest.raises(ValueError, match=r"gates must be loaded by seerattn\.attach or PeftModel\.from_pretrained"):
            model.load_adapter(folder / f"{family}-gates" / "default")
        assert attachment_of(model) is None
        gated = PeftModel.from_pretrained(model, folder / f"{family}-gates" / "default")
        seerattn.set_policy(gated, policies("default")["heads"], impl="reference")
        with torch.no_grad():
            logits = gated(input_ids=tokens(2, PROMPT)).logits
        torch.testing.assert_close(logits, found["default heads"], rtol=0, atol=1e-9)
        seerattn.detach(gated)
        gated = seerattn.attach(model, folder / f"{family}-gates" / "default")
        with pytest.raises(ValueError, match="gates must be saved from a model in one piece, got the part of one"):
            gated.save_pretrained(folder / "saved")
        here = (p.to_local() if isinstance(p, DTensor) else p for p in gated.parameters())
        found["bytes"] = torch.tensor(sum(p.numel() * p.element_size() for p in here))
        torch.save(found, folder / f"{family}-{torch.distributed.get_rank()}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models, their gates with weights that differ from head to head, and what two processes made of them."""
    folder = tmp_path_factory.mktemp("parallel")
    for family in FAMILIES:
        # transformers 5.17 cuts the vocabulary as well.
        model = tiny_model(family, dtype=torch.float64, vocab_size=98)
        model.save_pretrained(folder / family)
        for form, config in FORMS.items():
            gated = seerattn.attach(model, config)
            for name, parameter in gated.named_parameters():
                if "seer_gate" in name:
                    nn.init.normal_(parameter, std=0.2)
            gated.save_pretrained(folder / f"{family}-gates" / form)
            seerattn.detach(gated)
            path = folder / f"{family}-gates" / form / "adapter_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"budgets": budgets(form).to_dict()}))
    in_two_processes(__file__, folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_give_what_one_gives(folder: Path, family: str) -> None:
    model = tiny_model(family, dtype=torch.float64, vocab_size=98)
    alone = runs(model, folder / f"{family}-gates")
    parts = [torch.load(folder / f"{family}-{rank}.pt") for rank in range(2)]
    planned = own_bytes(seerattn.attach(model, folder / f"{family}-gates" / "default"), 2)
    seerattn.detach(model)
    assert [int(part["bytes"]) for part in parts] == [planned, planned], "a plan tells what a process really holds"
    for name, expected in alone.items():
        if name.endswith("density"):
            # The first half of the heads is in the first process.
            assert torch.equal(torch.cat([part[name] for part in parts], dim=1), expected), name
        else:
            for part in parts:
                torch.testing.assert_close(part[name], expected, rtol=0, atol=1e-9, msg=name)
    logits = [x for name, x in alone.items() if name.split()[-1] in ("budgets", "heads", "threshold")]
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(logits) for b in logits[:i]), "all must differ"
    with torch.no_grad():
        dense = model(input_ids=tokens(2, PROMPT)).logits
    assert all((dense - x).abs().max() > 1e-4 for x in logits)


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]))
