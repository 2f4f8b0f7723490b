"""A model of Llama-3.1-8B's shape with random weights, some of its layers, to time every method on by `seerattn eval`.

    python research/shape_model.py --layers 4 --output outputs/llama-shape
    seerattn eval --config research/experiments/llama-time.yaml --output outputs/llama-time.jsonl

    python research/shape_model.py --size llama-3.1-70b --layers 80 --no-weights --output outputs/llama-70b-shape

OUTPUT has the model, gates of the default and of the published form with random weights, and a text of two windows of
128k tokens. Top-k computes the blocks that it is told to, whatever the scores; perplexities mean nothing. Without
weights it is enough for `--dry-run` of training.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoTokenizer

from seerattn.bench.model import SIZES, gate_form, random_model
from seerattn.data.text import read_documents
from seerattn.hf.attach import attach, detach
from seerattn.hf.eval_model import choose_device
from seerattn.saving import write_whole

ASSETS = Path(__file__).parents[1] / "assets"
FORMS = {"default": "default", "published": "paper"}


def main(
    output: Annotated[Path, typer.Option(help="New folder.")],
    layers: Annotated[int, typer.Option(help="Decoder layers.", min=1)] = 4,
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "llama-3.1-8b",
    seed: Annotated[int, typer.Option(help="Of the gates; the model has its own.")] = 0,
    weights: Annotated[bool, typer.Option(help="Without them there is no gate either.")] = True,
) -> None:
    """Write a model with random weights, gates for it, and a text."""
    output.mkdir(parents=True)
    device = choose_device() if weights else torch.device("meta")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "reference-model")
    sizes = SIZES[size]
    model = random_model(replace(sizes, layers=layers, vocab=max(sizes.vocab, len(tokenizer))), device)
    if weights:
        model.save_pretrained(output / "model")
    else:
        model.config.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    for name, form in FORMS.items() if weights else ():
        torch.manual_seed(seed)
        gated = attach(model, gate_form(form))
        gated.save_pretrained(output / name)
        detach(gated)
    text = "\n".join(read_documents([str(path) for path in sorted((ASSETS / "books").glob("*/*.gz"))]))
    write_whole(output / "text.jsonl", json.dumps({"text": text}) + "\n")
    print(f"{output}: {layers} layers, a text of {len(text):,} characters")


if __name__ == "__main__":
    typer.run(main)
