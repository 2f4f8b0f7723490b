"""Gates beside a LoRA adapter of PEFT: the adapter learns while attention is sparse, and both are saved apart.

    python examples/beside_lora.py --output outputs/beside-lora
    python examples/beside_lora.py --model MODEL --gates gates --tokens 8192 --output outputs/beside-lora

The base weights and the gates stay as they are; only the adapter learns.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import seerattn

BOOK = Path("assets/books/distill/conan-doyle-beyond-the-city.txt.gz")


def main() -> None:
    """Attaches both, takes some steps, saves both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/reference-model", help="folder or Hub id")
    parser.add_argument("--gates", default="assets/reference-gates/best", help="folder or Hub id")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    lora = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], r=8, lora_alpha=16))
    gated = seerattn.attach(lora, args.gates, policy=seerattn.TopK(density=args.density), impl="sparse")
    # Saved gates come frozen: the adapter alone takes gradients.
    learning = {name: p for name, p in gated.named_parameters() if p.requires_grad}
    print(f"learning: {len(learning)} tensors, {sum('lora' in name for name in learning)} of them of the LoRA")

    text = gzip.decompress(BOOK.read_bytes()).decode()
    ids = tokenizer(text, truncation=True, max_length=args.tokens, return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(learning.values(), lr=1e-3)
    for step in range(args.steps):
        with seerattn.record_density(gated) as meter:
            loss = gated(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}, density {meter.mean():.4f}")
    # Each writes its own; PeftModel.from_pretrained and then seerattn.attach bring both back.
    lora.save_pretrained(args.output / "lora")
    gated.save_pretrained(args.output / "gates")


if __name__ == "__main__":
    main()
