"""A loaded model that is measured: its tokenizer, the gates that belong to it, and selectors attached for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from seerattn.data.windows import Window, batches
from seerattn.gate.attn_gate import AttnGate
from seerattn.hf.attach import attach, detach
from seerattn.hf.capture import AttentionCall, watch_attention
from seerattn.hf.loading import read_config, read_model, read_tokenizer
from seerattn.hf.meters import AttentionTimes, DensityMeter, TimeMeter, record_density, record_time
from seerattn.hf.state import layer_states
from seerattn.ops.resolve import check_impl
from seerattn.options import check_options, option
from seerattn.results.environment import fingerprint
from seerattn.selection.budgets import HeadBudgets
from seerattn.selection.decode_selector import DecodeSelector
from seerattn.selection.policies import Policy, policy_from_dict
from seerattn.selection.selector import AttentionContext, Selector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class LoadedGates(NamedTuple):
    """Gates of a folder.

    Attributes:
        gates: the gate of each gated layer.
        policy: the policy that was saved with them, None without.
        budgets: what shares a density among their heads, None without.
    """

    gates: dict[int, AttnGate]
    policy: Policy | None
    budgets: HeadBudgets | None


@dataclass
class Run:
    """A model with selectors attached, and what is counted and timed while it runs.

    Attributes:
        model: the model.
    """

    model: PreTrainedModel
    _meter: DensityMeter | None = None
    _times: TimeMeter | None = None
    _heads: dict[int, int] | None = None

    def head_density(self) -> list[list[float]]:
        """Realised density so far by full-attention layer and head; layers without a selector compute everything."""
        counted = {} if self._meter is None else self._meter.by_head()
        heads = (self._heads or {}).items()
        return [counted[layer].tolist() if layer in counted else [1.0] * count for layer, count in heads]

    def density(self) -> float:
        """Realised density so far over all full-attention layers; 1 for the untouched model."""
        found = [sum(heads) / len(heads) for heads in self.head_density()]
        return sum(found) / len(found) if found else 1.0

    def decode_density(self) -> float:
        """Realised density so far of decoded tokens, over all full-attention layers; 1 without decoders."""
        counted = {} if self._meter is None else self._meter.decode.by_head()
        found = [float(counted[layer].mean()) if layer in counted else 1.0 for layer in self._heads or {}]
        return sum(found) / len(found) if found else 1.0

    def skipped(self) -> float:
        """Share of the counted blocks so far that attention skipped once it knew their scores."""
        return self._meter.skipped() if self._meter is not None and self._meter.layers else 0.0

    def times(self) -> AttentionTimes:
        """Times so far, of a run that is timed."""
        return self._times.times()


class EvalModel:
    """A loaded model, its tokenizer, and the gates that are compared on it.

    Args:
        model: a causal language model without gates or selectors.
        tokenizer: its tokenizer.
        name: what results call it.
        impl: implementation of the sparse attention. Never dense instead: a measurement at a density is one.

    Raises:
        ValueError: an unknown implementation.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str, impl: str = "auto"
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        check_impl("block_sparse_attention", impl)
        self._impl = "sparse" if impl == "auto" else impl
        self.weights = fingerprint(model.config._name_or_path or name)
        self._gates: dict[Path, LoadedGates] = {}
        self._held = False

    @property
    def dtype(self) -> str:
        """Name of the model's dtype, as results and plans give it."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def bos_token_id(self) -> int | None:
        return self.tokenizer.bos_token_id

    @property
    def longest(self) -> float:
        """Tokens of the longest prompt that the model was made for; infinite where it does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or float("inf")

    def gates(self, folder: Path) -> LoadedGates:
        """The gates of a folder, loaded once.

        Raises:
            ValueError: gates that are not whole or belong to another model.
        """
        if folder not in self._gates:
            if layer_states(self.model) and not self._held:
                raise ValueError("model must have no gates or selectors yet, got one with some")
            if self._held:
                detach(self.model)
            try:
                self._gates[folder] = self._load(folder)
            finally:
                if self._held:
                    attach(self.model, lambda layer: None, impl=self._impl)
        return self._gates[folder]

    def set_budgets(self, folder: Path, budgets: HeadBudgets) -> None:
        """Lets loaded gates share densities by other budgets; files stay as they are."""
        self._gates[folder] = self.gates(folder)._replace(budgets=budgets)

    def _load(self, folder: Path) -> LoadedGates:
        gated = attach(self.model, folder)
        try:
            gates = {state.layer: state.gate for state in layer_states(gated) if state.gate is not None}
            saved, budgets = gated.active_peft_config.policy, gated.base_model.attachment.budgets["default"]
        finally:
            detach(gated)
        return LoadedGates(gates, None if saved is None else policy_from_dict(saved), budgets)

    @contextmanager
    def untouched(self) -> Iterator[Run]:
        """The model as it is, inside the ``with``: dense, and not counted."""
        yield Run(self.model)

    def decoding(self, decoder: Callable[[int], DecodeSelector | None]) -> AbstractContextManager[Run]:
        """The model with a decoder for each layer attached, inside the ``with``; prompts run dense."""
        return self.attached(lambda layer: None, decoder)

    @contextmanager
    def attached(
        self,
        selector: Callable[[int], Selector | None],
        decoder: Callable[[int], DecodeSelector | None] | None = None,
        *,
        timed: bool = False,
    ) -> Iterator[Run]:
        """The model with a selector for each layer attached, and what chooses for tokens that are decoded."""
        attach(self.model, selector, decode_policy=decoder, impl=self._impl)
        try:
            with ExitStack() as stack:
                density = stack.enter_context(record_density(self.model))
                times = stack.enter_context(record_time(self.model)) if timed else None
                yield Run(self.model, density, times, {s.layer: s.heads for s in layer_states(self.model)})
        finally:
            if self._held:
                attach(self.model, lambda layer: None, impl=self._impl)
            else:
                detach(self.model)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps the model probed inside the ``with``: selectors change quickly, and without one it runs as always."""
        attach(self.model, lambda layer: None, impl=self._impl)
        self._held = True
        try:
            yield
        finally:
            self._held = False
            detach(self.model)

    def observe(
        self,
        windows: Sequence[Window],
        see: Callable[[Tensor, Tensor, AttentionContext], None],
        *,
        batch: int = 1,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        """Runs windows through the dense model and shows every full-attention layer's queries and keys to ``see``."""
        self.watch(windows, lambda call: see(call.query, call.key, call.context), batch=batch, advance=advance)

    def watch(
        self,
        windows: Sequence[Window],
        see: Callable[[AttentionCall], None],
        *,
        batch: int = 1,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        """Runs windows through the dense model and shows every full-attention call.

        Args:
            windows: text.
            see: called after each attention, before the layer goes on.
            batch: windows of equal length that run together.
            advance: told the number of windows done.
        """
        with watch_attention(self.model, see), torch.inference_mode():
            for group in batches(windows, batch):
                input_ids = torch.tensor([window.input_ids for window in group], device=self.device)
                self.model.base_model(input_ids=input_ids, use_cache=False)
                if advance is not None:
                    advance(len(group))


def choose_device(name: str | None = None) -> torch.device:
    """The device of that name, or the accelerator if there is one.

    Raises:
        ValueError: there is no such device here, or it does not compute.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.isascii():
        try:
            device = torch.device(name)
            # Names of devices that torch was not built for, or that hold no numbers, are found out by a sum alone.
            if (torch.ones(1, device=device) + 1).item() == 2:
                return device
        # By the kind of device it is one or the other.
        except (RuntimeError, AssertionError, ImportError):
            pass
    seen = torch.cuda.device_count()
    raise ValueError(f"device must be cpu, cuda or another that computes, got {name!r} where torch sees {seen} GPUs")


def choose_dtype(name: str, device: torch.device) -> str:
    """The dtype of that name; "auto" is bfloat16 on an accelerator and float32 on a CPU."""
    if name != "auto":
        return name
    return "float32" if device.type == "cpu" else "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a model is loaded to be measured.

    Attributes:
        device: see `choose_device`; "" is the accelerator if there is one.
        dtype: see `choose_dtype`.
        impl: implementation of the sparse attention.
        trust_remote_code: whether code that comes with the model may run.
    """

    device: str = option("", help="cpu, cuda, ...; default: cuda if there is one.")
    dtype: Dtype = option("auto", help="Of the model; auto is bfloat16 on an accelerator and float32 on a CPU.")
    impl: str = option("auto", help="Implementation of the sparse attention; auto is the fastest here.")
    trust_remote_code: bool = option(False, help="Run code that comes with the model.")

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def place(self) -> torch.device:
        """The device.

        Raises:
            ValueError: there is none of that name.
        """
        return choose_device(self.device or None)

    def load(self, model: str, *, context: int = 0, name: str | None = None) -> EvalModel:
        """The model; see `load_eval_model`."""
        return load_eval_model(
            model,
            device=self.place,
            dtype=self.dtype,
            impl=self.impl,
            context=context,
            name=name,
            trust_remote_code=self.trust_remote_code,
        )


def load_eval_model(
    model: str,
    *,
    device: torch.device,
    dtype: str = "auto",
    impl: str = "auto",
    context: int = 0,
    name: str | None = None,
    trust_remote_code: bool = False,
) -> EvalModel:
    """Loads a model and its tokenizer.

    Args:
        model: a folder or the name of a model on the Hub.
        device: where to load it; the meta device reads the config alone and gives a model without weights.
        dtype: of the model, see `choose_dtype`.
        impl: implementation of the sparse attention.
        context: longest context that will be asked for.
        name: what results call it; by default the last part of ``model``.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ValueError: no such model or one that is not whole, or a context longer than the model's.
    """
    config = read_config(model, trust_remote_code=trust_remote_code)
    check_context(config, context)
    tokenizer = read_tokenizer(model, trust_remote_code=trust_remote_code)
    weights = getattr(torch, choose_dtype(dtype, device))
    loaded = read_model(model, dtype=weights, device=device, config=config, trust_remote_code=trust_remote_code)
    return EvalModel(loaded, tokenizer, name=name or Path(model).name, impl=impl)


def check_context(config: object, context: int) -> None:
    """Refuses a context that the model of a configuration was not made for.

    Raises:
        ValueError: says how long it may be.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and context > longest:
        raise ValueError(f"contexts must be at most the model's {longest} tokens, got {context}")
