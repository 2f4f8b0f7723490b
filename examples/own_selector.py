"""Choose the blocks yourself: any object with `select` takes the place of the gates.

    python examples/own_selector.py
    python examples/own_selector.py --model MODEL --tokens 8192 --stride 8

This one keeps the first block, the two most recent ones and every eighth between them. Nothing is trained.
"""

from __future__ import annotations

import argparse
import gzip
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import seerattn
from seerattn import AttentionContext, BlockIndices

BOOK = Path("assets/books/evaluate/harte-from-sand-hill-to-pine.txt.gz")
BLOCK = 64


@dataclass(frozen=True)
class Strided:
    """The first block, the two most recent ones, and every ``stride``-th."""

    stride: int

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
        """Chooses for queries ``[B, H, T, D]`` against keys ``[B, HKV, S, D]``, which hold the cache as well."""
        q_len, k_len = q.shape[2], k.shape[2]
        q_start = k_len - q_len
        # Blocks lie on the grid of the whole text, so the first row of a later chunk is not row 0.
        rows = torch.arange(q_start // BLOCK, -(-k_len // BLOCK), device=q.device)[:, None]
        columns = torch.arange(-(-k_len // BLOCK), device=q.device)
        keep = (columns % self.stride == 0) | (rows - columns < 2)
        # `BlockIndices` wants causal blocks alone and the diagonal in every row; one list serves each KV group.
        mask = (keep & (columns <= rows)).expand(q.shape[0], k.shape[1], -1, -1)
        return BlockIndices.from_mask(mask, block_q=BLOCK, block_k=BLOCK, q_start=q_start, q_len=q_len)


@torch.no_grad()
def main() -> None:
    """Attaches the selector and reads one text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/reference-model", help="folder or Hub id")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--stride", type=int, default=8)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    text = gzip.decompress(BOOK.read_bytes()).decode()
    ids = tokenizer(text, truncation=True, max_length=args.tokens, return_tensors="pt").input_ids
    dense = model(ids, labels=ids, use_cache=False).loss
    model = seerattn.attach(model, Strided(args.stride), impl="sparse")
    with seerattn.record_density(model) as meter:
        loss = model(ids, labels=ids, use_cache=False).loss
    print(f"density {meter.mean():.4f}, perplexity {loss.exp():.2f}, dense {dense.exp():.2f}")


if __name__ == "__main__":
    main()
