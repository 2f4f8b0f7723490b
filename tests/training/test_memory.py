"""The memory estimate against what can be counted exactly."""

from __future__ import annotations

import torch
from tiny_models import tiny_model

import seerattn
from seerattn.gate import AttnGate, AttnGateConfig
from seerattn.training.memory import estimate_finetuning, estimate_memory


def test_estimate_matches_counted_bytes_and_scales_with_the_context() -> None:
    base = tiny_model("llama", dtype=torch.bfloat16)
    base_bytes = 2 * sum(p.numel() for p in base.parameters())
    model = seerattn.attach(base, AttnGateConfig.paper())
    gates = [module for module in model.modules() if isinstance(module, AttnGate)]
    short, long = (estimate_memory(model, gates, micro_batch_size=2, context=n) for n in (256, 1024))
    assert short["base model"] == long["base model"] == base_bytes
    # Weights, gradients and two moments in fp32.
    assert short["gates, gradients, AdamW"] == 16 * 2 * 4 * 96 * 32
    assert long["activations of a layer"] == 4 * short["activations of a layer"]
    assert long["gate inputs and graph of a layer"] == 4 * short["gate inputs and graph of a layer"]
    # Samples x heads x blocks squared x fp32, a few copies.
    one_map = 2 * 4 * 16 * 16 * 4
    assert long["target and score maps of a layer"] % one_map == 0
    assert long["target and score maps of a layer"] == 16 * short["target and score maps of a layer"]


def test_estimate_of_finetuning_matches_counted_bytes_and_what_shards_and_checkpoints_save() -> None:
    base = tiny_model("llama")
    model = seerattn.attach(base, AttnGateConfig.paper())
    gates = [module for module in model.modules() if isinstance(module, AttnGate)]
    options = {"micro_batch_size": 2, "context": 256, "checkpointing": True, "autocast": True, "target_share": 0.5}
    whole = estimate_finetuning(model, gates, **options)
    # Weights, gradients and two moments in fp32.
    held = 4 * sum(p.numel() for p in model.parameters())
    assert (whole["weights"], whole["gradients"], whole["AdamW"]) == (held, held, 2 * held)
    assert whole["inputs of all layers"] == 2 * 512 * 64 * 4
    assert whole["working copies of weights"] == held // 2
    sharded = estimate_finetuning(model, gates, **options, shards=4)
    assert sharded["weights"] == held // 4 and sharded["inputs of all layers"] == whole["inputs of all layers"]
    kept = estimate_finetuning(model, gates, **options | {"checkpointing": False})
    assert kept["activations of all layers"] == 2 * whole["activations of a layer"]
    assert sum(kept.values()) > sum(whole.values()) > sum(sharded.values())
    dense = estimate_finetuning(model, [], **options)
    assert not any("gate" in part or "maps" in part for part in dense)
