"""Text, tokenizer and batches of `reference_model.py`: from shards of JSON lines to rows of tokens on the device."""

import random
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from seerattn.data.retrieval import training_document
from seerattn.data.text import read_documents

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
GROUPS = ("books", "proofs")
TOKENIZER_SAMPLE = 60_000  # characters of each training document, from its middle


def read_texts(data: Path, split: str, limit: int | None = None) -> dict[str, list[str]]:
    """Texts of each group's `split`; decompression releases the GIL, so threads read shards side by side.

    Raises:
        ValueError: If a group has no shard of the split, or its shards hold no text.
    """
    texts = {}
    for group in GROUPS:
        shards = sorted((data / group).glob(f"{split}*.jsonl*"))
        with ThreadPoolExecutor() as pool:
            texts[group] = [text for shard in pool.map(read_documents, zip(shards)) for text in shard][:limit]
        if not texts[group]:
            raise ValueError(
                f"data must hold {group}/{split}*.jsonl[.gz|.bz2|.xz] with text, got {data}; name its parent"
            )
    return texts


def train_tokenizer(texts: list[str], *, vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, learned from the middle of each text; it puts BOS first by default."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    middles = (text[max(0, (len(text) - TOKENIZER_SAMPLE) // 2) :][:TOKENIZER_SAMPLE] for text in texts)
    tokenizer.train_from_iterator(middles, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def tokenise(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text, EOS last, as uint16; all cores work on a few documents at a time, which bounds memory."""
    documents = []
    for start in range(0, len(texts), 64):
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts[start : start + 64], add_special_tokens=False)
        documents += [np.array([*encoding.ids, tokenizer.eos_token_id], dtype=np.uint16) for encoding in encodings]
    return documents


def epoch_windows(documents: list[np.ndarray], context: int, bos: int, rng: random.Random) -> Iterator[np.ndarray]:
    """All documents once, in random order, as rows of BOS and `context` consecutive tokens.

    Each document is cut from a random phase on; what is left at both ends, and documents shorter than a window, are
    packed with BOS between them.
    """
    starts, scraps = [], []
    for number, document in enumerate(documents):
        if len(document) < context:
            scraps.append(document)
            continue
        phase = rng.randrange(min(context, len(document) - context + 1))
        whole = range(phase, len(document) - context + 1, context)
        starts += [(number, start) for start in whole]
        scraps += [document[:phase], document[whole[-1] + context :]]
    rng.shuffle(scraps)
    first = np.array([bos], dtype=np.uint16)
    packed = np.concatenate([part for scrap in scraps if len(scrap) for part in (first, scrap)] or [first])
    starts += [(-1, start) for start in range(0, len(packed) - context + 1, context)]
    rng.shuffle(starts)
    for number, start in starts:
        source = packed if number < 0 else documents[number]
        yield np.concatenate([first, source[start : start + context]])


def training_rows(
    documents: list[np.ndarray], tokenizer: PreTrainedTokenizerFast, context: int, retrieval_share: float, seed: str
) -> Iterator[np.ndarray]:
    """Endless rows of `context` + 1 tokens, BOS first; a share of them are retrieval documents."""
    rng = random.Random(seed)
    bos = tokenizer.bos_token_id
    haystacks = [document for document in documents if len(document) > context]
    if not haystacks:
        raise ValueError(f"data must hold a training document of more than {context} tokens; use a shorter context")
    while True:
        for window in epoch_windows(documents, context, bos, rng):
            while rng.random() < retrieval_share:
                haystack = rng.choice(haystacks)[:-1]
                document = training_document(tokenizer, haystack, context + 1, rng, bos_token_id=bos)
                yield np.array(document.input_ids, dtype=np.uint16)
            yield window


def batches_ahead(
    rows: Iterator[np.ndarray], rows_per_step: int, device: torch.device
) -> Generator[torch.Tensor, None, None]:
    """Batches `[rows_per_step, context + 1]` (int32) on `device`; a thread pins them in memory, 32 steps ahead."""

    def prepare() -> torch.Tensor:
        batch = torch.from_numpy(np.stack(list(islice(rows, rows_per_step))).astype(np.int32))
        return batch.pin_memory() if device.type == "cuda" else batch

    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(prepare) for _ in range(32))
        while True:
            ahead.append(pool.submit(prepare))
            yield ahead.popleft().result().to(device, non_blocking=True)
