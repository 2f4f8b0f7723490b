"""Train gates for a model from Python; `seerattn distill` does the same from the command line.

    python examples/train_gates.py --output outputs/my-gates                      # the reference model
    python examples/train_gates.py --model MODEL --data books/ --context 8192 --steps 1500 --output outputs/my-gates

The weights of the model stay as they are. Printed is how much of its attention map the gates found before and after.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from seerattn.training import DistillConfig, distill


def main() -> None:
    """Loads a model, trains its gates, prints two records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/reference-model", help="folder or Hub id")
    parser.add_argument("--data", nargs="+", default=["assets/books/distill"], help="files, folders or datasets")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the gates")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()

    # Of the base alone: gates are fp32 in any case.
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)
    # Records average over the steps since the last one; a checkpoint must end with one.
    every = min(10, args.steps)
    config = DistillConfig(
        context=args.context, steps=args.steps, retrieval_share=0.2, logging_steps=every, save_steps=10 * every
    )
    distill(model, tokenizer, args.data, config, output=args.output)

    records = [json.loads(line) for line in (args.output / "training.jsonl").read_text().splitlines()]
    for record in (records[0], records[-1]):
        print(
            f"step {record['step']}: loss {record['loss']:.4f}, recall at density .1 {record['recall@0.1']:.4f}, "
            f"best possible {record['oracle_recall@0.1']:.4f}"
        )


if __name__ == "__main__":
    main()
