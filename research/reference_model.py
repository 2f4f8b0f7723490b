"""Train the small long-context language model that ships in `assets/reference-model`, from raw text to final folder.

    python research/reference_model.py --data DATA --smoke    # 12 steps of each phase, a validation, a saved model
    python research/reference_model.py --data DATA            # the shipped model: 470 s of training on one H100

DATA holds `books/` and `proofs/` with shards `train*.jsonl*` and `validation*.jsonl*` (plain, .gz, .bz2 or .xz; one
JSON object with a `text` a line). The script trains a byte-level BPE tokenizer (single digits), tokenises all training
documents, and trains a Llama with grouped-query attention in two phases: short windows first, then windows of the full
context. Every step sees the same number of tokens. Windows are consecutive tokens of one document, cut elsewhere in
each epoch; a small share are synthetic retrieval documents (`seerattn.data.retrieval`), without which a model this
small hardly learns to look back. Hidden matrices are trained by Muon, embeddings and norms by AdamW, at a rate that
warms up, stays, and falls linearly to zero over the last 40 %.

The run ends by itself after `--seconds` of training (compilation and validations not counted) or after exactly
`--steps` steps, which also makes the order of the data and the schedule repeatable. About every minute it validates
and saves, so that a killed run leaves a model that loads. `training.jsonl` in the output folder has a line for the
setup, one for every 100 steps, one for each validation, and last a summary with the figures that a model card needs;
the summary is also the last line printed.
"""

import copy
import json
import math
import os
import platform
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
import typer
from reference_data import batches_ahead, read_texts, tokenise, train_tokenizer, training_rows
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from seerattn.bench.timing import synchronize
from seerattn.data.retrieval import RetrievalDocument, key_value_document, passkey_document

SIZE_LIMIT = 24_000_000  # bytes of all shipped files
Attention = Literal["auto", "flash", "cudnn"]
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides the model. The defaults are the shipped one; lengths are in tokens."""

    data: Path
    output: Path
    seconds: float = 470.0  # of training alone
    steps: int | None = None  # instead of seconds
    seed: int = 0
    short_share: float = 0.5  # of the budget, at short_context
    short_context: int = 2048
    context: int = 8192
    tokens_per_step: int = 131_072
    retrieval_share: float = 0.08
    vocab_size: int = 7168
    hidden_size: int = 384
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    intermediate_size: int = 896
    muon_lr: float = 4e-3
    adamw_lr: float = 3e-3
    warmup_steps: int = 100
    decay_share: float = 0.4
    attention: Attention = "auto"
    validate_every: float = 60.0  # seconds
    log_every: int = 100  # steps
    documents: int | None = None  # of each group; all by default


@dataclass
class Phase:
    """A stretch of training at one context length, up to the share `end` of the budget."""

    context: int
    end: float
    batches: Generator[torch.Tensor, None, None]
    backend: SDPBackend | None = None


class Log:
    """JSON lines, appended to a file as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("")

    def __call__(self, event: str, **fields: Any) -> None:
        line = json.dumps({"event": event} | fields)
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised Llama in float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.context,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def hidden_states(model: LlamaForCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states `[B, T, hidden]`, with a bfloat16 residual stream as in the shipped model.

    The layers are called one by one because the model's own forward builds a causal mask while it is compiled, which
    keeps attention off the fast kernels.
    """
    body = model.model
    hidden = body.embed_tokens(input_ids).to(torch.bfloat16)
    position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    position_embeddings = body.rotary_emb(hidden, position_ids=position_ids)
    for layer in body.layers:
        hidden = layer(hidden, attention_mask=None, position_ids=position_ids, position_embeddings=position_embeddings)
    return body.norm(hidden)


def next_token_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of rows `[B, context + 1]`: every token after the first is predicted."""
    logits = model.lm_head(hidden_states(model, rows[:, :-1]))
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten().long())


def build_optimisers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the (tied) embedding and the norms."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    on_cuda = others[0].is_cuda
    muon = torch.optim.Muon(
        matrices, lr=recipe.muon_lr, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=on_cuda)
    for optimiser in (muon, adamw):
        for group in optimiser.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adamw]


def fastest_attention(recipe: Recipe, context: int, device: torch.device, log: Log) -> SDPBackend:
    """The SDPA backend with the shortest forward and backward pass at this context."""
    head_dim = recipe.hidden_size // recipe.heads
    batch = recipe.tokens_per_step // context
    q, k, v = (
        torch.randn(batch, context, heads, head_dim, device=device, dtype=torch.bfloat16).transpose(1, 2)
        for heads in (recipe.heads, recipe.kv_heads, recipe.kv_heads)
    )
    grad = torch.randn_like(q)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    milliseconds = {}
    for name, backend in BACKENDS.items():
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        try:
            with sdpa_kernel(backend):
                for repeat in range(13):
                    if repeat == 3:
                        start.record()
                    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                    torch.autograd.grad(out, (q, k, v), grad)
                end.record()
        except RuntimeError as error:
            log("attention_unavailable", context=context, backend=name, reason=str(error))
            continue
        end.synchronize()
        milliseconds[name] = round(start.elapsed_time(end) / 10, 3)
    log("attention", context=context, forward_backward_ms=milliseconds)
    return BACKENDS[min(milliseconds, key=milliseconds.__getitem__)]


@dataclass(frozen=True)
class Validation:
    """Windows of validation books `[N, context + 1]`, and retrieval documents of one length hidden in them."""

    windows: torch.Tensor
    documents: list[RetrievalDocument]

    @classmethod
    def build(cls, books: list[np.ndarray], tokenizer: PreTrainedTokenizerFast, context: int) -> "Validation":
        """The first two windows of each of eight long books; 16 pass keys at even depths and 16 key-value documents."""
        books = [book[:-1] for book in books if len(book) > 2 * context][:8]
        if not books:
            raise ValueError(
                f"data must hold a validation book of more than {2 * context} tokens; use a shorter context"
            )
        bos, rng = tokenizer.bos_token_id, random.Random("validation")
        rows = [np.concatenate([[bos], book[i * context :][:context]]) for book in books for i in range(2)]
        documents = []
        for number in range(16):
            book = books[number % len(books)]
            depth = (number + 0.5) / 16
            documents.append(passkey_document(tokenizer, book, context, depth, rng, bos_token_id=bos))
            documents.append(key_value_document(tokenizer, book, context, rng, bos_token_id=bos))
        return cls(torch.from_numpy(np.stack(rows).astype(np.int32)), documents)

    @torch.no_grad()
    def __call__(self, model: LlamaForCausalLM, device: torch.device) -> dict[str, float]:
        """Perplexity, and the share of documents whose answer tokens are all the most likely ones (teacher-forced)."""
        losses = [next_token_loss(model, rows.to(device)).double() for rows in self.windows.split(4)]
        weights = [len(rows) for rows in self.windows.split(4)]
        right: dict[str, list[bool]] = {"passkey": [], "key_value": []}
        for start in range(0, len(self.documents), 8):
            documents = self.documents[start : start + 8]
            input_ids = torch.tensor([document.input_ids for document in documents], device=device)
            hidden = hidden_states(model, input_ids)
            for row, document in enumerate(documents):
                begin, end = document.answers[-1]
                best = model.lm_head(hidden[row, begin - 1 : end - 1]).argmax(-1)
                right[document.kind].append(torch.equal(best, input_ids[row, begin:end]))
        mean = sum(float(loss) * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
        return {"perplexity": math.exp(mean)} | {kind: sum(hits) / len(hits) for kind, hits in right.items()}


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the shipped files (bfloat16), each moved into place complete, so that a kill leaves the last good model."""
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in Path(folder).iterdir():
            file.chmod(0o644)
            os.replace(file, output / file.name)


def warm_up(model: LlamaForCausalLM, phases: list[Phase], loss_of: Any, device: torch.device, log: Log) -> int:
    """Compile forward and backward of every phase, without a step; returns the number of micro-batches that fit."""
    micro_batches = 1
    for phase in phases:
        batch = next(phase.batches)
        while True:
            began = time.perf_counter()
            try:
                with attention_of(phase), torch.autocast(device.type, torch.bfloat16):
                    loss = loss_of(model, batch[: len(batch) // micro_batches])
                loss.backward()
                synchronize(device)
                break
            except torch.OutOfMemoryError:
                micro_batches *= 2
        model.zero_grad(set_to_none=True)
        seconds = round(time.perf_counter() - began, 1)
        log("warm_up", context=phase.context, micro_batches=micro_batches, seconds=seconds, loss=loss.item())
    return micro_batches


def attention_of(phase: Phase) -> Any:
    """Context in which SDPA uses the phase's backend."""
    return nullcontext() if phase.backend is None else sdpa_kernel(phase.backend)


def train(recipe: Recipe) -> LlamaForCausalLM:
    """Run the whole recipe; returns the trained float32 model, whose bfloat16 copy is in `recipe.output`.

    Raises:
        ValueError: If shards are missing or documents too short; nothing has been written then.
    """
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")

    texts = [text for group in read_texts(recipe.data, "train", recipe.documents).values() for text in group]
    read = time.perf_counter()
    tokenizer = train_tokenizer(texts, vocab_size=recipe.vocab_size, context=recipe.context)
    learned = time.perf_counter()
    documents = tokenise(tokenizer, texts)
    books = tokenise(tokenizer, read_texts(recipe.data, "validation", limit=12)["books"])
    validation = Validation.build(books, tokenizer, recipe.context)
    prepared = time.perf_counter()
    phases = []
    for context, end in ((recipe.short_context, recipe.short_share), (recipe.context, 1.0)):
        rows = training_rows(documents, tokenizer, context, recipe.retrieval_share, f"{recipe.seed}-{context}")
        phases.append(Phase(context, end, batches_ahead(rows, recipe.tokens_per_step // context, device)))
    model = build_model(recipe, tokenizer).to(device)
    optimisers = build_optimisers(model, recipe)

    recipe.output.mkdir(parents=True, exist_ok=True)
    log = Log(recipe.output / "training.jsonl")
    setup = asdict(recipe) | {"data": recipe.data.name, "output": recipe.output.name}
    corpus = {
        "documents": len(documents),
        "text_bytes": sum(len(text.encode()) for text in texts),
        "tokens": sum(map(len, documents)),
        "parameters": model.num_parameters(),
    }
    del texts
    times = {"read": read - began, "tokenizer": learned - read, "tokenise": prepared - learned}
    log("setup", recipe=setup, **corpus, seconds={name: round(value, 1) for name, value in times.items()})

    loss_of = next_token_loss
    if device.type == "cuda":
        loss_of = torch.compile(next_token_loss, dynamic=False)
        for phase in phases:
            if recipe.attention == "auto":
                phase.backend = fastest_attention(recipe, phase.context, device, log)
            else:
                phase.backend = BACKENDS[recipe.attention]
    micro_batches = warm_up(model, phases, loss_of, device, log)

    step, elapsed, validated = 0, 0.0, 0.0
    tokens = {phase.context: 0 for phase in phases}
    seconds = {phase.context: 0.0 for phase in phases}
    loss_sum, loss_steps = torch.zeros((), device=device), 0
    scores: dict[str, float] = {}

    def share_done(now: float) -> float:
        return now / recipe.seconds if recipe.steps is None else step / recipe.steps

    for phase in phases:
        with attention_of(phase):
            before = elapsed
            synchronize(device)
            resumed = marked = time.perf_counter()
            marked_step = step
            while (share := share_done(before + time.perf_counter() - resumed)) < phase.end:
                scale = min(1, (step + 1) / recipe.warmup_steps, (1 - share) / recipe.decay_share)
                batch = next(phase.batches)
                for part in batch.chunk(micro_batches):
                    with torch.autocast(device.type, torch.bfloat16):
                        loss = loss_of(model, part) / micro_batches
                    loss.backward()
                    loss_sum += loss.detach()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimiser in optimisers:
                    for group in optimiser.param_groups:
                        group["lr"] = group["peak_lr"] * scale
                    optimiser.step()
                    optimiser.zero_grad(set_to_none=True)
                step += 1
                loss_steps += 1
                tokens[phase.context] += recipe.tokens_per_step
                if step % recipe.log_every == 0:
                    mean = float(loss_sum) / loss_steps  # waits for the device
                    loss_sum.zero_()
                    loss_steps = 0
                    now = time.perf_counter()
                    rate = (step - marked_step) * recipe.tokens_per_step / (now - marked)
                    marked, marked_step = now, step
                    elapsed = before + now - resumed
                    log(
                        "train",
                        step=step,
                        context=phase.context,
                        tokens=sum(tokens.values()),
                        seconds=round(elapsed, 1),
                        loss=round(mean, 4),
                        lr_scale=round(scale, 4),
                        tokens_per_second=round(rate),
                    )
                if before + time.perf_counter() - resumed - validated >= recipe.validate_every:
                    synchronize(device)
                    elapsed = validated = before + time.perf_counter() - resumed
                    scores = validate_and_save(model, tokenizer, validation, recipe, device, log, step, elapsed)
                    before, resumed = elapsed, time.perf_counter()
                    marked, marked_step = resumed, step
            synchronize(device)
            elapsed = before + time.perf_counter() - resumed
            phase.batches.close()
            seconds[phase.context] = elapsed - sum(seconds.values())

    with attention_of(phases[-1]):
        scores = validate_and_save(model, tokenizer, validation, recipe, device, log, step, elapsed)
    log(
        "summary",
        steps=step,
        tokens=sum(tokens.values()),
        epochs=round(sum(tokens.values()) * (1 - recipe.retrieval_share) / corpus["tokens"], 2),
        seconds=round(elapsed, 1),
        tokens_by_context=tokens,
        tokens_per_second={c: round(tokens[c] / seconds[c]) for c in tokens if seconds[c]},
        **scores,
        attention={phase.context: phase.backend.name if phase.backend else "default" for phase in phases},
        peak_memory_gb=round(torch.cuda.max_memory_allocated() / 1e9, 1) if device.type == "cuda" else None,
        device=torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU",
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        seed=recipe.seed,
        command=shlex.join(["python", *sys.argv]),
    )
    size = sum(file.stat().st_size for file in recipe.output.iterdir())
    assert size <= SIZE_LIMIT, f"{recipe.output} holds {size} bytes, more than {SIZE_LIMIT}"
    return model


def validate_and_save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    validation: Validation,
    recipe: Recipe,
    device: torch.device,
    log: Log,
    step: int,
    elapsed: float,
) -> dict[str, float]:
    """Validate, log the scores, and save a checkpoint in the final form."""
    began = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16):
        scores = validation(model, device)
    scores = {name: round(value, 4) for name, value in scores.items()}
    checked = time.perf_counter()
    save(model, tokenizer, recipe.output)
    took = {"validation": round(checked - began, 2), "save": round(time.perf_counter() - checked, 2)}
    log("validation", step=step, seconds=round(elapsed, 1), **scores, took=took)
    return scores


def main(
    data: Annotated[Path, typer.Option(help="Folder with books/ and proofs/.")],
    output: Annotated[Path, typer.Option(help="Folder of the model.")] = Path("assets/reference-model"),
    seconds: Annotated[float, typer.Option(help="Seconds of training.")] = Recipe.seconds,
    steps: Annotated[int | None, typer.Option(help="Exact number of steps, instead of --seconds.")] = None,
    short_share: Annotated[float, typer.Option(help="Share of the budget spent at 2048 tokens.")] = Recipe.short_share,
    retrieval_share: Annotated[float, typer.Option(help="Share of retrieval documents.")] = Recipe.retrieval_share,
    muon_lr: Annotated[float, typer.Option(help="Peak rate of the hidden matrices.")] = Recipe.muon_lr,
    adamw_lr: Annotated[float, typer.Option(help="Peak rate of embeddings and norms.")] = Recipe.adamw_lr,
    attention: Annotated[str, typer.Option(help="SDPA backend: auto (time both), flash or cudnn.")] = Recipe.attention,
    seed: int = Recipe.seed,
    smoke: Annotated[bool, typer.Option(help="12 steps of each phase on a few documents, to see it work.")] = False,
) -> None:
    """Train the reference model."""
    transformers.utils.logging.disable_progress_bar()
    if attention not in get_args(Attention):
        raise typer.BadParameter(f"--attention must be one of {get_args(Attention)}, got {attention}")
    options: dict[str, Any] = {"seconds": seconds, "steps": steps, "short_share": short_share}
    if smoke:
        options = {"steps": 24, "short_share": 0.5, "log_every": 4, "documents": 48}
    try:
        train(
            Recipe(
                data=data,
                output=output,
                retrieval_share=retrieval_share,
                muon_lr=muon_lr,
                adamw_lr=adamw_lr,
                attention=attention,
                seed=seed,
                **options,
            )
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
