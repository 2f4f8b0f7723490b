"""Distil gates for the reference model: many forms of gate side by side in one run, each saved as an adapter.

All variants see the same sequences and share one target map a step, so their differences are not those of data or
order, and the dearest part of a step is paid once. The layers of the model are laid side by side as heads of one
gate, which is the same arithmetic in a sixth of the kernel launches; a step trains on one stretch of query blocks of
its sequences (``--stretch``), a quarter by default, so that it sees four times the text at the same cost. Each variant
is saved as a PEFT adapter in OUTPUT/NAME, described by a line of OUTPUT/variants.jsonl, and evaluated with the oracle
and streaming beside it: perplexity of held-out books and retrieval, into OUTPUT/ablation.jsonl, which
`seerattn report` reads.

    python research/reference_gates.py --model assets/reference-model --train books/train-000.jsonl.gz \\
        --held-out books/validation-000.jsonl.gz --steps 3000 --output outputs/gates

`seerattn distill` trains one form of gate for any model; this recipe exists to choose the form.
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from seerattn.bench.model import PLAIN_FORM
from seerattn.data.retrieval import training_document
from seerattn.data.windows import cut_windows, digest, token_documents
from seerattn.eval.choice import DENSE, at_density
from seerattn.eval.tasks.perplexity import PerplexityJob
from seerattn.eval.tasks.retrieval import Needle, RetrievalJob
from seerattn.gate import AttnGate, AttnGateConfig
from seerattn.hf.attach import attach, detach
from seerattn.hf.eval_model import EvalModel
from seerattn.methods.gate import Gate
from seerattn.methods.oracle import Oracle
from seerattn.methods.streaming import Streaming
from seerattn.ops.attention_map import attention_map
from seerattn.results.file import ResultsFile
from seerattn.selection import TopK
from seerattn.selection.block_indices import forced_block_mask
from seerattn.selection.target_map import group_target, target_recall
from seerattn.training.losses import gate_loss


@dataclass(frozen=True)
class Variant:
    """A gate and how it is trained.

    Attributes:
        config: form of the gate.
        lr: peak learning rate of AdamW, after a warm-up of 5 %, cosine to zero.
        loss: see `gate_loss`.
        row_weight: see `gate_loss`.
        target_power: the target is taken to this power and normalised again; below 1 its small blocks count more.
        share: trained on the first so many of the steps, with a schedule of that length.
    """

    config: AttnGateConfig
    lr: float = 3e-3
    loss: str = "kl"
    row_weight: str = "uniform"
    target_power: float = 1.0
    share: float = 1.0


def form(**changes) -> Variant:
    """The plain form with some fields changed."""
    return Variant(replace(PLAIN_FORM, **changes))


def paper(**changes) -> Variant:
    """The published form with some fields changed."""
    return Variant(AttnGateConfig.paper(**changes))


def sub_blocks(queries: int, keys: int, **changes) -> Variant:
    """The plain form with other numbers of sub-blocks."""
    return form(query_subblocks=queries, key_subblocks=keys, **changes)


BEST, PAPER = form(), paper()
SALIENT = ("salient", "max", "min")
STUDIES: dict[str, dict[str, Variant]] = {
    "form": {"paper": PAPER, "8x8": BEST},
    "sub-blocks": {
        f"{q}x{k}": sub_blocks(q, k)
        for q, k in ((1, 1), (8, 1), (1, 8), (4, 4), (8, 4), (4, 8), (2, 16), (16, 4), (8, 16), (16, 16))
    },
    "gate dim": {
        "dim16": form(gate_dim=16),
        "dim32": form(gate_dim=32),
        "dim128": form(gate_dim=128),
        "16x16-dim16": sub_blocks(16, 16, gate_dim=16),
        "4x4-dim32": sub_blocks(4, 4, gate_dim=32),
    },
    "blocks": {
        "block32-4x4": sub_blocks(4, 4, block_q=32, block_k=32),
        "block128-16x16": sub_blocks(16, 16, block_q=128, block_k=128),
        "block128-8x8": sub_blocks(8, 8, block_q=128, block_k=128),
        "block32-paper": paper(block_q=32, block_k=32),
        "block128-paper": paper(block_q=128, block_k=128),
    },
    "share": {
        "group": form(share="kv_group"),
        "group-4x4": sub_blocks(4, 4, share="kv_group"),
        "group-16x16": sub_blocks(16, 16, share="kv_group"),
    },
    "training target": {
        "forced": form(exclude_forced=False),
        "unnormalized": form(normalize_subblocks=False),
        "normal-init": form(init="normal"),
        "paper-unforced": paper(exclude_forced=True),
        "paper-identity": paper(init="identity", exclude_forced=True),
    },
    "position": {
        "norope": form(rope=False),
        "bias": form(rope=False, distance_bias=64),
        "paper-norope": paper(rope=False),
    },
    "pooling": {
        "q-avg-k-avg": form(q_pooling=("avg",), k_pooling=("avg",)),
        "q-avg-k-all": form(q_pooling=("avg",)),
        "q-maxmin-k-maxmin": form(q_pooling=("max", "min"), k_pooling=("max", "min")),
        "paper-k-avg": paper(k_pooling=("avg",)),
        "paper-k-maxmin": paper(k_pooling=("max", "min")),
        "paper-q-max": paper(q_pooling=("max",)),
    },
    "salient": {
        f"salient-{q}x{k}": sub_blocks(q, k, q_pooling=SALIENT, k_pooling=SALIENT)
        for q, k in ((1, 1), (8, 1), (2, 8), (4, 4), (4, 8), (8, 8), (16, 16))
    }
    | {
        "salient-alone-4x4": sub_blocks(4, 4, q_pooling=("salient",), k_pooling=("salient",)),
        "salient-avg-4x4": sub_blocks(4, 4, q_pooling=("avg", *SALIENT), k_pooling=("avg", *SALIENT)),
        "salient-group-4x4": sub_blocks(4, 4, q_pooling=SALIENT, k_pooling=SALIENT, share="kv_group"),
        "salient-group-8x8": sub_blocks(8, 8, q_pooling=SALIENT, k_pooling=SALIENT, share="kv_group"),
    },
    "loss": {
        "mse": replace(BEST, loss="mse"),
        "overlap": replace(BEST, loss="overlap"),
        "ranking": replace(BEST, loss="ranking"),
        "mass": replace(BEST, row_weight="mass"),
        "power.5": replace(BEST, target_power=0.5),
        "power2": replace(BEST, target_power=2.0),
    },
    "learning rate": {
        "lr3e-4": replace(BEST, lr=3e-4),
        "lr1e-3": replace(BEST, lr=1e-3),
        "lr1e-2": replace(BEST, lr=1e-2),
        "paper-lr1e-3": replace(PAPER, lr=1e-3),
    },
    "steps": {
        "8x8-quarter": replace(BEST, share=0.25),
        "8x8-half": replace(BEST, share=0.5),
        "paper-quarter": replace(PAPER, share=0.25),
        "paper-half": replace(PAPER, share=0.5),
    },
}
VARIANTS = {name: variant for study in STUDIES.values() for name, variant in study.items()}


@dataclass
class Recorder:
    """Attention function that runs dense attention and keeps q, k before RoPE and the targets of every layer."""

    blocks: list[int]
    stretch: slice = field(default_factory=lambda: slice(None))
    layers: list[tuple[Tensor, ...]] = field(default_factory=list)
    rotary: tuple[Tensor, Tensor] | None = None

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        targets = []
        for block in self.blocks:
            out, (target,) = attention_map(query, key, value, block_q=block, block_k=block, scale=scaling)
            rows = slice(self.stretch.start // block, self.stretch.stop // block)
            targets.append(target[:, :, rows, : rows.stop])
        cos, sin = self.rotary
        # The reference model has plain RoPE, whose inverse is the rotation by the opposite angle.
        q, k = apply_rotary_pos_emb(query.float(), key.float(), cos.float(), -sin.float())
        self.layers.append((q[:, :, self.stretch], k[:, :, : self.stretch.stop], *targets))
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
            pairing=stacked.pairing,
        ).to(stacked.k_weight.device)
        state = {
            name: weight.chunk(layers)[layer] if "norm" not in name else weight
            for name, weight in stacked.state_dict().items()
        }
        gate.load_state_dict(state)
        gates.append(gate.requires_grad_(False))
    return gates


def save_adapter(base: PreTrainedModel, stacked: AttnGate, folder: Path) -> None:
    """Saves the gates of all layers as a PEFT adapter with the policy that it is evaluated with."""
    adapter = attach(base, stacked.config, policy=TopK(density=0.1))
    attached = [module for module in adapter.modules() if isinstance(module, AttnGate)]
    for gate, trained in zip(attached, split_layers(stacked, len(attached)), strict=True):
        gate.load_state_dict(trained.state_dict())
    adapter.save_pretrained(folder)
    detach(adapter)


class Training:
    """One variant on its way: the gate of all layers, its optimizer, and running means of loss and recall."""

    def __init__(self, variant: Variant, gate: AttnGate, steps: int) -> None:
        self.variant, self.gate = variant, gate
        self.steps = max(1, round(steps * variant.share))
        self.optimizer = torch.optim.AdamW(gate.parameters(), lr=variant.lr, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._factor)
        self.loss = torch.zeros((), device=gate.k_weight.device)
        self.recall = torch.zeros((), device=gate.k_weight.device)

    def _factor(self, step: int) -> float:
        warm = min(1.0, (step + 1) / (0.05 * self.steps))
        return warm * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / self.steps)))

    def step(self, number: int, q: Tensor, k: Tensor, target: Tensor) -> None:
        """One step on queries ``q``, the last of the tokens ``k``, against the true map of every head."""
        if number >= self.steps:
            return
        variant, config = self.variant, self.variant.config
        geometry = {"q_start": k.shape[2] - q.shape[2], "q_len": q.shape[2]}
        scores = self.gate(q, k)
        blocks = (*scores.shape[2:], config.block_q, config.block_k)
        forced = forced_block_mask(*geometry.values(), *blocks).to(scores.device)[:, None]
        goal = group_target(target, self.gate.mask_heads)
        if variant.target_power != 1:
            goal = goal**variant.target_power
            goal = goal / goal.sum(-1, keepdim=True).clamp_min(1e-30)
        ignore = forced if config.exclude_forced else None
        loss = gate_loss(scores, goal, ignore=ignore, kind=variant.loss, row_weight=variant.row_weight)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.loss.lerp_(loss.detach(), 0.02 if number else 1.0)
        if number % 50 == 0:
            policy = TopK(density=0.1)
            sizes = {"block_q": config.block_q, "block_k": config.block_k}
            free = not config.exclude_forced
            chosen = policy.select(scores.detach(), **geometry, **sizes, forced_scored=free)
            self.recall.lerp_(target_recall(chosen.to_mask(), target).mean(), 0.1 if number else 1.0)


def main(
    model: Annotated[Path, typer.Option(help="Folder of the base model.")],
    train: Annotated[list[Path], typer.Option(help="Files of training documents.")],
    held_out: Annotated[Path, typer.Option(help="File of evaluation documents.")],
    output: Annotated[Path, typer.Option(help="Folder of adapters and results.")],
    variants: Annotated[str, typer.Option(help="Comma-separated names of variants or studies, or 'all'.")] = "all",
    steps: Annotated[int, typer.Option(help="Training steps.")] = 3000,
    context: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 8192,
    stretch: Annotated[int, typer.Option(help="Queries of a sequence that a step trains on.")] = 2048,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 4,
    retrieval_share: Annotated[float, typer.Option(help="Share of sequences that are retrieval documents.")] = 0.3,
    documents: Annotated[int, typer.Option(help="Evaluation documents of each retrieval task.")] = 50,
    books: Annotated[int, typer.Option(help="Evaluation books.")] = 24,
    densities: Annotated[str, typer.Option(help="Densities of the evaluation.")] = "0.1,0.2",
    eval_batch: Annotated[int, typer.Option(help="Sequences that are evaluated together.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of data and initial gates.")] = 0,
) -> None:
    """Train all variants side by side, then evaluate each."""
    names = [
        name for word in variants.split(",") for name in (VARIANTS if word == "all" else STUDIES.get(word, [word]))
    ]
    unknown = set(names) - set(VARIANTS)
    if unknown or context % stretch or stretch % 128:
        raise typer.BadParameter(
            f"variants must be among {', '.join([*STUDIES, *VARIANTS])} and stretch a multiple of 128 that divides the "
            f"context, got {', '.join(sorted(unknown)) or variants} and {stretch} of {context}"
        )
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval().requires_grad_(False)
    haystacks = [ids for ids in token_documents(train, tokenizer) if len(ids) > context]
    validation = [ids for ids in token_documents([held_out], tokenizer) if len(ids) > context][:books]
    print(f"{len(haystacks)} training documents, {len(validation)} validation documents", flush=True)

    trainings = train_gates(
        base,
        tokenizer,
        haystacks,
        {name: VARIANTS[name] for name in names},
        steps=steps,
        context=context,
        stretch=stretch,
        batch=batch,
        retrieval_share=retrieval_share,
        seed=seed,
    )
    output.mkdir(parents=True, exist_ok=True)
    suffix = f"-seed{seed}" if seed else ""
    folders = []
    for name, training in trainings.items():
        folders.append(output / (name + suffix))
        save_adapter(base, training.gate, folders[-1])
        described = asdict(training.variant) | {"config": training.variant.config.to_dict()}
        found = {"loss_at_end": float(training.loss), "recall_at_end": float(training.recall)}
        told = {"context": context, "stretch": stretch, "batch": batch, "seed": seed, "steps": training.steps}
        with (output / "variants.jsonl").open("a") as file:
            file.write(json.dumps({"name": name + suffix} | described | told | found) + "\n")

    results = ResultsFile(output / "ablation.jsonl", device)
    bos = tokenizer.bos_token_id
    windows = cut_windows(validation, context=context, count=1, bos_token_id=bos)
    needles = [Needle("passkey", context, depth, documents // 5, seed=1) for depth in (0.1, 0.3, 0.5, 0.7, 0.9)]
    needles.append(Needle("key_value", context, None, documents, seed=1))
    settings = {"data": digest(validation)}
    text = held_out.name.split(".")[0]
    shares = [float(x) for x in densities.split(",")]
    sequences = [window.input_ids for window in windows]
    perplexity = PerplexityJob("perplexity", text, context, sequences, settings, windows=windows, timed=False)
    asked = {needle: needle.documents(tokenizer, validation, bos) for needle in needles}
    retrieval = RetrievalJob("retrieval", text, context, [], settings, needles=asked)
    evaluated = EvalModel(base, tokenizer, name=model.name)
    for sizes in sorted({VARIANTS[name].config.block_q for name in names}):
        group = [f for f, name in zip(folders, names) if VARIANTS[name].config.block_q == sizes]
        blocks = {"block_q": sizes, "block_k": sizes}
        methods = [Oracle(**blocks), Streaming(**blocks), *(Gate(gates=folder) for folder in group)]
        choices = [DENSE, *(at_density(evaluated, method, share) for method in methods for share in shares)]
        for job in (perplexity, retrieval):
            job.measure(evaluated, choices, results, batch=eval_batch)
        print(f"evaluated {', '.join(f.name for f in group)}", flush=True)


def train_gates(
    base: PreTrainedModel,
    tokenizer,
    haystacks: list[list[int]],
    variants: dict[str, Variant],
    *,
    steps: int,
    context: int,
    stretch: int,
    batch: int,
    retrieval_share: float,
    seed: int,
) -> dict[str, Training]:
    """Trains every variant on the same steps."""
    from seerattn.hf.rotary import gate_rotation
    from seerattn.hf.state import layer_states

    rng = random.Random(seed)
    config, device, bos = base.config, base.device, tokenizer.bos_token_id
    layers = config.num_hidden_layers
    probed = attach(base, lambda layer: None)
    rotation = layer_states(probed)[0].rotation
    detach(probed)

    def sample() -> list[int]:
        ids = rng.choice(haystacks)
        if rng.random() < retrieval_share:
            return training_document(tokenizer, ids, context, rng, bos_token_id=bos).input_ids
        start = rng.randrange(len(ids) - context)
        return [bos, *ids[start : start + context - 1]]

    trainings = {}
    for name, variant in variants.items():
        torch.manual_seed(seed)
        gate = AttnGate(
            variant.config,
            num_heads=layers * config.num_attention_heads,
            num_kv_heads=layers * config.num_key_value_heads,
            head_dim=config.head_dim,
            **gate_rotation(rotation, gate_dim=variant.config.gate_dim or config.head_dim)._asdict(),
        )
        trainings[name] = Training(variant, gate.to(device), steps)
    recorder = Recorder(sorted({variant.config.block_q for variant in variants.values()}))
    AttentionInterface.register("gate_ablation_recorder", recorder)
    plain = config._attn_implementation
    base.set_attn_implementation("gate_ablation_recorder")
    start = time.perf_counter()
    for step in range(steps):
        ids = torch.tensor([sample() for _ in range(batch)], device=device)
        begin = rng.randrange(context // stretch) * stretch
        recorder.layers.clear()
        recorder.stretch = slice(begin, begin + stretch)
        with torch.no_grad():
            recorder.rotary = base.model.rotary_emb(base.lm_head.weight, torch.arange(context, device=device)[None])
            base.model(input_ids=ids, use_cache=False)
        q, k, *targets = (torch.cat(parts, dim=1) for parts in zip(*recorder.layers))
        by_block = dict(zip(recorder.blocks, targets))
        for training in trainings.values():
            training.step(step, q, k, by_block[training.variant.config.block_q])
        if step in (0, 9) or (step + 1) % 200 == 0:
            seconds = time.perf_counter() - start
            print(
                f"step {step + 1}, {seconds:.0f} s, {(step + 1) * batch * context / seconds:.0f} tokens/s", flush=True
            )
            print(
                "  ".join(f"{n} {float(t.loss):.4f} r{float(t.recall):.3f}" for n, t in trainings.items()), flush=True
            )
    base.set_attn_implementation(plain)
    return trainings


if __name__ == "__main__":
    typer.run(main)
