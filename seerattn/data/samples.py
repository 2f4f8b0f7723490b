"""Samples for distillation: exactly `context` tokens for every index.

A sample is a function of the seed and its index alone, so a run that is resumed, or spread over more processes, sees
what an uninterrupted run on one process sees.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from seerattn.data.corpus import Corpus
from seerattn.data.packing import SamplePlan, Segment
from seerattn.data.retrieval import training_document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Samples(Dataset):
    """Samples of ``context`` tokens, by index.

    Each is ``{"input_ids", "position_ids"}``, int64 ``[context]``. Positions begin anew with every document, which is
    what tells packed documents apart.

    Args:
        corpus: the tokenised documents.
        tokenizer: the model's own; its beginning-of-sequence token, if it has one, begins every document and window.
        count: number of samples.
        context: tokens of a sample, a multiple of ``block``.
        block: tokens of a block, the larger one if queries and keys differ.
        retrieval_share: share of samples that are synthetic retrieval documents laid into the text.
        seed: draws everything.
        windows: lengths that samples of text are cut into, see `SamplePlan`.

    Raises:
        ValueError: retrieval documents are asked for and the text or the context is too short for them, or windows
            that do not divide a sample.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        *,
        count: int,
        context: int,
        block: int,
        retrieval_share: float,
        seed: int,
        windows: Sequence[int] = (),
    ) -> None:
        self.corpus, self.tokenizer, self.context = corpus, tokenizer, context
        self.bos_token_id = tokenizer.bos_token_id
        lengths = corpus.lengths
        self.plan = SamplePlan(
            lengths,
            count=count,
            context=context,
            head=0 if self.bos_token_id is None else 1,
            block=block,
            retrieval_share=retrieval_share,
            seed=seed,
            windows=windows,
        )
        self.haystacks = [i for i, length in enumerate(lengths) if length >= context]
        if retrieval_share:
            if not self.haystacks:
                raise ValueError(
                    f"retrieval_share needs a document of at least {context} tokens to hide facts in, got "
                    f"{max(lengths)} at most; use longer documents, a shorter context or retrieval_share 0"
                )
            self._recall_document(random.Random(seed))

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        segments = self.plan[index]
        if segments is None:
            rng = self.plan.rng(index)
            rng.random()
            return {
                "input_ids": torch.tensor(self._recall_document(rng)),
                "position_ids": torch.arange(self.context),
            }
        head = [] if self.bos_token_id is None else [self.bos_token_id]
        pieces = [np.concatenate((np.asarray(head, dtype=np.int64), self._tokens(s))) for s in segments]
        return {
            "input_ids": torch.from_numpy(np.concatenate(pieces)),
            "position_ids": torch.from_numpy(np.concatenate([np.arange(len(piece)) for piece in pieces])),
        }

    def _tokens(self, segment: Segment) -> np.ndarray:
        begin = self.corpus.offsets[segment.document] + segment.start
        return self.corpus.tokens[begin : begin + segment.length]

    def _recall_document(self, rng: random.Random) -> list[int]:
        document = rng.choice(self.haystacks)
        begin, end = self.corpus.offsets[document : document + 2]
        haystack = self.corpus.tokens[begin:end]
        return training_document(self.tokenizer, haystack, self.context, rng, bos_token_id=self.bos_token_id).input_ids


def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks samples.

    Where all documents have one length each is a row of its own: dense attention then needs no mask over all pairs of
    tokens. Else ``segment_ids`` number the documents of every row.
    """
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    beginning = batch["position_ids"] == 0
    if not beginning[:, 1:].any():
        return batch
    begins = beginning.flatten().nonzero().flatten()
    tokens, length = beginning.numel(), int(begins[1])
    if tokens % length == 0 and torch.equal(begins, torch.arange(0, tokens, length)):
        return {name: x.view(-1, length) for name, x in batch.items()}
    return batch | {"segment_ids": beginning.cumsum(1) - 1}
