"""Distil gates for the reference model: many forms of gate side by side in one run, each saved as an adapter.

All variants see the same sequences and share one target map a step, so their differences are not those of data or
order, and the dearest part of a step is paid once. The layers of the model are laid side by side as heads of one
gate, which is the same arithmetic in a sixth of the kernel launches. Each variant is saved as a PEFT adapter in
OUTPUT/NAME and then evaluated, beside the oracle and streaming, as perplexity on held-out books and as retrieval
(teacher-forced exact match), every row of every head at the same budget of blocks: one JSON line a measure in
OUTPUT/ablation.jsonl.

    python recipes/reference_gates.py --model assets/reference-model --train books/train-000.jsonl.gz \\
        --held-out books/validation-000.jsonl.gz --seconds 250 --output outputs/gates

`seerattn distill` trains one form of gate for any model; this recipe exists to choose the form.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from seerattn.baselines.oracle import OracleSelector
from seerattn.baselines.streaming import StreamingSelector
from seerattn.eval.data import Window
from seerattn.eval.documents import RecallDocument, key_value_document, passkey_document, training_document
from seerattn.eval.needle import answers
from seerattn.eval.perplexity import document_losses
from seerattn.gate import AttnGate, AttnGateConfig
from seerattn.gate_selector import GateSelector
from seerattn.hf.attach import attach, detach
from seerattn.ops.pooled_attention import pooled_attention
from seerattn.selection import TopK
from seerattn.selection.block_indices import forced_block_mask
from seerattn.training.data import read_documents
from seerattn.training.losses import gate_loss, group_target, target_recall


@dataclass(frozen=True)
class Variant:
    """A gate and how it is trained."""

    config: AttnGateConfig
    lr: float = 3e-3
    loss: str = "kl"
    row_weight: str = "uniform"


BEST = AttnGateConfig()
VARIANTS: dict[str, Variant] = {
    "paper": Variant(AttnGateConfig.paper()),
    "best": Variant(BEST),
    "best-lr1e-3": Variant(BEST, lr=1e-3),
    "best-mass": Variant(BEST, row_weight="mass"),
    "best-unnormalized": Variant(AttnGateConfig(normalize_subblocks=False)),
    "best-q8k1": Variant(AttnGateConfig(key_subblocks=1)),
    "best-q16k16": Variant(AttnGateConfig(query_subblocks=16, key_subblocks=16)),
    "best-norope": Variant(AttnGateConfig(rope=False, distance_bias=64)),
    "best-normal": Variant(AttnGateConfig(init="normal")),
    "best-forced": Variant(AttnGateConfig(exclude_forced=False)),
    "best-group": Variant(AttnGateConfig(share="kv_group")),
}


@dataclass
class Spy:
    """Attention function that runs dense attention and keeps q, k before RoPE and the target of every layer."""

    block: int
    layers: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    rotary: tuple[Tensor, Tensor] | None = None

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        out, target = pooled_attention(query, key, value, block_q=self.block, block_k=self.block, scale=scaling)
        cos, sin = self.rotary
        # The reference model has plain RoPE, whose inverse is the rotation by the opposite angle.
        q, k = apply_rotary_pos_emb(query.float(), key.float(), cos.float(), -sin.float())
        self.layers.append((q.to(query.dtype), k.to(key.dtype), target))
        return out.transpose(1, 2).contiguous(), None


def split_layers(stacked: AttnGate, layers: int) -> list[AttnGate]:
    """The gates of the single layers, out of one gate that holds all of them side by side."""
    gates = []
    for layer in range(layers):
        gate = AttnGate(
            stacked.config,
            num_heads=stacked.num_heads // layers,
            num_kv_heads=stacked.num_kv_heads // layers,
            head_dim=stacked.head_dim,
            inv_freq=stacked.inv_freq,
        ).to(stacked.k_weight.device)
        state = {
            name: weight.chunk(layers)[layer] if "norm" not in name else weight
            for name, weight in stacked.state_dict().items()
        }
        gate.load_state_dict(state)
        gates.append(gate.requires_grad_(False))
    return gates


def save_adapter(base, stacked: AttnGate, folder: Path) -> None:
    """Saves the gates of all layers as a PEFT adapter with the policy that it is evaluated with."""
    adapter = attach(base, stacked.config, policy=TopK(density=0.1))
    attached = [module for module in adapter.modules() if isinstance(module, AttnGate)]
    for gate, trained in zip(attached, split_layers(stacked, len(attached)), strict=True):
        gate.load_state_dict(trained.state_dict())
    adapter.save_pretrained(folder)
    detach(adapter)


def main(
    model: Annotated[Path, typer.Option(help="Folder of the base model.")],
    train: Annotated[list[Path], typer.Option(help="Files of training documents.")],
    held_out: Annotated[Path, typer.Option(help="File of evaluation documents.")],
    output: Annotated[Path, typer.Option(help="Folder of adapters and results.")],
    variants: Annotated[str, typer.Option(help="Comma-separated names, or 'all'.")] = "all",
    seconds: Annotated[float, typer.Option(help="Training time.")] = 240.0,
    context: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 8192,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 4,
    expected_steps: Annotated[int, typer.Option(help="Steps at which the warm-up of 5 % ends is counted from.")] = 600,
    recall_share: Annotated[float, typer.Option(help="Share of sequences that are recall documents.")] = 0.3,
    documents: Annotated[int, typer.Option(help="Evaluation documents of each kind.")] = 32,
    books: Annotated[int, typer.Option(help="Evaluation books.")] = 8,
    densities: Annotated[str, typer.Option(help="Densities of the evaluation.")] = "0.1,0.2",
    seed: Annotated[int, typer.Option(help="Seed of data and initial gates.")] = 0,
) -> None:
    """Train all variants side by side, then evaluate each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval().requires_grad_(False)
    config = base.config
    layers, head_dim = config.num_hidden_layers, config.head_dim
    bos = tokenizer.bos_token_id
    names = list(VARIANTS) if variants == "all" else variants.split(",")

    def encode(path: Path, limit: int | None = None) -> list[list[int]]:
        texts = read_documents([path])[:limit]
        return tokenizer(texts, add_special_tokens=False, verbose=False).input_ids

    haystacks = [ids for path in train for ids in encode(path) if len(ids) > context]
    validation = [ids for ids in encode(held_out, 4 * books) if len(ids) > context][:books]
    print(f"{len(haystacks)} training documents, {len(validation)} validation documents", flush=True)

    def sample() -> list[int]:
        ids = rng.choice(haystacks)
        if rng.random() < recall_share:
            return training_document(tokenizer, ids, context, rng, bos_token_id=bos).input_ids
        start = rng.randrange(len(ids) - context)
        return [bos, *ids[start : start + context - 1]]

    torch.manual_seed(seed)
    gates = {
        name: AttnGate(
            VARIANTS[name].config,
            num_heads=layers * config.num_attention_heads,
            num_kv_heads=layers * config.num_key_value_heads,
            head_dim=head_dim,
            inv_freq=base.model.rotary_emb.inv_freq,
        ).to(device)
        for name in names
    }
    optimizers = {
        name: torch.optim.AdamW(gate.parameters(), lr=VARIANTS[name].lr, weight_decay=0.0)
        for name, gate in gates.items()
    }
    block = BEST.block_q
    spy = Spy(block)
    AttentionInterface.register("gate_ablation_spy", spy)
    plain = config._attn_implementation
    base.set_attn_implementation("gate_ablation_spy")
    num_blocks = -(-context // block)
    forced = forced_block_mask(0, context, num_blocks, num_blocks, block, block).to(device)[:, None]

    step, start = 0, time.perf_counter()
    losses = {name: torch.zeros((), device=device) for name in names}
    recalls = {name: torch.zeros((), device=device) for name in names}
    while (elapsed := time.perf_counter() - start) < seconds:
        progress = elapsed / seconds
        ids = torch.tensor([sample() for _ in range(batch)], device=device)
        spy.layers.clear()
        with torch.no_grad():
            spy.rotary = base.model.rotary_emb(base.lm_head.weight, torch.arange(context, device=device)[None])
            base.model(input_ids=ids, use_cache=False)
        q, k, target = (torch.cat(parts, dim=1) for parts in zip(*spy.layers))
        for name, gate in gates.items():
            variant = VARIANTS[name]
            scores = gate(q, k)
            ignore = forced if variant.config.exclude_forced else None
            goal = group_target(target, gate.mask_heads)
            loss = gate_loss(scores, goal, ignore=ignore, kind=variant.loss, row_weight=variant.row_weight)
            optimizers[name].zero_grad(set_to_none=True)
            loss.backward()
            warm = min(1.0, (step + 1) / (0.05 * expected_steps))
            for group in optimizers[name].param_groups:
                group["lr"] = variant.lr * warm * (0.5 + 0.5 * math.cos(math.pi * progress))
            optimizers[name].step()
            losses[name].lerp_(loss.detach(), 0.05 if step else 1.0)
            if step % 20 == 0:
                mask = (
                    TopK(density=0.1)
                    .select(
                        scores.detach(),
                        q_start=0,
                        q_len=context,
                        block_q=block,
                        block_k=block,
                        forced_scored=not variant.config.exclude_forced,
                    )
                    .to_mask()
                )
                recalls[name].lerp_(target_recall(mask, target).mean(), 0.2 if step else 1.0)
        step += 1
        if step in (1, 10) or step % 100 == 0:
            rate = step * batch * context / (time.perf_counter() - start)
            print(f"step {step}, {time.perf_counter() - start:.0f} s, {rate:.0f} tokens/s", flush=True)
            print("  " + "  ".join(f"{n} {float(losses[n]):.4f} r{float(recalls[n]):.3f}" for n in names), flush=True)

    base.set_attn_implementation(plain)
    output.mkdir(parents=True, exist_ok=True)
    for name, gate in gates.items():
        save_adapter(base, gate, output / name)
    evaluation = random.Random(seed + 1)
    filler = [token for ids in validation for token in ids]
    passkeys = [
        passkey_document(tokenizer, filler, context, evaluation.random(), evaluation, bos_token_id=bos)
        for _ in range(documents)
    ]
    pairs = [key_value_document(tokenizer, filler, context, evaluation, bos_token_id=bos) for _ in range(documents)]
    windows = [Window(number, [bos, *ids[: context - 1]]) for number, ids in enumerate(validation)]

    def report(name: str, density: float | None, **values: float) -> None:
        for what, value in values.items():
            row = {
                "what": what,
                "value": value,
                "variant": name,
                "density": density,
                "n": len(windows) if what == "perplexity" else documents,
                "context": context,
                "steps": step,
                "batch": batch,
                "seconds": seconds,
                "seed": seed,
                "loss": float(losses[name]) if name in losses else None,
                "recall": float(recalls[name]) if name in recalls else None,
                "config": VARIANTS[name].config.to_dict() if name in VARIANTS else None,
                "lr": VARIANTS[name].lr if name in VARIANTS else None,
                "row_weight": VARIANTS[name].row_weight if name in VARIANTS else None,
                "gpu": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                "torch": torch.__version__,
                "command": " ".join(sys.argv),
            }
            with (output / "ablation.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        print(name, density, {k: round(v, 4) for k, v in values.items()}, flush=True)

    def retrieval(asked: list[RecallDocument]) -> tuple[float, float]:
        """Share of right answers, and the mean log-probability of their tokens."""
        found = answers(base, asked)
        per_token = [a.log_prob / (d.answers[-1][1] - d.answers[-1][0]) for a, d in zip(found, asked)]
        return sum(a.correct for a in found) / len(found), sum(per_token) / len(found)

    def evaluate(name: str, density: float | None) -> None:
        _, nats, tokens = document_losses(base, windows)
        passkey, passkey_log_p = retrieval(passkeys)
        pair, pair_log_p = retrieval(pairs)
        report(
            name,
            density,
            perplexity=math.exp(sum(nats) / sum(tokens)),
            passkey=passkey,
            passkey_log_p=passkey_log_p,
            key_value=pair,
            key_value_log_p=pair_log_p,
        )

    evaluate("dense", None)
    for density in (float(x) for x in densities.split(",")):
        policy = TopK(density=density)
        selectors = {
            "oracle": lambda layer, policy=policy: OracleSelector(policy),
            "streaming": lambda layer, policy=policy: StreamingSelector(policy),
        }
        for name, gate in gates.items():
            parts = split_layers(gate, layers)
            selectors[name] = lambda layer, parts=parts, policy=policy: GateSelector(parts[layer], policy)
        for name, make in selectors.items():
            attach(base, make, impl="reference")
            evaluate(name, density)
            detach(base)


if __name__ == "__main__":
    typer.run(main)
