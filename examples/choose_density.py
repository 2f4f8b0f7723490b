"""Find the density that your text can do with: the perplexity of one document at several densities.

    python examples/choose_density.py                                           # the reference model and a book
    python examples/choose_density.py --model MODEL --gates gates --text held-out.txt --tokens 8192

`seerattn eval` measures many documents, with errors, and draws the result. This is the same in plain calls.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import seerattn
from seerattn import TopK
from seerattn.data.text import read_documents

BOOK = Path("assets/books/evaluate/harte-from-sand-hill-to-pine.txt.gz")


@torch.no_grad()
def main() -> None:
    """Loads, attaches, and reads the text once for each density."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/reference-model", help="folder or Hub id")
    parser.add_argument("--gates", default="assets/reference-gates/best", help="folder or Hub id")
    parser.add_argument("--text", type=Path, default=BOOK)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.3, 0.2, 0.1])
    args = parser.parse_args()

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
    # "auto" may take dense attention where that is faster; a measurement at a density must not.
    model = seerattn.attach(model, args.gates, impl="sparse")
    (text, *_) = read_documents([args.text])
    ids = tokenizer(text, truncation=True, max_length=args.tokens, return_tensors="pt").input_ids.to(device)

    # No policy is dense attention, the unpatched model.
    with seerattn.policy(model, None):
        dense = float(model(ids, labels=ids, use_cache=False).loss)
    print(f"dense: perplexity {math.exp(dense):.2f}")
    for density in args.densities:
        with seerattn.policy(model, TopK(density=density)), seerattn.record_density(model) as meter:
            loss = float(model(ids, labels=ids, use_cache=False).loss)
        print(
            f"asked {density:g}: computed {meter.mean():.4f}, perplexity {math.exp(loss):.2f}, "
            f"{100 * math.expm1(loss - dense):+.2f} %"
        )


if __name__ == "__main__":
    main()
