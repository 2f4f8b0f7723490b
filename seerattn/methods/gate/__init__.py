"""Learned gates as a method: a folder of gates, and a policy whose number is tuned."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from seerattn.data.text import BOOKS
from seerattn.data.windows import cut_windows, digest, token_documents
from seerattn.gate_decode import GateDecoder
from seerattn.gate_selector import GateSelector
from seerattn.methods.gate.thresholds import Calibrator, threshold_level
from seerattn.methods.method import Budget, DecoderAt, Method, SelectorAt, Selectors
from seerattn.options import option
from seerattn.selection.budgets import shares_density
from seerattn.selection.policies import Policy, Threshold, TokenBudget, TopK, TopP

if TYPE_CHECKING:
    from seerattn.gate import AttnGateConfig
    from seerattn.hf.eval_model import EvalModel, LoadedGates

GatePolicy = Literal["top_k", "equal_top_k", "row_share", "threshold", "head_thresholds", "top_p", "saved"]
CALIBRATION_WINDOWS = 2  # of each document


@dataclass(frozen=True, kw_only=True)
class Gate(Method):
    """Learned gates with a policy; the setting is the number of the policy.

    "top_k" and "row_share" are the two rules of `TopK`, which share a density among heads as the budgets of the gates
    say. "equal_top_k" gives every head the same. "threshold" is one threshold for all heads, on raw scores where gates
    normalise them, else on their softmax. "head_thresholds" is one a head, which give every head the same density on
    the calibration text, that density being the setting. "top_p" leaves out the mass that is the setting, ``1 - p``.
    "saved" is the policy that was saved with the gates, which has no setting: it runs at its own density.

    With `skip_threshold` attention skips blocks of their lists besides, see `Policy`; densities are those of the lists.
    """

    id = "gate"
    title = "Gates"
    kind = "learned"

    gates: Path = option(help="Folder of gates.")
    policy: GatePolicy = option("top_k", help="How their scores become blocks.")
    skip_threshold: float | None = option(
        None, help="Skip kept blocks that are negligible by this, as attention goes.", above=0, high=1
    )
    calibration: tuple[str, ...] = option((), help="Text that thresholds by head are read off; default: our books.")
    _calibrators: dict[int, tuple[Calibrator, str]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def default_name(self) -> str:
        return self.gates.resolve().name

    @property
    def budgets(self) -> tuple[Budget, ...]:
        return ("own",) if self.policy == "saved" else (*super().budgets, "tokens")

    @property
    def weights(self) -> Path:
        return self.gates

    @cached_property
    def form(self) -> AttnGateConfig:
        """Form of the gates, read once."""
        from seerattn.gate import AttnGateConfig
        from seerattn.hf.config import SeerConfig

        return AttnGateConfig.from_dict(SeerConfig.from_pretrained(str(self.gates)).gate)

    @property
    def block_sizes(self) -> tuple[int, int]:
        return self.form.block_q, self.form.block_k

    def check_model(self, config: Any) -> None:
        from seerattn.hf.config import check_gate_folder

        of = check_gate_folder(self.gates).get("base_model") or {}
        text = config.get_text_config()
        other = [f"{name} {of[name]}" for name in of if getattr(text, name, of[name]) not in (of[name], None)]
        if other:
            raise ValueError(
                f"gates must belong to the model, got {self.gates} of a model with {', '.join(other)}; "
                "distil gates for this one with seerattn distill"
            )

    def selectors(self, model: EvalModel | None = None, *, context: int = 0) -> Selectors:
        loaded = model.gates(self.gates)
        if self.policy == "saved":
            return self._saved(loaded)
        level = threshold_level(loaded.gates)
        shared = loaded.budgets if self.policy in ("top_k", "row_share") else None
        settings: dict[str, Any] = {"policy": self.policy}
        calibrator = None
        if self.policy == "head_thresholds":
            calibrator, settings["calibration"] = self._calibrator(model, context)
        least = 1e-3 if shared is None else shared.ladder[0]
        ends: dict[str, tuple[float, float, Literal["linear", "log"]]] = {
            "top_k": (least, 1.0, "linear"),
            "equal_top_k": (1e-3, 1.0, "linear"),
            "row_share": (least, 1.0, "linear"),
            # Normalised scores estimate logarithms of probabilities, so both are of probabilities.
            "threshold": (1.0, 1e-38, "log") if level == "softmax" else (1.0, -50.0, "linear"),
            "head_thresholds": (calibrator.least_density() if calibrator else 0.0, 1.0, "linear"),
            "top_p": (1 - 1e-4, 1e-9, "log"),
        }
        sparsest, densest, scale = ends[self.policy]
        settings |= {} if shared is None else {"budgets": shared.digest}
        skip = {} if self.skip_threshold is None else {"skip_threshold": self.skip_threshold}
        settings |= skip

        def policy_at(setting: float) -> Policy:
            if self.policy in ("top_k", "equal_top_k", "row_share"):
                return TopK(density=setting, rule="row_share" if self.policy == "row_share" else "same_k", **skip)
            if self.policy == "top_p":
                return TopP(p=1 - setting, **skip)
            if self.policy == "threshold":
                return Threshold(threshold=setting, on=level, **skip)
            return Threshold(threshold=calibrator.thresholds(setting, per_head=True), on=level, **skip)

        def at(setting: float) -> SelectorAt:
            return gate_selectors(loaded._replace(budgets=shared), policy_at(setting))

        exact = self.policy in ("top_k", "equal_top_k")
        return Selectors(at, sparsest, densest, scale, is_density=exact, settings=settings)

    def decoders(self, model: EvalModel | None = None) -> Selectors:
        gates = model.gates(self.gates).gates

        def at(tokens: float) -> DecoderAt:
            policy = TokenBudget(tokens=int(tokens))
            return lambda layer: GateDecoder(gates[layer], policy) if layer in gates else None

        return Selectors(at, sparsest=1, densest=float("inf"))

    def _saved(self, loaded: LoadedGates) -> Selectors:
        if loaded.policy is None:
            raise ValueError(
                f"gates must have a saved policy to be run with it, got {self.gates} without; "
                "make one with seerattn calibrate"
            )
        skip = loaded.policy.skip_threshold if self.skip_threshold is None else self.skip_threshold
        return fixed_selectors(loaded, replace(loaded.policy, skip_threshold=skip))

    def _calibrator(self, model: EvalModel, context: int) -> tuple[Calibrator, str]:
        """What the gates score on the calibration text at a context, and the digest of that text."""
        if context not in self._calibrators:
            gates = model.gates(self.gates).gates
            tokens, sources = CALIBRATION_WINDOWS * context, self.calibration or (str(BOOKS / "distill"),)
            documents = token_documents(sources, model.tokenizer, tokens=tokens)
            windows = cut_windows(
                documents, context=context, count=CALIBRATION_WINDOWS, bos_token_id=model.bos_token_id
            )
            calibrator = Calibrator(gates, goal="density", on=threshold_level(gates))
            model.observe(windows, calibrator.see)
            self._calibrators[context] = calibrator, digest(documents)
        return self._calibrators[context]


def gate_selectors(loaded: LoadedGates, policy: Policy) -> SelectorAt:
    """The gate of each gated layer with a policy; other layers are dense."""
    gates, budgets = loaded.gates, loaded.budgets
    return lambda layer: GateSelector(gates[layer], policy, budgets=budgets) if layer in gates else None


def fixed_selectors(loaded: LoadedGates, policy: Policy) -> Selectors:
    """Gates under one policy, which is no setting of theirs but defines them, as do budgets that share its density."""
    chosen, settings = gate_selectors(loaded, policy), policy.to_dict()
    if loaded.budgets is not None and shares_density(policy):
        settings["budgets"] = loaded.budgets.digest
    return Selectors(lambda setting: chosen, 1.0, 1.0, settings=settings)
