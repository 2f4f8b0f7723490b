"""Ask a model with gates a question about a long text.

    make models
    python examples/ask_a_long_text.py --text assets/books/evaluate/harte-from-sand-hill-to-pine.txt.gz \
        --question "What is this text about?"

The prompt is read sparsely, the answer is written densely. Printed are the answer, the share of the attention blocks
that the prompt took, and the seconds of the whole call.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import seerattn
from seerattn.data.text import read_documents


def prompt_of(tokenizer: PreTrainedTokenizerBase, text: str, question: str, tokens: int) -> torch.Tensor:
    """Ids of the first tokens of a text and a question about it, as a chat where the model knows one."""
    start = tokenizer.decode(tokenizer(text, add_special_tokens=False, truncation=True, max_length=tokens).input_ids)
    content = f"{start}\n\n{question}"
    if tokenizer.chat_template is None:
        return tokenizer(content, return_tensors="pt").input_ids
    chat = [{"role": "user", "content": content}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return inputs["input_ids"]


def main() -> None:
    """Loads, attaches, asks, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/models/smollm2", help="folder or Hub id")
    parser.add_argument("--gates", default="assets/smollm2-gates", help="folder or Hub id")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--question", required=True)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--tokens", type=int, default=7000, help="of the text; the model's context is the limit")
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--impl", default="auto", help='"sparse" is never dense, also where dense is faster')
    args = parser.parse_args()

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
    model = seerattn.attach(model, args.gates, policy=seerattn.TopK(density=args.density), impl=args.impl)

    (text, *_) = read_documents([args.text])
    ids = prompt_of(tokenizer, text, args.question, args.tokens).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    begin = time.perf_counter()
    with seerattn.record_density(model) as meter:
        out = model.generate(**inputs, max_new_tokens=args.new_tokens, do_sample=False)
    seconds = time.perf_counter() - begin
    print(f"answer: {tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()}")
    print(f"prompt: {ids.shape[1]} tokens, density {meter.mean():.4f}, {seconds:.2f} s")


if __name__ == "__main__":
    main()
