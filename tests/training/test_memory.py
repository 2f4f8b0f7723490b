"""The memory estimate against what can be counted exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from tiny_models import tiny_model, tokens
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from written_tables import table, text_of

import seerattn
from seerattn.bench.model import SIZES, random_model
from seerattn.gate import AttnGate, AttnGateConfig
from seerattn.training.memory import Way, estimate_finetuning, estimate_memory, own_bytes, ways


def test_estimate_matches_counted_bytes_and_scales_with_the_context() -> None:
    base = tiny_model("llama", dtype=torch.bfloat16).requires_grad_(False)
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
    options |= {"masked": False}
    whole = estimate_finetuning(model, gates, **options)
    # Weights, gradients and two moments in fp32.
    held = 4 * sum(p.numel() for p in model.parameters())
    assert (whole["weights"], whole["gradients"], whole["AdamW"]) == (held, held, 2 * held)
    assert whole["inputs of all layers"] == 2 * 512 * 64 * 4
    assert whole["working copies of weights"] == held // 2
    sharded = estimate_finetuning(model, gates, **options, way=Way(4, sharded=True))
    assert sharded["weights"] == held // 4 and sharded["inputs of all layers"] == whole["inputs of all layers"]
    kept = estimate_finetuning(model, gates, **options | {"checkpointing": False})
    assert kept["activations of all layers"] == 2 * whole["activations of a layer"]
    assert sum(kept.values()) > sum(whole.values()) > sum(sharded.values())
    dense = estimate_finetuning(model, [], **options)
    assert not any("gate" in part or "maps" in part for part in dense)


def test_ddp_holds_a_second_copy_of_the_gradients_and_fsdp_none() -> None:
    model = tiny_model("llama")
    options: dict[str, Any] = {"micro_batch_size": 1, "context": 256, "checkpointing": True, "autocast": False}
    options |= {"target_share": 1.0, "masked": False}
    alone = estimate_finetuning(model, [], **options)
    together = estimate_finetuning(model, [], **options, way=Way(4))
    assert together == alone | {"buckets of gradients": 4 * sum(p.numel() for p in model.parameters())}
    sharded = estimate_finetuning(model, [], **options, way=Way(4, sharded=True))
    assert sharded["gradients"] == alone["gradients"] // 4 and "buckets of gradients" not in sharded


def test_mask_of_packed_documents_is_what_dense_attention_keeps_of_it() -> None:
    model, length = tiny_model("llama", attn_implementation="sdpa"), 256
    kept: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2:] == (length, length):
            kept[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    at = torch.cat((torch.arange(96), torch.arange(160)))[None]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = model(input_ids=tokens(1, length), position_ids=at, use_cache=False)
    options: dict[str, Any] = {"micro_batch_size": 1, "context": length, "autocast": False, "target_share": 1.0}
    every, one = (estimate_finetuning(model, [], **options, checkpointing=c, masked=True) for c in (False, True))
    # Beside those of the layers the boolean one that they are made of.
    assert len(kept) == 2 and every["mask of packed documents"] == sum(kept.values()) + length**2
    assert one["mask of packed documents"] == sum(kept.values()) // 2 + length**2
    assert out.logits.requires_grad


LLAMA_3 = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


def counted(model: nn.Module, ranks: int) -> int:
    """Bytes that a process of tensor parallelism holds of a Llama without its embeddings, module by module."""
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            # Each is cut by its rows or its columns.
            total += module.out_features * module.in_features * module.weight.element_size() // ranks
        elif isinstance(module, LlamaRMSNorm):
            total += module.weight.numel() * module.weight.element_size()
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planned_weights_of_a_large_model_are_those_of_its_modules(dtype: torch.dtype) -> None:
    size = SIZES["llama-3.1-70b"]
    model = random_model(replace(size, shape=replace(size.shape, dtype=dtype)), torch.device("meta"))
    bytes_each, embeddings = torch.empty(0, dtype=dtype).element_size(), size.vocab * size.hidden
    # The published number of parameters of Llama-3.1-70B.
    assert own_bytes(model, 1) == 70_553_706_496 * bytes_each == counted(model, 1) + embeddings * bytes_each
    # Newer versions of transformers cut the embeddings as well.
    cut = 8 if any("embed_tokens" in name for name in getattr(model, "tp_plan", None) or ()) else 1
    dealt_out = counted(model, 8) + embeddings * bytes_each // cut
    assert own_bytes(model, 8) == dealt_out
    options: dict[str, Any] = {"micro_batch_size": 1, "context": 32768, "checkpointing": True, "autocast": False}
    options |= {"target_share": 0.1, "masked": False}
    whole, tensor = (
        counted(model, 1) + embeddings * bytes_each,
        counted(model, 2) + embeddings * bytes_each // min(cut, 2),
    )
    wanted = {
        Way(): whole,
        Way(8): whole,
        Way(8, sharded=True): whole // 8,
        Way(8, tensor=8): dealt_out,
        Way(8, sharded=True, tensor=2): tensor // 4,
    }
    assert list(wanted) == ways(1, kv_heads=8)
    for way, weights in wanted.items():
        parts = estimate_finetuning(model, [], **options, way=way)
        assert [parts[name] for name in ("weights", "gradients", "AdamW")] == pytest.approx(
            [weights, weights, 2 * weights]
        )


def test_distillation_of_a_sharded_model_holds_its_share_and_two_layers() -> None:
    base = tiny_model("llama", dtype=torch.bfloat16).requires_grad_(False)
    held = 2 * sum(p.numel() for p in base.parameters())
    model = seerattn.attach(base, AttnGateConfig())
    gates = [module for module in model.modules() if isinstance(module, AttnGate)]
    options: dict[str, Any] = {"micro_batch_size": 1, "context": 256}
    alone, sharded = (estimate_memory(model, gates, **options, way=way) for way in (Way(), Way(4, sharded=True)))
    assert sharded["base model"] == held // 4 and sharded["working copies of weights"] == 2 * held // 2
    assert sharded["gates, gradients, AdamW"] == alone["gates, gradients, AdamW"] // 4
    same = ("activations of a layer", "gate inputs and graph of a layer", "target and score maps of a layer")
    assert all(sharded[name] == alone[name] for name in same)


def test_documented_estimates_are_those_of_the_plan() -> None:
    text = text_of("docs/finetuning.md")
    header, *rows = table("docs/finetuning.md", "| estimate, GiB")
    assert header[1:] == [
        *("1 process", "8, DDP", "8, FSDP2", "16, FSDP2", "32, FSDP2"),
        *("8, TP", "8, FSDP2 x TP, 4 x 2"),
    ]
    columns = [Way(), Way(8), Way(8, True), Way(16, True), Way(32, True), Way(8, tensor=8), Way(8, True, tensor=2)]
    found = {row[0]: [int(cell) for cell in row[1:]] for row in rows}
    options: dict[str, Any] = {"micro_batch_size": 1, "context": 32768, "checkpointing": True, "target_share": 0.1}
    gib = 2**30
    for size, shape in LLAMA_3.items():
        for dtype, name in ((torch.float32, "fp32 weights, bf16 compute"), (torch.bfloat16, "`--dtype bfloat16`")):
            with init_empty_weights():
                base = LlamaForCausalLM(LlamaConfig(vocab_size=128256, num_key_value_heads=8, **shape)).to(dtype)
            own = 4 * base.num_parameters()
            model = seerattn.attach(base, AttnGateConfig())
            gates = [module for module in model.modules() if isinstance(module, AttnGate)]
            options |= {"autocast": dtype == torch.float32, "masked": False}
            parts = [estimate_finetuning(model, gates, **options, way=way) for way in columns]
            row = next(cells for told, cells in found.items() if told.startswith(f"{size}, {name}"))
            # Older versions of transformers leave the embeddings whole.
            known = len(row) if any("embed_tokens" in name for name in getattr(base, "tp_plan", None) or ()) else 5
            assert row[:known] == [round(sum(part.values()) / gib) for part in parts][:known]
            if dtype == torch.float32:
                # Read by the first process into the memory of its host.
                assert f"{round(own / gib)} GiB for {size}" in text
            if (size, dtype) == ("70B", torch.float32):
                offloaded = sum(parts[2][part] for part in ("weights", "gradients", "AdamW"))
                assert f"some {round((sum(parts[2].values()) - offloaded) / gib)} GiB on each GPU" in text
            masked = estimate_finetuning(model, gates, **options | {"masked": True})
            assert masked["mask of packed documents"] == 3 * gib
