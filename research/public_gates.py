"""Gates of a public model: several forms, trained side by side on the same samples, and measured.

    make models
    python research/public_gates.py --train books/train-000.jsonl.gz --train proofs/train-000.jsonl.gz \\
        --calibrate books/validation-000.jsonl.gz --calibrate proofs/validation-000.jsonl.gz \\
        --books-test books/test-000.jsonl.gz --proofs-test proofs/test-000.jsonl.gz --output outputs/smollm2
    seerattn report outputs/smollm2/results.jsonl --output outputs/smollm2/report

A form says what a gate looks like and, by its target, what teaches it: the largest probability of a tile, as published
(arXiv 2410.13276, section 4), or a power mean over query rows of the probability that each gives to the key block.
``--forms`` names those to train; ``ceilings`` measures dense attention, streaming and
the perfect choice by each target. Budgets that share a density among heads are read off the text to calibrate on, and
everything is measured with them and with equal heads. Gates see samples of one length, ``--context``; perplexity is
measured at each of ``--measure-contexts``.

Runs are processes that share the GPU: training of a small model waits for the host. A call that ended early
(``--time-limit``, a failure) is continued by the same call. OUTPUT/tokens holds the tokenised text, which ``--prepare``
makes alone; a copy of it stands in for the text on another machine. ``--smoke`` shows that all of it works.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from corpora import documents_of, load_corpus, whole_lines, write_corpora
from transformers import AutoTokenizer, PreTrainedModel
from worker_pool import Job, WorkerPool

from seerattn.bench.model import PLAIN_FORM
from seerattn.data.windows import Window, cut_windows, digest
from seerattn.eval.calibration import Text, calibrate_budgets
from seerattn.eval.choice import DENSE, at_density
from seerattn.eval.tasks.perplexity import PerplexityJob
from seerattn.eval.tasks.retrieval import Needle, RetrievalJob
from seerattn.gate import AttnGateConfig
from seerattn.hf.eval_model import EvalModel, choose_device
from seerattn.hf.loading import read_model
from seerattn.methods.gate import Gate
from seerattn.methods.gate.budgets import BudgetCalibrator, budget_lengths
from seerattn.methods.oracle import Oracle
from seerattn.methods.streaming import Streaming
from seerattn.options import parse_value
from seerattn.results.file import ResultsFile
from seerattn.saving import write_whole
from seerattn.selection import HeadBudgets
from seerattn.selection.map_form import PUBLISHED, MapForm
from seerattn.training.distill import DistillConfig, DistillRun

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
TEXTS = ("books-test", "proofs-test")
CALIBRATION = "calibration"
SALIENT = {"q_pooling": ("salient",), "k_pooling": ("salient", "max", "min")}
SUM4 = {"target_keys": "sum", "target_power": 4.0}
FORMS = {
    "published": AttnGateConfig.paper(),
    "published-no-rope": AttnGateConfig.paper(rope=False),
    "published-q-max": AttnGateConfig.paper(q_pooling=("max",)),
    "published-k-avg": AttnGateConfig.paper(k_pooling=("avg",)),
    "published-k-maxmin": AttnGateConfig.paper(k_pooling=("max", "min")),
    "default": AttnGateConfig(),
    "default-group": AttnGateConfig(share="kv_group"),
    "largest": PLAIN_FORM,
    "largest-salient": replace(PLAIN_FORM, **SALIENT),
    "mass": replace(PLAIN_FORM, target_keys="sum", target_power=1.0),
    "power-2": replace(PLAIN_FORM, target_keys="sum", target_power=2.0),
    "power-4": replace(PLAIN_FORM, **SUM4),
    "power-4-salient": AttnGateConfig(query_subblocks=8, key_subblocks=8),
    "power-4-fine": AttnGateConfig(query_subblocks=16, key_subblocks=16),
    "power-4-published": AttnGateConfig.paper(**SUM4),
}
CEILINGS = "ceilings"
# What no gate can pass, by each target.
ORACLES = {str(target): target for target in (PUBLISHED, *(MapForm("sum", power) for power in (1, 2, 4, math.inf)))}


@dataclass(frozen=True, kw_only=True)
class Options:
    """All that decides the results, and the folders; lengths are in tokens."""

    model: Path
    output: Path
    train: tuple[str, ...] = ()
    calibrate: tuple[str, ...] = ()
    tests: tuple[tuple[str, ...], ...] = ((), ())
    context: int = 8192
    measure_contexts: tuple[int, ...] = ()
    steps: int = 1500
    batch: int = 2
    micro_batch: int = 2
    lr: float | None = None
    target_share: float = 0.25
    retrieval_share: float = 0.2
    train_tokens: int = 24_000_000
    oracles: tuple[str, ...] = tuple(ORACLES)
    densities: tuple[float, ...] = (0.5, 0.2, 0.1, 0.05)
    documents: int = 24
    windows: int = 1
    needles: int = 5
    needle_densities: tuple[float, ...] = (0.2, 0.1)
    needle_contexts: tuple[int, ...] = (4096, 8192)
    seed: int = 0

    @property
    def measured(self) -> tuple[int, ...]:
        """Lengths of the windows that are measured; that of the samples where none were named."""
        return self.measure_contexts or (self.context,)


SMOKE = {
    "context": 512,
    "measure_contexts": (256, 512),
    "steps": 2,
    "batch": 2,
    "micro_batch": 1,
    "target_share": 0.5,
    "train_tokens": 20_000,
    "densities": (0.5,),
    "documents": 2,
    "needles": 1,
    "needle_densities": (0.5,),
    "needle_contexts": (512,),
}


def carry_out(options: Options, name: str) -> None:
    """Trains and measures one form, or measures what no gate can pass."""
    torch.set_float32_matmul_precision("high")
    device = choose_device()
    folder = options.output / "gates" / name
    if name != CEILINGS:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        corpus = replace(load_corpus(options.output / "tokens", "train"), sources=options.train)
        logging = min(10, options.steps)
        config = DistillConfig(
            context=options.context,
            steps=options.steps,
            lr=options.lr,
            target_share=options.target_share,
            batch_size=options.batch,
            micro_batch_size=options.micro_batch,
            retrieval_share=options.retrieval_share,
            logging_steps=logging,
            save_steps=max(1, 100 // logging) * logging,
            density=0.2,
            seed=options.seed,
        )
        model = load_model(options.model, device)
        DistillRun.plan(model, tokenizer, corpus, config, gate=FORMS[name]).run(folder, resume=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    measure(options, name, device)
    finished = options.output / "finished" / name
    finished.parent.mkdir(parents=True, exist_ok=True)
    finished.write_text("")


def load_model(folder: Path, device: torch.device) -> PreTrainedModel:
    """The model on the device, in bfloat16 on an accelerator."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return read_model(str(folder), dtype=dtype, device=device)


def measure(options: Options, name: str, device: torch.device) -> None:
    """Budgets, perplexity and retrieval of one run; cells that are there already are not measured again."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    evaluated = EvalModel(load_model(options.model, device), tokenizer, name=options.model.name)
    results = ResultsFile(options.output / "results" / f"{name}.jsonl", device)
    bos = tokenizer.bos_token_id
    fitted = documents_of(load_corpus(options.output / "tokens", CALIBRATION))
    settings = {"data": digest(fitted)}
    # One window of the greatest length has all shorter ones in it.
    longest = max(options.context, *options.measured)
    windows = cut_windows(fitted, context=longest, count=1, bos_token_id=bos)
    if name == CEILINGS:
        targets = [ORACLES[oracle] for oracle in options.oracles]
        budgets = {target: oracle_budgets(evaluated, target, windows, settings["data"]) for target in targets}
        oracles = [(target, shared) for target in targets for shared in (None, budgets[target])]
        methods = [Streaming(), *(Oracle(target=str(target), budgets_per_head=shared) for target, shared in oracles)]
    else:
        folder = options.output / "gates" / name
        # Budgets of a run that is continued are there, and cells measured with them.
        if evaluated.gates(folder).budgets is None:
            text = Text(windows, longest, CALIBRATION, settings)
            calibrate_budgets(evaluated, Gate(gates=folder), text, results)
        methods = [Gate(gates=folder, name=name, policy=policy) for policy in ("top_k", "equal_top_k")]
    choices = [DENSE]
    choices += [at_density(evaluated, method, density) for method in methods for density in options.densities]
    for text in TEXTS:
        if not (options.output / "tokens" / f"{text}.npz").exists():
            continue
        documents = documents_of(load_corpus(options.output / "tokens", text))
        settings = {"data": digest(documents), "windows": options.windows}
        for length in options.measured:
            windows = cut_windows(documents, context=length, count=options.windows, bos_token_id=bos)
            sequences = [window.input_ids for window in windows]
            job = PerplexityJob("perplexity", text, length, sequences, settings, windows=windows, timed=False)
            job.measure(evaluated, choices, results)
        if text == TEXTS[0] and options.needle_contexts:
            settings = {"data": digest(documents)}
            needles = [
                Needle("passkey", length, depth, options.needles, seed=1)
                for length in options.needle_contexts
                for depth in DEPTHS
            ]
            count = options.needles * len(DEPTHS)
            needles += [Needle("key_value", length, None, count, seed=1) for length in options.needle_contexts]
            some = [choice for choice in choices if choice.asked is None or choice.asked in options.needle_densities]
            made = {needle: needle.documents(tokenizer, documents, bos) for needle in needles}
            RetrievalJob("retrieval", text, options.context, [], settings, needles=made).measure(
                evaluated, some, results
            )


def oracle_budgets(evaluated: EvalModel, target: MapForm, windows: Sequence[Window], text: str) -> HeadBudgets:
    """What shares a density among the heads of an oracle, read off all windows."""
    calibrator = BudgetCalibrator(target, lengths=budget_lengths(len(windows[0].input_ids)))
    evaluated.observe(windows, calibrator.see)
    return calibrator.budgets(text=text)


def main(
    train: Annotated[list[str], typer.Option(help="Files of training documents; can be repeated.")] = [],  # noqa: B006
    books_test: Annotated[list[str], typer.Option(help="Files of books to measure on.")] = [],  # noqa: B006
    proofs_test: Annotated[list[str], typer.Option(help="Files of proofs to measure on.")] = [],  # noqa: B006
    calibrate: Annotated[list[str], typer.Option(help="Files to read budgets of heads off.")] = [],  # noqa: B006
    model: Annotated[Path, typer.Option(help="Folder of the model.")] = Path("outputs/models/smollm2"),
    output: Annotated[Path, typer.Option(help="Folder of everything.")] = Path("outputs/smollm2"),
    forms: Annotated[str, typer.Option(help=f"Comma-separated, of {CEILINGS}, {', '.join(FORMS)}; or all.")] = "all",
    context: Annotated[int, typer.Option(help="Tokens of a sample.")] = Options.context,
    measure_contexts: Annotated[
        str, typer.Option(help="Tokens of measured windows, several lengths; default: that of a sample.")
    ] = "",
    steps: Annotated[int, typer.Option(help="Training steps.")] = Options.steps,
    batch: Annotated[int, typer.Option(help="Samples a step.")] = Options.batch,
    micro_batch: Annotated[int, typer.Option(help="Samples that run at once.")] = Options.micro_batch,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; default: one that fits.")] = Options.lr,
    target_share: Annotated[float, typer.Option(help="Share of the query blocks to learn from, others every step.")] = (
        Options.target_share
    ),
    train_tokens: Annotated[int, typer.Option(help="Tokens of text to train on that are enough.")] = (
        Options.train_tokens
    ),
    oracles: Annotated[str, typer.Option(help=f"Comma-separated targets of {CEILINGS}.")] = ",".join(ORACLES),
    densities: Annotated[str, typer.Option(help="Densities of perplexity.")] = "0.5,0.2,0.1,0.05",
    needle_densities: Annotated[str, typer.Option(help="Those of retrieval, among them.")] = "0.2,0.1",
    needle_contexts: Annotated[str, typer.Option(help="Lengths of retrieval; may be empty.")] = "4096,8192",
    documents: Annotated[int, typer.Option(help="Documents of each text to measure on.")] = Options.documents,
    windows: Annotated[int, typer.Option(help="Windows of each document.")] = Options.windows,
    needles: Annotated[int, typer.Option(help="Documents of each retrieval task, length and depth.")] = (
        Options.needles
    ),
    seed: Annotated[int, typer.Option(help="Seed of gates, data and order.")] = Options.seed,
    jobs: Annotated[int, typer.Option(help="Runs at a time; 0 for one after the other in this process.")] = 6,
    time_limit: Annotated[float, typer.Option(help="Seconds after which all runs are ended; 0 for none.")] = 0.0,
    prepare_only: Annotated[bool, typer.Option("--prepare", help="Tokenise the text and stop.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny sizes, which override the others.")] = False,
) -> None:
    """Train and measure the forms, then put their results together in OUTPUT/results.jsonl."""
    begin = time.monotonic()
    names = [CEILINGS, *FORMS] if forms == "all" else [name.strip() for name in forms.split(",")]
    targets = [name.strip() for name in oracles.split(",")]
    for option, given, known in (("forms", names, [CEILINGS, *FORMS]), ("oracles", targets, list(ORACLES))):
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise typer.BadParameter(f"{option} must be among {', '.join(known)}, got {', '.join(unknown)}")
    options = Options(
        model=model,
        output=output,
        train=tuple(train),
        calibrate=tuple(calibrate),
        tests=(tuple(books_test), tuple(proofs_test)),
        context=context,
        measure_contexts=parse_value("measure_contexts", measure_contexts, tuple[int, ...]),
        steps=steps,
        batch=batch,
        micro_batch=micro_batch,
        lr=lr,
        target_share=target_share,
        train_tokens=train_tokens,
        oracles=tuple(targets),
        densities=parse_value("densities", densities, tuple[float, ...]),
        needle_densities=parse_value("needle_densities", needle_densities, tuple[float, ...]),
        needle_contexts=parse_value("needle_contexts", needle_contexts, tuple[int, ...]),
        documents=documents,
        windows=windows,
        needles=needles,
        seed=seed,
    )
    options = replace(options, **SMOKE) if smoke else options
    try:
        write_corpora(
            output / "tokens",
            model=model,
            train=options.train,
            tests={
                name: files for name, files in zip((*TEXTS, CALIBRATION), (*options.tests, options.calibrate)) if files
            },
            context=max(options.context, *options.measured, *options.needle_contexts),
            train_tokens=options.train_tokens,
            documents=options.documents,
            seed=options.seed,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if prepare_only:
        return
    left = [name for name in names if not (output / "finished" / name).exists()]
    if jobs:
        logs = output / "logs"
        work = [Job(name, partial(carry_out, options, name), logs / f"{name}.txt") for name in left]
        pool = WorkerPool(work, at_once=jobs, gpus=torch.cuda.device_count())
        pool.work(begin + time_limit if time_limit else float("inf"))
    else:
        for name in left:
            carry_out(options, name)
    found = [line for name in [CEILINGS, *FORMS] for line in whole_lines(output / "results" / f"{name}.jsonl")]
    write_whole(output / "results.jsonl", "".join(found))
    missing = [name for name in names if not (output / "finished" / name).exists()]
    print(f"{time.monotonic() - begin:.0f} s; unfinished: {', '.join(missing) or 'none'}", flush=True)
    if missing:
        print("the same call continues", flush=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
