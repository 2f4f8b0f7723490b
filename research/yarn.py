"""Extend the context of a model fourfold by YaRN, densely and while it attends sparsely, and compare.

The runs, all on the same samples in the same order:

- ``stretched``: the model with YaRN and no training; ``dense``: trained with dense attention.
- ``after``: gates distilled for the model of ``dense``, measured at every sparsity.
- ``together-S``: weights and gates trained together at sparsity S, and measured there; ``annealed``: the same with a
  sparsity that rises from 0, measured at every one.
- ``together-S-whole`` and ``together-S-every4``: the highest sparsity with the gates' target taken of all query-block
  rows, and of some of them at every fourth step.

Gates start from those of the short context (``--gates``). Where these have budgets of heads, gates that learn together
with the weights keep them, and those that are distilled afterwards have theirs read off the text of ``--calibrate``.
Every run measures itself: perplexity of books and proofs, the same tokens read in windows of each length, and pass keys
at full length.

    python research/yarn.py --train books/train-000.jsonl.gz --train proofs/train-000.jsonl.gz \\
        --books-test books/test-000.jsonl.gz --proofs-test proofs/test-000.jsonl.gz --jobs 6 --output outputs/yarn
    seerattn report outputs/yarn/results.jsonl outputs/yarn/curves.jsonl --output outputs/yarn/report

With ``--window-lengths`` every sample of text is cut into windows of one of these lengths, so that short prompts are
learned as well. Runs of another ``--seed`` are told apart by the name of the model in results.

Runs are processes that share the GPU, or spread over several. A call that ended early (``--time-limit``, a failure) is
continued by the same call: what is finished is not done again. OUTPUT/tokens holds the tokenised text, which
``--prepare`` makes alone; a copy of it stands in for the text on another machine. ``--smoke`` shows that all of it
works, in a minute or two on a CPU.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from corpora import documents_of, load_corpus, whole_lines, write_corpora
from transformers import AutoTokenizer, PreTrainedModel
from worker_pool import Job, WorkerPool

from seerattn.bench.dense import sdpa_backend
from seerattn.data.windows import cut_windows, digest
from seerattn.eval.calibration import Text, calibrate_budgets
from seerattn.eval.choice import DENSE, at_density
from seerattn.eval.tasks.perplexity import PerplexityJob
from seerattn.eval.tasks.retrieval import Needle, RetrievalJob
from seerattn.hf.config import SeerConfig
from seerattn.hf.eval_model import EvalModel, choose_device
from seerattn.hf.loading import read_model
from seerattn.hf.yarn import extend_context
from seerattn.methods.gate import Gate
from seerattn.options import parse_value
from seerattn.report.curves import as_finetuning
from seerattn.results.file import ResultsFile
from seerattn.saving import write_whole
from seerattn.training.distill import DistillConfig, DistillRun
from seerattn.training.finetune import FinetuneConfig, FinetuneRun

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
TEXTS = ("books-test", "proofs-test")
CALIBRATION = "calibration"
BUDGET_WINDOWS = 8
Kind = Literal["stretched", "dense", "after", "together"]
# What may differ between a call and the one that continues it.
FREE = ("train", "books_test", "proofs_test", "calibrate", "micro_batch", "gradient_checkpointing", "model", "gates")


@dataclass(frozen=True, kw_only=True)
class Options:
    """All that decides the results, and the folders; lengths are in tokens."""

    model: Path
    gates: Path
    output: Path
    train: tuple[str, ...]
    books_test: tuple[str, ...]
    proofs_test: tuple[str, ...]
    calibrate: tuple[str, ...] = ()
    factor: float = 4.0
    context: int = 32768
    steps: int = 400
    batch: int = 4
    micro_batch: int = 1
    gradient_checkpointing: bool = False
    lr: float = 3e-4
    gate_lr: float = 1e-3
    target_share: float = 0.1
    retrieval_share: float = 0.1
    window_lengths: tuple[int, ...] = ()
    sparsities: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    train_tokens: int = 30_000_000
    contexts: tuple[int, ...] = (8192, 16384, 32768)
    documents: int = 24
    needles: int = 10
    logging_steps: int = 5
    save_steps: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if not all(0 < sparsity < 1 for sparsity in self.sparsities):
            raise ValueError(f"sparsities must be between 0 and 1, got {self.sparsities}")
        if any(max(self.contexts) % context for context in self.contexts):
            raise ValueError(f"contexts must divide the longest of them, got {self.contexts}")
        if self.save_steps % self.logging_steps:
            raise ValueError(f"save_steps must be a multiple of {self.logging_steps}, got {self.save_steps}")

    @property
    def name(self) -> str:
        """What results call the model: those of another seed are another one."""
        return self.model.name + (f", seed {self.seed}" if self.seed else "")

    def facts(self) -> dict:
        """What a call that continues this one must have in common with it, in plain JSON types."""
        kept = {name: value for name, value in asdict(self).items() if name not in (*FREE, "output")}
        return json.loads(json.dumps(kept))


SMOKE = {
    "context": 1024,
    "steps": 2,
    "batch": 1,
    "sparsities": (0.5, 0.9),
    "train_tokens": 20_000,
    "contexts": (512, 1024),
    "documents": 2,
    "needles": 1,
    "logging_steps": 1,
    "save_steps": 1,
}


@dataclass(frozen=True)
class Run:
    """One way of training.

    Attributes:
        name: of its files.
        label: of its line in tables.
        kind: what is trained.
        sparsity: of the training; None where it is dense.
        annealed: whether the sparsity rises over the run.
        target_share: share of the query-block rows that the gates have a target of; None without gates.
        target_every: steps from one target to the next.
        measured: sparsities that it is measured at, beside dense.
    """

    name: str
    label: str
    kind: Kind
    sparsity: float | None = None
    annealed: bool = False
    target_share: float | None = None
    target_every: int = 1
    measured: tuple[float, ...] = ()

    def cell(self, options: Options) -> dict:
        """What results say of the training, see `seerattn.report.tables.finetuned`."""
        told = ("sparsity", "annealed", "target_share", "target_every")
        steps = 0 if self.kind == "stretched" else options.steps
        return {"name": self.label, "steps": steps} | {name: getattr(self, name) for name in told}


def make_runs(options: Options) -> list[Run]:
    """All runs, in the order of tables."""
    share, every, most = options.target_share, options.sparsities, max(options.sparsities)
    together = Run("", "trained together", "together", target_share=share)
    runs = [
        Run("stretched", "not trained", "stretched"),
        Run("dense", "dense", "dense"),
        Run("after", "gates afterwards", "after", measured=every),
    ]
    runs += [replace(together, name=f"together-{s:g}", sparsity=s, measured=(s,)) for s in every]
    label = "trained together, annealed"
    runs.append(replace(together, name="annealed", label=label, sparsity=most, annealed=True, measured=every))
    extreme = replace(together, sparsity=most, measured=(most,))
    label = "trained together, whole target"
    runs.append(replace(extreme, name=f"together-{most:g}-whole", label=label, target_share=1.0))
    label = "trained together, target every 4 steps"
    runs.append(replace(extreme, name=f"together-{most:g}-every4", label=label, target_every=4))
    return runs


@dataclass(frozen=True)
class Places:
    """Where a run keeps what."""

    output: Path
    name: str

    @property
    def trained(self) -> Path:
        return self.output / "runs" / self.name

    @property
    def results(self) -> Path:
        return self.output / "results" / f"{self.name}.jsonl"

    @property
    def log(self) -> Path:
        return self.output / "logs" / f"{self.name}.txt"

    @property
    def finished(self) -> Path:
        return self.output / "finished" / self.name


def prepare(options: Options) -> None:
    """Writes the tokenised text to OUTPUT/tokens, unless it is there; see `write_corpora`."""
    write_corpora(
        options.output / "tokens",
        model=options.model,
        train=options.train,
        tests={
            name: files
            for name, files in zip((*TEXTS, CALIBRATION), (options.books_test, options.proofs_test, options.calibrate))
            if files
        },
        context=max(options.context, *options.contexts),
        train_tokens=options.train_tokens,
        documents=options.documents,
        seed=options.seed,
    )


def carry_out(options: Options, run: Run) -> None:
    """Trains and measures one run."""
    torch.set_float32_matmul_precision("high")
    places = Places(options.output, run.name)
    device = choose_device()
    if run.kind != "stretched":
        train(options, run, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    measure(options, run, device)
    places.finished.parent.mkdir(parents=True, exist_ok=True)
    places.finished.write_text("")


def train(options: Options, run: Run, device: torch.device) -> None:
    """Trains one run, or continues it; all runs see the same samples."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    corpus = replace(load_corpus(options.output / "tokens", "train"), sources=options.train)
    shared = {
        "context": options.context,
        "steps": options.steps,
        "batch_size": options.batch,
        "micro_batch_size": options.micro_batch,
        "retrieval_share": options.retrieval_share,
        "window_lengths": options.window_lengths,
        "logging_steps": options.logging_steps,
        "save_steps": options.save_steps,
        "seed": options.seed,
    }
    output = Places(options.output, run.name).trained
    if run.kind == "after":
        base = load_model(Places(options.output, "dense").trained / "model", device)
        config = DistillConfig(lr=options.gate_lr, density=round(1 - max(run.measured), 6), **shared)
        DistillRun.plan(base, tokenizer, corpus, config, gates=options.gates).run(output, resume=True)
        return
    config = FinetuneConfig(
        lr=options.lr,
        gate_lr=options.gate_lr,
        dense=run.kind == "dense",
        sparsity=run.sparsity or 0.0,
        anneal=1.0 if run.annealed else 0.0,
        context_factor=options.factor,
        target_share=run.target_share or 1.0,
        target_every=run.target_every,
        gradient_checkpointing=options.gradient_checkpointing,
        **shared,
    )
    model = load_model(options.model, device, torch.float32)
    gates = None if config.dense else options.gates
    planned = FinetuneRun.plan(model, tokenizer, corpus, config, gates=gates)
    # PyTorch would take FlashAttention-2, which is slower on Hopper. No batch has a mask here.
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    with sdpa_backend("cudnn" if hopper else "sdpa", device):
        planned.run(output, resume=True)


def load_model(folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model on the device, by default in bfloat16 on an accelerator."""
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    return read_model(str(folder), dtype=dtype, device=device)


def measure(options: Options, run: Run, device: torch.device) -> None:
    """Measures one run, dense and at its sparsities; cells that are there already are not measured again."""
    places = Places(options.output, run.name)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if run.kind == "stretched":
        model = load_model(options.model, device)
        extend_context(model, options.factor)
    else:
        trained = Places(options.output, "dense").trained if run.kind == "after" else places.trained
        model = load_model(trained / "model", device)
    length, bos = max(options.contexts), tokenizer.bos_token_id
    evaluated, choices = EvalModel(model, tokenizer, name=options.name), [DENSE]
    if run.measured:
        folder = places.trained if run.kind == "after" else places.trained / "gates"
        gate = Gate(gates=folder, name=run.name)
        if run.kind == "after" and SeerConfig.from_pretrained(str(options.gates)).budgets is not None:
            read_budgets(options, evaluated, gate)
        choices += [at_density(evaluated, gate, round(1 - sparsity, 6)) for sparsity in run.measured]
    results = ResultsFile(places.results, device)
    told = {"training": run.cell(options)}
    for text in TEXTS:
        documents = documents_of(load_corpus(options.output / "tokens", text))
        for context in options.contexts:
            # The same tokens at every length, in as many windows as they fill; those run together.
            count = length // context
            windows = cut_windows(documents, context=context, count=count, bos_token_id=bos)
            settings = told | {"data": digest(documents), "windows": count}
            sequences = [window.input_ids for window in windows]
            job = PerplexityJob("perplexity", text, context, sequences, settings, windows=windows, timed=False)
            job.measure(evaluated, choices, results, batch=count)
        if text == TEXTS[0]:
            needles = [Needle("passkey", length, depth, options.needles, seed=1) for depth in DEPTHS]
            settings = told | {"data": digest(documents)}
            made = {needle: needle.documents(tokenizer, documents, bos) for needle in needles}
            RetrievalJob("passkey", text, length, [], settings, needles=made).measure(evaluated, choices, results)


def read_budgets(options: Options, evaluated: EvalModel, gate: Gate) -> None:
    """Gives gates that were distilled afterwards budgets of heads, as those have that they started from."""
    if evaluated.gates(gate.gates).budgets is not None:
        return  # a run that is continued
    length = max(options.contexts)
    documents = documents_of(load_corpus(options.output / "tokens", CALIBRATION))
    windows = cut_windows(documents, context=length, count=1, bos_token_id=evaluated.tokenizer.bos_token_id)
    text = Text(windows[:BUDGET_WINDOWS], length, CALIBRATION, {"data": digest(documents)})
    found = ResultsFile(Places(options.output, gate.name).results.with_name("budgets.jsonl"), evaluated.device)
    calibrate_budgets(evaluated, gate, text, found)


def collect(options: Options, runs: list[Run]) -> None:
    """Puts results and records of all runs together, in the order of tables."""
    results, curves = [], []
    for run in runs:
        places = Places(options.output, run.name)
        results += whole_lines(places.results)
        for record in map(json.loads, whole_lines(places.trained / "training.jsonl")):
            curves.append(json.dumps({"arm": run.name} | as_finetuning(record)) + "\n")
    write_whole(options.output / "results.jsonl", "".join(results))
    write_whole(options.output / "curves.jsonl", "".join(curves))


def job_of(options: Options, run: Run) -> Job:
    """A run for a pool."""
    places = Places(options.output, run.name)
    dense = Places(options.output, "dense").trained / "model" / "config.json"
    needs = dense if run.kind == "after" else None
    return Job(run.name, partial(carry_out, options, run), places.log, needs)


def main(
    train: Annotated[list[str], typer.Option(help="Files of training documents; can be repeated.")] = [],  # noqa: B006
    books_test: Annotated[list[str], typer.Option(help="Files of books to measure on.")] = [],  # noqa: B006
    proofs_test: Annotated[list[str], typer.Option(help="Files of proofs to measure on.")] = [],  # noqa: B006
    calibrate: Annotated[list[str], typer.Option(help="Files to read budgets of heads off.")] = [],  # noqa: B006
    model: Annotated[Path, typer.Option(help="Folder of the base model.")] = Path("assets/reference-model"),
    gates: Annotated[Path, typer.Option(help="Gates of the base model to start from.")] = Path(
        "assets/reference-gates/best"
    ),
    output: Annotated[Path, typer.Option(help="Folder of everything.")] = Path("outputs/yarn"),
    runs: Annotated[str, typer.Option(help="Comma-separated names of runs, or all.")] = "all",
    steps: Annotated[int, typer.Option(help="Training steps of a run.")] = Options.steps,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = Options.batch,
    micro_batch: Annotated[int, typer.Option(help="Sequences that run at once.")] = Options.micro_batch,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, a third more work.")] = False,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the weights.")] = Options.lr,
    gate_lr: Annotated[float, typer.Option(help="Peak learning rate of the gates.")] = Options.gate_lr,
    target_share: Annotated[float, typer.Option(help="Share of the query-block rows with a target.")] = (
        Options.target_share
    ),
    retrieval_share: Annotated[float, typer.Option(help="Share of retrieval documents.")] = Options.retrieval_share,
    window_lengths: Annotated[str, typer.Option(help="Lengths that samples of text are cut into, with commas.")] = "",
    train_tokens: Annotated[int, typer.Option(help="Tokens of text to train on, seen repeatedly.")] = (
        Options.train_tokens
    ),
    documents: Annotated[int, typer.Option(help="Documents of each text to measure on.")] = Options.documents,
    needles: Annotated[int, typer.Option(help="Pass keys at each depth.")] = Options.needles,
    seed: Annotated[int, typer.Option(help="Seed of data and order.")] = Options.seed,
    jobs: Annotated[int, typer.Option(help="Runs at a time; 0 for one after the other in this process.")] = 4,
    time_limit: Annotated[float, typer.Option(help="Seconds after which all runs are ended; 0 for none.")] = 0.0,
    prepare_only: Annotated[bool, typer.Option("--prepare", help="Tokenise the text and stop.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny sizes, which override the others.")] = False,
) -> None:
    """Train and measure all runs, then put their results and curves together."""
    begin = time.monotonic()
    options = Options(
        model=model,
        gates=gates,
        output=output,
        train=tuple(train),
        books_test=tuple(books_test),
        proofs_test=tuple(proofs_test),
        calibrate=tuple(calibrate),
        steps=steps,
        batch=batch,
        micro_batch=micro_batch,
        gradient_checkpointing=gradient_checkpointing,
        lr=lr,
        gate_lr=gate_lr,
        target_share=target_share,
        retrieval_share=retrieval_share,
        window_lengths=parse_value("window_lengths", window_lengths, tuple[int, ...]),
        train_tokens=train_tokens,
        documents=documents,
        needles=needles,
        seed=seed,
    )
    options = replace(options, **SMOKE) if smoke else options
    everything = make_runs(options)
    chosen = choose(everything, runs)
    try:
        prepare(options)
        if prepare_only:
            return
        check_settings(options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    left = [run for run in chosen if not Places(output, run.name).finished.exists()]
    if jobs:
        pool = WorkerPool([job_of(options, run) for run in left], at_once=jobs, gpus=torch.cuda.device_count())
        pool.work(begin + time_limit if time_limit else float("inf"))
    else:
        for run in left:
            carry_out(options, run)
    collect(options, everything)
    missing = [run.name for run in chosen if not Places(output, run.name).finished.exists()]
    print(f"{time.monotonic() - begin:.0f} s; unfinished: {', '.join(missing) or 'none'}", flush=True)
    if missing:
        print("the same call continues", flush=True)
        raise typer.Exit(1)


def choose(runs: list[Run], names: str) -> list[Run]:
    """The runs of these names.

    Raises:
        typer.BadParameter: there is no such run.
    """
    wanted = [run.name for run in runs] if names == "all" else [name.strip() for name in names.split(",")]
    unknown = sorted(set(wanted) - {run.name for run in runs})
    if unknown:
        raise typer.BadParameter(f"runs must be among {', '.join(r.name for r in runs)}, got {', '.join(unknown)}")
    return [run for run in runs if run.name in wanted]


def check_settings(options: Options) -> None:
    """Notes the options in the output, or compares them with those of the call that began it.

    Raises:
        ValueError: they differ.
    """
    path, facts = options.output / "settings.json", options.facts()
    if not path.exists():
        options.output.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(facts, indent=2) + "\n")
        return
    before = json.loads(path.read_text())
    changed = [
        f"{name} was {before.get(name)} and is {facts[name]}" for name in facts if before.get(name) != facts[name]
    ]
    if changed:
        raise ValueError(f"output must hold runs of the same options, got {path} where {', '.join(changed)}")


if __name__ == "__main__":
    typer.run(main)
