"""Arms: the ways of choosing blocks that an evaluation compares on one loaded model.

An `Arm` is a kind of selector with a policy; a `TunedArm` is a family of selectors at the value of its knob that meets
what was asked for. Measurements take either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch

from seerattn.gate.attn_gate import AttnGate
from seerattn.gate_selector import GateSelector
from seerattn.hf.attach import attach, detach
from seerattn.hf.loading import read_config, read_model, read_tokenizer
from seerattn.hf.meters import AttentionTimes, DensityMeter, TimeMeter, record_density, record_time
from seerattn.hf.state import layer_states
from seerattn.methods.family import Family, SelectorAt
from seerattn.methods.oracle import OracleSelector, oracle_name
from seerattn.methods.streaming import StreamingSelector
from seerattn.ops.resolve import check_impl
from seerattn.results.environment import fingerprint
from seerattn.results.record import Result
from seerattn.selection.budgets import HeadBudgets, shares_density
from seerattn.selection.map_form import PUBLISHED, MapForm
from seerattn.selection.policies import Policy, TopK, policy_from_dict
from seerattn.selection.selector import LastRowsDense

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Budget = Literal["density", "time"]
SelectorName = Literal["dense", "gate", "oracle", "streaming"]
SELECTORS: tuple[str, ...] = get_args(SelectorName)


@dataclass(frozen=True)
class Gates:
    """A folder of gates under the name that results give it.

    Attributes:
        name: what tables call it.
        path: the folder.
    """

    name: str
    path: Path


@dataclass(frozen=True)
class Arm:
    """One way of choosing blocks.

    Attributes:
        selector: its kind.
        policy: how many blocks it keeps; None for dense, and for gates the policy saved with them.
        gates: the gates of a "gate".
        block_q: query block size in tokens of oracle and streaming.
        block_k: key block size in tokens of oracle and streaming.
        target: form of the map that an oracle chooses by.
        budgets: what shares an oracle's density among heads; gates have their own.
    """

    selector: SelectorName
    policy: Policy | None = None
    gates: Gates | None = None
    block_q: int = 64
    block_k: int = 64
    target: MapForm = PUBLISHED
    budgets: HeadBudgets | None = None

    def __str__(self) -> str:
        name = self.gates.name if self.gates else self.kind
        if self.block_k != 64:
            name += f" {self.block_k}"
        if self.density is not None:
            name += f" {self.density:g}"
        elif self.gates and self.policy is None:
            name += " (its own policy)"
        if isinstance(self.policy, TopK) and self.policy.heads == "equal":
            name += ", equal heads"
        if self.policy is not None and self.policy.last_rows_dense:
            name += f", last {self.policy.last_rows_dense} rows dense"
        return name

    @property
    def kind(self) -> str:
        """The kind of its selector as results tell it, of an oracle with its map."""
        name = oracle_name(self.target) if self.selector == "oracle" else self.selector
        return name if self.budgets is None else f"{name}, budgets per head"

    @property
    def density(self) -> float | None:
        """The nominal density, None if the policy has no single one."""
        density = self.policy.density if isinstance(self.policy, TopK) else None
        return density if isinstance(density, float) else None


DENSE = Arm("dense")


@dataclass(frozen=True)
class TunedArm:
    """A family at the value of its knob that meets what was asked for.

    Attributes:
        family: the way of choosing blocks.
        knob: value of its knob; None where it is not known yet.
        asked: the density, or the share of the time that dense attention takes.
        budget: which of the two.
        last_rows_dense: query-block rows at the end that keep every block, on top of what the knob gives.
        gates: the gates of a family of gates.
    """

    family: Family
    knob: float | None
    asked: float
    budget: Budget = "density"
    last_rows_dense: int = 0
    gates: Gates | None = None

    def __str__(self) -> str:
        of_time = " of the time" if self.budget == "time" else ""
        rows = f", last {self.last_rows_dense} rows dense" if self.last_rows_dense else ""
        return f"{self.family.name} {self.asked:g}{of_time}{rows}"

    @property
    def selector_at(self) -> SelectorAt:
        """What gives the selector of each layer."""
        at = self.family.at(self.knob)
        return with_dense_rows(at, self.last_rows_dense) if self.last_rows_dense else at


def with_dense_rows(at: SelectorAt, rows: int) -> SelectorAt:
    """The same selectors, each with the last query-block rows dense."""

    def selector(layer: int) -> LastRowsDense | None:
        chosen = at(layer)
        return None if chosen is None else LastRowsDense(chosen, rows)

    return selector


def make_arms(
    selectors: Sequence[str],
    densities: Sequence[float],
    *,
    gates: Sequence[Gates] = (),
    last_rows_dense: Sequence[int] = (0,),
    saved_policy: bool = False,
    block_q: int = 64,
    block_k: int = 64,
) -> list[Arm]:
    """All combinations of selectors, gates, densities and numbers of dense last rows, dense once.

    Args:
        selectors: names among `SELECTORS`; "oracle:sum:2" is the oracle that chooses by another map than the published
            target, see `MapForm.parse`.
        densities: nominal densities of top-k, the same number of blocks in every row.
        gates: what "gate" stands for.
        last_rows_dense: query-block rows at the end that keep every block.
        saved_policy: adds each of the gates with the policy it was saved with.
        block_q: query block size in tokens of oracle and streaming.
        block_k: key block size in tokens of oracle and streaming.

    Raises:
        ValueError: an unknown selector or map, a density outside of (0, 1], or gates without "gate" or the reverse.
    """
    targets = {name: MapForm.parse(name.removeprefix("oracle:")) for name in selectors if name.startswith("oracle:")}
    unknown = [name for name in selectors if name not in SELECTORS and name not in targets]
    if unknown:
        raise ValueError(f"selectors must be among {', '.join(SELECTORS)}, got {', '.join(unknown)}")
    if ("gate" in selectors) != bool(gates):
        raise ValueError(
            "selectors must name gate if gates are given, and only then, "
            f"got {', '.join(selectors)} and {len(gates)} folders; add gate to the selectors or give gates"
        )
    policies: list[Policy] = [
        TopK(density=density, last_rows_dense=rows) for rows in last_rows_dense for density in densities
    ]
    arms = [DENSE] if "dense" in selectors else []
    for name in selectors:
        if name in targets:
            arms += [Arm("oracle", policy, None, block_q, block_k, targets[name]) for policy in policies]
        elif name in ("oracle", "streaming"):
            arms += [Arm(name, policy, None, block_q, block_k) for policy in policies]
        elif name == "gate":
            for folder in gates:
                arms += [Arm("gate", policy, folder) for policy in policies]
                arms += [Arm("gate", None, folder)] if saved_policy else []
    return arms


@dataclass
class Run:
    """A model with an arm attached, and what is counted and timed while it runs.

    Attributes:
        model: the model.
    """

    model: PreTrainedModel
    _meter: DensityMeter | None
    _times: TimeMeter | None
    _heads: dict[int, int]

    def head_density(self) -> list[list[float]]:
        """Realised density so far by full-attention layer and head; layers without a selector compute everything."""
        counted = {} if self._meter is None else self._meter.by_head()
        return [counted[layer].tolist() if layer in counted else [1.0] * heads for layer, heads in self._heads.items()]

    def density(self) -> float:
        """Realised density so far over all full-attention layers; 1 for the untouched model."""
        found = [sum(heads) / len(heads) for heads in self.head_density()]
        return sum(found) / len(found) if found else 1.0

    def times(self) -> AttentionTimes:
        """Times so far, of a run that is timed."""
        return self._times.times()


class _Loaded(NamedTuple):
    """Gates of a folder."""

    gates: dict[int, AttnGate]
    policy: Policy | None
    weights: str
    budgets: HeadBudgets | None


class EvalModel:
    """A loaded model, its tokenizer, and the gates that are compared on it.

    Args:
        model: a causal language model without gates or selectors.
        tokenizer: its tokenizer.
        name: what results call it.
        gates: folders of gates; all are loaded, so that those of another model are refused at once.
        impl: implementation of the sparse attention. Never dense instead: a measurement at a density is one.

    Raises:
        ValueError: gates that are not whole or belong to another model, or an unknown implementation.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        gates: Sequence[Gates] = (),
        impl: str = "auto",
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        check_impl("block_sparse_attention", impl)
        self._impl = "sparse" if impl == "auto" else impl
        self._weights = fingerprint(model.config._name_or_path or name)
        self._gates = {folder: self._load(folder) for folder in gates}
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

    def gates(self, folder: Gates) -> dict[int, AttnGate]:
        """The gate of each gated layer."""
        return self._gates[folder].gates

    def saved_policy(self, folder: Gates) -> Policy | None:
        """The policy that was saved with gates, None without."""
        return self._gates[folder].policy

    def budgets(self, folder: Gates) -> HeadBudgets | None:
        """What shares a density among the heads of gates, None where they have none."""
        return self._gates[folder].budgets

    def set_budgets(self, folder: Gates, budgets: HeadBudgets) -> None:
        """Lets loaded gates share densities by other budgets; files stay as they are."""
        self._gates[folder] = self._gates[folder]._replace(budgets=budgets)

    def _load(self, folder: Gates) -> _Loaded:
        if layer_states(self.model):
            raise ValueError("model must have no gates or selectors yet, got one with some")
        gated = attach(self.model, folder.path)
        try:
            gates = {state.layer: state.gate for state in layer_states(gated) if state.gate is not None}
            saved, budgets = gated.active_peft_config.policy, gated.base_model.attachment.budgets["default"]
        finally:
            detach(gated)
        return _Loaded(gates, None if saved is None else policy_from_dict(saved), fingerprint(folder.path), budgets)

    def block_sizes(self, arm: Arm | TunedArm) -> tuple[int, int]:
        """Query and key block size in tokens of what an arm selects."""
        if isinstance(arm, TunedArm):
            return arm.family.block_q, arm.family.block_k
        if arm.gates is None:
            return arm.block_q, arm.block_k
        config = next(iter(self.gates(arm.gates).values())).config
        return config.block_q, config.block_k

    def selector(self, arm: Arm | TunedArm) -> SelectorAt:
        """What gives the selector of each layer.

        Raises:
            ValueError: the policy saved with the gates is asked for and there is none.
        """
        if isinstance(arm, TunedArm):
            return arm.selector_at
        policy = self.policy(arm)
        if arm.selector == "gate":
            gates, budgets = self.gates(arm.gates), self.budgets(arm.gates)
            return lambda layer: GateSelector(gates[layer], policy, budgets=budgets) if layer in gates else None
        if arm.selector == "dense":
            return lambda layer: None
        sizes = {"block_q": arm.block_q, "block_k": arm.block_k}
        if arm.selector == "oracle":
            return lambda layer: OracleSelector(policy, **sizes, target=arm.target, budgets=arm.budgets)
        return lambda layer: StreamingSelector(policy, **sizes)

    def policy(self, arm: Arm) -> Policy | None:
        """The arm's policy, or the one saved with its gates."""
        if arm.selector != "gate" or arm.policy is not None:
            return arm.policy
        saved = self.saved_policy(arm.gates)
        if saved is None:
            raise ValueError(
                f"gates must have a saved policy to be run with it, got {arm.gates.path} without; "
                "make one with seerattn eval calibrate"
            )
        return saved

    @contextmanager
    def attached(self, arm: Arm | TunedArm, *, timed: bool = False) -> Iterator[Run]:
        """The model with an arm attached, inside the ``with``; the dense arm is the untouched model unless timed."""
        if arm == DENSE and not timed:
            yield Run(self.model, None, None, {})
        else:
            with self.observed(self.selector(arm), timed=timed) as run:
                yield run

    @contextmanager
    def observed(self, selector: SelectorAt, *, timed: bool = False) -> Iterator[Run]:
        """The model with a selector attached to its layers, inside the ``with``."""
        attach(self.model, selector, impl=self._impl)
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
        """Keeps the model probed inside the ``with``: arms change quickly, and without one it runs as it always did."""
        attach(self.model, lambda layer: None, impl=self._impl)
        self._held = True
        try:
            yield
        finally:
            self._held = False
            detach(self.model)

    def result(self, arm: Arm | TunedArm, *, cell: dict[str, Any], **values: Any) -> Result:
        """A result of this model without a value yet: what it will be found by."""
        weights = {"model": self._weights} | ({"gates": self._gates[arm.gates].weights} if arm.gates else {})
        if isinstance(arm, TunedArm):
            name = arm.gates and arm.family.name
            selector = "gate" if arm.gates else arm.family.name
            policy = dict(arm.family.settings) | {"last_rows_dense": arm.last_rows_dense}
            policy |= {} if arm.knob is None else {"knob": arm.knob}
            density = arm.asked if arm.budget == "density" else None
            about = {"budget": arm.budget, "block_q": arm.family.block_q, "block_k": arm.family.block_k}
            about |= {"share": arm.asked} if arm.budget == "time" else {}
        else:
            name, selector = arm.gates and arm.gates.name, arm.kind
            policy = self.policy(arm)
            about = {} if arm.gates or arm == DENSE else {"block_q": arm.block_q, "block_k": arm.block_k}
            budgets = self.budgets(arm.gates) if arm.gates else arm.budgets
            if shares_density(policy) and budgets is not None:
                about["budgets"] = budgets.digest
            policy = None if policy is None else policy.to_dict()
            density = arm.density
        return Result(
            value=None,
            n=0,
            model=self.name,
            gates=name,
            weights=weights,
            selector=selector,
            policy=policy,
            density=density,
            cell=cell | about | {"dtype": self.dtype},
            **values,
        )


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


def load_eval_model(
    model: str,
    *,
    gates: Sequence[Gates] = (),
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
        gates: folders of gates to load with it.
        device: where to load it; the meta device reads the config alone and gives a model without weights.
        dtype: of the model, see `choose_dtype`.
        impl: implementation of the sparse attention.
        context: longest context that will be asked for.
        name: what results call it; by default the last part of ``model``.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ValueError: no such model or one that is not whole, gates of another model, or a context longer than the
            model's.
    """
    config = read_config(model, trust_remote_code=trust_remote_code)
    longest = getattr(config.get_text_config(), "max_position_embeddings", context)
    if context > longest:
        raise ValueError(f"contexts must be at most the model's {longest} tokens, got {context}")
    tokenizer = read_tokenizer(model, trust_remote_code=trust_remote_code)
    weights = getattr(torch, choose_dtype(dtype, device))
    loaded = read_model(model, dtype=weights, device=device, config=config, trust_remote_code=trust_remote_code)
    return EvalModel(loaded, tokenizer, name=name or Path(model).name, gates=gates, impl=impl)
