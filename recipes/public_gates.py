"""Gates of a public model: several forms, trained side by side on the same samples, and measured.

    make models
    python recipes/public_gates.py --train books/train-000.jsonl.gz --train proofs/train-000.jsonl.gz \\
        --books-test books/test-000.jsonl.gz --proofs-test proofs/test-000.jsonl.gz --output outputs/smollm2
    seerattn report outputs/smollm2/results.jsonl --output outputs/smollm2/report

A form says what a gate looks like and, by its target, what teaches it: the largest probability of a tile, as published
(arXiv 2410.13276, section 4), or a power mean over query rows of the probability that each gives to the key block.
``--forms`` names those to train; ``ceilings`` measures dense attention, streaming and
the perfect choice by each target.

Runs are processes that share the GPU: training of a small model waits for the host. A call that ended early
(``--time-limit``, a failure) is continued by the same call. OUTPUT/tokens holds the tokenised text, which ``--prepare``
makes alone; a copy of it stands in for the text on another machine. ``--smoke`` shows that all of it works.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from corpora import documents_of, load_corpus, whole_lines, write_corpora
from crew import Crew, Job
from transformers import AutoTokenizer, PreTrainedModel

from seerattn.eval.arms import Gates, Subject, choose_device, make_arms
from seerattn.eval.data import cut_windows, digest
from seerattn.eval.needle import Needle, evaluate_needle
from seerattn.eval.perplexity import evaluate_perplexity
from seerattn.eval.results import ResultsFile
from seerattn.gate import AttnGateConfig
from seerattn.hf.loading import read_model
from seerattn.saving import write_whole
from seerattn.training.distill import DistillConfig, plan, run

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
TEXTS = ("books-test", "proofs-test")
SUM2 = {"target_keys": "sum", "target_power": 2.0}
FORMS = {
    "published": AttnGateConfig.paper(),
    "largest": AttnGateConfig(),
    "mass": AttnGateConfig(target_keys="sum", target_power=1.0),
    "power-2": AttnGateConfig(**SUM2),
    "power-4": AttnGateConfig(target_keys="sum", target_power=4.0),
    "power-2-salient": AttnGateConfig(**SUM2, q_pooling=("salient",), k_pooling=("salient", "max", "min")),
    "power-2-fine": AttnGateConfig(**SUM2, query_subblocks=16, key_subblocks=16),
    "power-2-coarse": AttnGateConfig(**SUM2, query_subblocks=4, key_subblocks=4),
    "power-2-group": AttnGateConfig(**SUM2, share="kv_group"),
    "power-2-published": AttnGateConfig.paper(**SUM2),
}
CEILINGS = "ceilings"
# What no gate can pass, by each target, and what every gate should.
CEILING_SELECTORS = ["dense", "oracle", "oracle:sum:1", "oracle:sum:2", "oracle:sum:4", "oracle:sum:inf", "streaming"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """All that decides the results, and the folders; lengths are in tokens."""

    model: Path
    output: Path
    train: tuple[str, ...] = ()
    tests: tuple[tuple[str, ...], ...] = ((), ())
    context: int = 8192
    steps: int = 300
    batch: int = 8
    micro_batch: int = 4
    lr: float = 2e-3
    recall_share: float = 0.2
    train_tokens: int = 24_000_000
    densities: tuple[float, ...] = (0.5, 0.2, 0.1, 0.05)
    documents: int = 24
    windows: int = 1
    needles: int = 5
    needle_densities: tuple[float, ...] = (0.2, 0.1)
    needle_contexts: tuple[int, ...] = (4096, 8192)
    seed: int = 0


SMOKE = {
    "context": 512,
    "steps": 2,
    "batch": 2,
    "micro_batch": 1,
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
            batch_size=options.batch,
            micro_batch_size=options.micro_batch,
            recall_share=options.recall_share,
            logging_steps=logging,
            save_steps=max(1, 100 // logging) * logging,
            density=0.2,
            seed=options.seed,
        )
        run(plan(load_model(options.model, device), tokenizer, corpus, config, gate=FORMS[name]), folder, resume=True)
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
    """Perplexity and retrieval of one run; cells that are there already are not measured again."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    folders = [] if name == CEILINGS else [Gates(name, options.output / "gates" / name)]
    subject = Subject(load_model(options.model, device), tokenizer, name=options.model.name, gates=folders)
    selectors = CEILING_SELECTORS if name == CEILINGS else ["gate"]
    arms = make_arms(selectors, options.densities, gates=folders)
    results = ResultsFile(options.output / "results" / f"{name}.jsonl", device)
    bos = tokenizer.bos_token_id
    for text in TEXTS:
        documents = documents_of(load_corpus(options.output / "tokens", text))
        settings = {"data": digest(documents), "windows": options.windows}
        windows = cut_windows(documents, context=options.context, count=options.windows, bos_token_id=bos)
        evaluate_perplexity(subject, arms, {options.context: windows}, results, text=text, settings=settings, batch=1)
        if text == TEXTS[0]:
            settings = {"data": digest(documents)}
            needles = [
                Needle("passkey", length, depth, options.needles, seed=1)
                for length in options.needle_contexts
                for depth in DEPTHS
            ]
            count = options.needles * len(DEPTHS)
            needles += [Needle("key_value", length, None, count, seed=1) for length in options.needle_contexts]
            arms_asked = make_arms(selectors, options.needle_densities, gates=folders)
            evaluate_needle(subject, arms_asked, needles, documents, results, text=text, settings=settings)


def main(
    train: Annotated[list[str], typer.Option(help="Files of training documents; can be repeated.")] = [],  # noqa: B006
    books_test: Annotated[list[str], typer.Option(help="Files of books to measure on.")] = [],  # noqa: B006
    proofs_test: Annotated[list[str], typer.Option(help="Files of proofs to measure on.")] = [],  # noqa: B006
    model: Annotated[Path, typer.Option(help="Folder of the model.")] = Path("outputs/models/smollm2"),
    output: Annotated[Path, typer.Option(help="Folder of everything.")] = Path("outputs/smollm2"),
    forms: Annotated[str, typer.Option(help=f"Comma-separated, of {CEILINGS}, {', '.join(FORMS)}; or all.")] = "all",
    context: Annotated[int, typer.Option(help="Tokens of a sample and of a measured window.")] = Options.context,
    steps: Annotated[int, typer.Option(help="Training steps.")] = Options.steps,
    batch: Annotated[int, typer.Option(help="Samples a step.")] = Options.batch,
    micro_batch: Annotated[int, typer.Option(help="Samples that run at once.")] = Options.micro_batch,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = Options.lr,
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
    unknown = sorted(set(names) - {CEILINGS, *FORMS})
    if unknown:
        raise typer.BadParameter(f"forms must be among {CEILINGS}, {', '.join(FORMS)}, got {', '.join(unknown)}")
    options = Options(
        model=model,
        output=output,
        train=tuple(train),
        tests=(tuple(books_test), tuple(proofs_test)),
        context=context,
        steps=steps,
        batch=batch,
        micro_batch=micro_batch,
        lr=lr,
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
            tests=dict(zip(TEXTS, options.tests)),
            context=max(options.context, *options.needle_contexts),
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
        crew = Crew(work, at_once=jobs, gpus=torch.cuda.device_count())
        crew.work(begin + time_limit if time_limit else float("inf"))
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
