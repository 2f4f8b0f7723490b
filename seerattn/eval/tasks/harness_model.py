"""A loaded model as lm-evaluation-harness sees it: long prompts lose their middle, batches are what the model has seen.

Imported only where tasks are evaluated, for the harness is an optional package.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CacheHook
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from seerattn.eval.tasks.likelihood import Likelihood
from seerattn.hf.state import attachment_of, policy

Progress = Callable[[int], Callable[[int], None]]


def cut_middle(ids: Sequence[int], room: int) -> list[int]:
    """The first and the last half of ``room`` tokens, as LongBench truncates (arXiv 2308.14508, section 4.1)."""
    if len(ids) <= room:
        return list(ids)
    return list(ids[: room // 2]) + list(ids[len(ids) - (room - room // 2) :])


def _own(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy for the harness, which sets its padding token. Made once: with 262k tokens that takes 4 s."""
    return _copied(tokenizer, str((tokenizer.chat_template, tokenizer.special_tokens_map, len(tokenizer))))


@lru_cache(maxsize=1)
def _copied(tokenizer: PreTrainedTokenizerBase, state: str) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer in the state that it is in: what users change later makes another one."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = VERY_LARGE_INTEGER  # else it warns of every prompt before it is cut
    return tokenizer


class _Advance(CacheHook):
    """The harness tells its cache of every finished request; this one counts them."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        super().__init__(None)
        self._advance = advance

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._advance(1)


class MiddleCutModel(HFLM):
    """`HFLM` of a model object, with whatever is attached to it.

    Prompts too long for the model lose their middle, not their start. Requests for probabilities run one by one: the
    harness would pad such batches on the right without a mask, and the padding would be counted as text and share the
    budget of blocks. Batches of generation are padded on the left with a mask, which sparse layers strip.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; a copy is used.
        max_length: longest prompt with what is generated after it, tokens.
        batch_size: prompts that are generated from together.
        writes: whether it generates answers; without, it answers nothing.
        answer: gives the right answer of a document; then `likelihoods` has how likely it is, by the number of the
            document among those that are asked.
        encoded: token ids of texts, which it looks up and adds to: each method is asked the same.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        batch_size: int,
        writes: bool = True,
        answer: Callable[[Mapping[str, Any]], str] | None = None,
        encoded: dict[tuple[str, bool | None], array] | None = None,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=_own(tokenizer), max_length=max_length, batch_size=batch_size)
        self.progress: Progress | None = None
        self.likelihoods: dict[int, Likelihood] = {}
        self._writes, self._answer = writes, answer
        self._encoded = {} if encoded is None else encoded

    def _begin(self, requests: int) -> None:
        if self.progress is not None:
            self.set_cache_hook(_Advance(self.progress(requests)))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        self._begin(len(requests) * (self._writes + (self._answer is not None)))
        if self._answer is not None:
            # The longest first, as in generation.
            queue = sorted(requests, key=lambda request: -len(self.tok_encode(request.args[0])))
            for begin in range(0, len(queue), self.batch_size):
                self._take_likelihoods(queue[begin : begin + self.batch_size])
        return super().generate_until(requests, disable_tqdm=True) if self._writes else ["" for _ in requests]

    @torch.inference_mode()
    def _take_likelihoods(self, requests: Sequence[Instance]) -> None:
        """Finds how likely right answers are, each of which is read after its prompt as if it were decoded.

        Prompts are those that answers are generated from. An answer that leaves the room of the model is cut.
        """
        room = self.max_length - int((requests[0].args[1] or {}).get("max_gen_toks", self.max_gen_toks))
        prompts = self.tok_batch_encode([r.args[0] for r in requests], left_truncate_len=room)
        input_ids, mask = (x.to(self.device) for x in prompts)
        answers = [self._answer_ids(r.args[0], self._answer(r.doc)) for r in requests]
        answers = [ids[: self.max_length - int(n)] for ids, n in zip(answers, mask.sum(1), strict=True)]
        width = max(map(len, answers))
        labels = torch.tensor([ids + [0] * (width - len(ids)) for ids in answers], device=self.device)
        # What stands after a shorter answer is read by none of its tokens.
        whole = torch.cat([mask, torch.ones_like(labels[:, :-1])], 1)
        places = (whole.cumsum(1) - 1).clamp(min=0)
        start = input_ids.shape[1]
        found = self.model(
            input_ids=input_ids, attention_mask=mask, position_ids=places[:, :start], use_cache=True, logits_to_keep=1
        )
        logits = [found.logits[:, -1:]]
        if width > 1:
            # Decoded tokens attend to everything, however many are read at once.
            attached = attachment_of(self.model) is not None
            with policy(self.model, None) if attached else nullcontext():
                logits.append(
                    self.model(
                        input_ids=labels[:, :-1],
                        attention_mask=whole,
                        position_ids=places[:, start:],
                        past_key_values=found.past_key_values,
                    ).logits
                )
        scores = torch.cat(logits, 1)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        log_probs = scores.log_softmax(-1).gather(2, labels[..., None])[..., 0].double()
        hits = scores.argmax(-1) == labels
        for request, ids, row, hit in zip(requests, answers, log_probs, hits, strict=True):
            known = row[: len(ids)].mean(), hit[: len(ids)].all()
            self.likelihoods[request.doc_id] = Likelihood(*map(float, known))
            self.cache_hook.add_partial("likelihood", request.args, None)

    def _answer_ids(self, prompt: str, answer: str) -> list[int]:
        """Tokens that the answer adds to a prompt; its own where the two would share a token."""
        before, whole = self.tok_encode(prompt), self.tok_encode(prompt + answer)
        shared = whole[: len(before)] != before
        return self.tok_encode(answer, add_special_tokens=False) if shared else whole[len(before) :]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._begin(len(requests))
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        self._begin(len(requests))
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = True,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        # The last token of a continuation is predicted but never read.
        cut = [(text, cut_middle(context, self.max_length + 1 - len(end)), end) for text, context, end in requests]
        together, self.batch_size_per_gpu = self.batch_size_per_gpu, 1
        try:
            return super()._loglikelihood_tokens(cut, disable_tqdm=True)
        finally:
            self.batch_size_per_gpu = together

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **options: Any,
    ) -> list[int]:
        if options:
            return super().tok_encode(string, add_special_tokens, left_truncate_len, **options)
        key = string, add_special_tokens
        if key not in self._encoded:
            self._encoded[key] = array("i", super().tok_encode(string, add_special_tokens))
        return self._encoded[key][-(left_truncate_len or 0) :].tolist()

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        rows = [cut_middle(self.tok_encode(string), left_truncate_len or self.max_length) for string in strings]
        width = max(map(len, rows))
        input_ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(input_ids)
        for number, row in enumerate(rows):
            input_ids[number, width - len(row) :] = torch.tensor(row)
            mask[number, width - len(row) :] = 1
        return input_ids, mask


class PromptRecorder(LM):
    """Keeps the prompts that it is asked with, and answers nothing."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> None:
        super().__init__()
        self._tokenizer, self._max_length = tokenizer, max_length
        self.prompts: list[list[int]] = []

    @property
    def tokenizer_name(self) -> str:
        return str(getattr(self._tokenizer, "name_or_path", "tokenizer"))

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self._tokenizer.chat_template or ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _encode(self, text: str) -> list[int]:
        # As the harness does: a template may have put the beginning-of-sequence token there.
        begun = text.startswith(self._tokenizer.bos_token or "\0")
        return self._tokenizer(text, add_special_tokens=not begun, verbose=False)["input_ids"]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        for request in requests:
            text, options = request.args
            room = self._max_length - int((options or {}).get("max_gen_toks", 256))
            self.prompts.append(cut_middle(self._encode(text), max(room, 1)))
        return ["" for _ in requests]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        # Answers to choose from share a prompt, which is kept once.
        for context, same in groupby(requests, key=lambda request: request.args[0]):
            whole = self._encode(context + next(same).args[1])
            begin = len(self._encode(context.rstrip()))
            room = self._max_length + 1 - len(whole[begin:])
            # The last token of a continuation is predicted but never read.
            self.prompts.append([*cut_middle(whole[:begin], room), *whole[begin:-1]] or whole)
        return [(0.0, False) for _ in requests]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        for request in requests:
            self.prompts.append(cut_middle(self._encode(request.args[0]), self._max_length))
        return [0.0 for _ in requests]
