"""A model with gates that answers: loaded, its prompts made into tokens, its limits known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from seerattn.hf.attach import attach
from seerattn.hf.eval_model import Loading, choose_dtype
from seerattn.hf.loading import read_config, read_model, read_tokenizer
from seerattn.hf.state import attachment_of
from seerattn.options import check_options, option
from seerattn.selection.policies import Policy, TokenBudget, TopK

Rule = Literal["same_k", "row_share"]


@dataclass(frozen=True, kw_only=True)
class Answering:
    """Which model answers, and how much of its attention a prompt takes.

    Attributes:
        model: base model.
        gates: its gates; "" only where it runs dense.
        density: of the prompt's attention; None takes the policy that was saved with the gates.
        dense: whether prompts are read without its gates.
        decode_tokens: that each token of an answer may read; 0 leaves it to the gates, which mostly name no policy.
    """

    model: str = option(help="Base model: a folder or the name of one on the Hub.")
    gates: str = option("", help="Its gates: a folder or the name of one on the Hub.")
    density: float | None = option(
        None, help="Share of attention that a prompt takes; default: the policy of the gates.", above=0, high=1
    )
    dense: bool = option(False, help="Attend to everything, as the model does without gates.")
    decode_tokens: int = option(
        0, help="Each token of an answer reads so many at most; default: what the gates say, or else all.", low=0
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.dense and self.density is not None:
            raise ValueError(f"density must be left out with dense, which is density 1, got {self.density:g}")
        if not self.gates and not self.dense:
            raise ValueError("gates must be given, got none; or pass dense")
        if self.decode_tokens and not self.gates:
            raise ValueError(f"gates must be given to choose what decode_tokens bounds, got {self.decode_tokens} alone")

    def load(self, loading: Loading, *, rule: Rule = "same_k", spread: bool = False) -> AnsweringModel:
        """Loads the model and its gates.

        Args:
            loading: where and how.
            rule: of `TopK`, where a density is given.
            spread: see `read_model`.

        Raises:
            ValueError: no such model, or gates that are not its own or have no policy.
        """
        trust, place = loading.trust_remote_code, loading.place
        config = read_config(self.model, trust_remote_code=trust)
        tokenizer = read_tokenizer(self.model, trust_remote_code=trust)
        dtype = getattr(torch, choose_dtype(loading.dtype, place))
        options = {"config": config, "trust_remote_code": trust, "spread": spread}
        model = read_model(self.model, dtype=dtype, device=place, **options).eval()
        if self.gates:
            policy = None if self.density is None else TopK(density=self.density, rule=rule)
            decode_policy = TokenBudget(tokens=self.decode_tokens) if self.decode_tokens else None
            model = attach(model, self.gates, policy, decode_policy=decode_policy, impl=loading.impl)
            attachment = attachment_of(model)
            if self.dense:
                attachment.set_policy(None, decode_policy)
            elif attachment.policies[attachment.active] is None:
                raise ValueError(f"density must be given for gates without a policy, got {self.gates} without")
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        return AnsweringModel(self.model, model.requires_grad_(False), tokenizer, longest, rule, bool(self.gates))


@dataclass(frozen=True, eq=False)
class AnsweringModel:
    """A loaded model that answers.

    Attributes:
        name: as it was asked for.
        model: with gates, or plain.
        tokenizer: its tokenizer.
        longest: tokens of prompt and answer together that it was made for, None where it does not say.
        rule: of `TopK` of densities that are asked for.
        gated: whether it has gates.
    """

    name: str
    model: Any
    tokenizer: Any
    longest: int | None
    rule: Rule
    gated: bool

    def policy_of(self, density: float) -> Policy | None:
        """The policy of a density; density 1 runs dense.

        Raises:
            ValueError: there are no gates to choose by.
        """
        if not self.gated and density < 1:
            raise ValueError(f"density must be 1 of a model without gates, got {density:g}")
        return None if density == 1 else TopK(density=density, rule=self.rule)

    def tokens_of(self, text: str) -> list[int]:
        """Tokens of a text as it is.

        Raises:
            ValueError: there are none.
        """
        return _some(self.tokenizer(text)["input_ids"])

    def tokens_of_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Tokens of a chat, up to where the model is to answer.

        Raises:
            ValueError: the model knows no chats, or not this one.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(f"model must have a chat template to chat, got {self.name} without; give it a plain text")
        try:
            found = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=True
            )
        # A template is a program of others: it refuses by jinja's errors, or falls over what it did not expect.
        except Exception as error:
            raise ValueError(f"messages must be a chat that the model's template takes: {error}") from error
        return _some(found["input_ids"])

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without those that are marks."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def check_room(self, prompt: int, new: int) -> None:
        """Refuses what is longer than the model was made for.

        Raises:
            ValueError: says how long it may be.
        """
        if self.longest is not None and prompt + new > self.longest:
            raise ValueError(
                f"prompt and answer must be at most the model's {self.longest} tokens together, got a prompt of "
                f"{prompt} and an answer of up to {new}"
            )


def _some(tokens: list[int]) -> list[int]:
    if not tokens:
        raise ValueError("prompt must hold at least one token, got none")
    return tokens
