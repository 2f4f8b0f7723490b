"""What a user asks for: ``--additional-config '{"seerattn": {"gates": "FOLDER", "density": 0.2}}'``."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from seerattn.gate_files import GateFolder
from seerattn.options import check_options, option, read_options
from seerattn.selection.budgets import shares_density
from seerattn.selection.decode_policy import check_decode_policy
from seerattn.selection.policies import KeepAll, Policy, TokenBudget, TopK, policy_from_dict
from seerattn.texts import short

# Under vLLM's own, whose handlers show it.
logger = logging.getLogger("vllm.seerattn")

NAME = "seerattn"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the plug-in.

    Attributes:
        gates: a folder of saved gates.
        density: share of the causal blocks to compute, in place of that of the policy.
        impl: "auto" reads prompts densely that are too short to gain; "sparse" all of them sparsely.
        decode_tokens: keys that a decoded token reads at most, in place of the folder's policy for them.
        log: whether the densities of every request are told.
        policy: in place of that of the folder.
        decode_policy: the same of decoded tokens; None decodes densely, "saved" is that of the folder.
    """

    gates: str = option(help="A folder of saved gates.")
    density: float | None = option(None, help="Share of the causal blocks to compute.", above=0, high=1)
    impl: Literal["auto", "sparse"] = option("auto", help="Whether short prompts are read densely.")
    decode_tokens: int | None = option(None, help="Keys that a decoded token reads at most.", low=1)
    log: bool = option(False, help="Tell the densities of every request.")
    policy: Policy | None = None
    decode_policy: Policy | Literal["saved"] | None = "saved"

    def __post_init__(self) -> None:
        check_options(self)
        if self.decode_tokens is not None and self.decode_policy != "saved":
            raise ValueError(
                f"decode_tokens must not come with a decode_policy, got {self.decode_tokens} and "
                f"{self.decode_policy}; name one of them"
            )


def read(additional_config: Any) -> Options | None:
    """The options among those that vLLM hands on to plug-ins, or None where there are none.

    Raises:
        ValueError: one is unknown, missing, or of another kind.
    """
    values = additional_config.get(NAME) if isinstance(additional_config, Mapping) else None
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise ValueError(f"{NAME} in additional_config must be options by name, got {short(values)}")
    own = {name: value for name, value in values.items() if name not in ("policy", "decode_policy")}
    policies = {name: value for name, value in values.items() if name not in own}
    # A policy that is named as null is dense decoding; the one of the folder is meant where none is named.
    policies = {name: None if value is None else policy_from_dict(value) for name, value in policies.items()}
    return read_options(Options, own, where=f"{NAME} in additional_config", **policies)


def current_options() -> Options | None:
    """Those of the engine that is being built."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    return None if config is None else read(config.additional_config)


def chosen_policy(options: Options, folder: GateFolder, *, shares_pages: bool) -> Policy:
    """The policy that prompts run by.

    Args:
        options: of the user.
        folder: of the gates.
        shares_pages: whether requests read pages of equal beginnings of each other (prefix caching). What a policy
            makes of a beginning must then not depend on what follows it.

    Raises:
        ValueError: there is none, or one that a prompt in chunks cannot have.
    """
    policy = options.policy or folder.policy
    if policy is None and options.density is None and decode_policy(options, folder) is not None:
        # A dense prompt and a sparse answer.
        policy = KeepAll()
    if options.density is not None:
        if policy is not None and not isinstance(policy, TopK):
            raise ValueError(
                f"density must come with the policy TopK, got {type(policy).__name__}; leave the density out, or name "
                "a TopK as policy"
            )
        policy = replace(policy or TopK(density=1.0, rule="row_share"), density=options.density)
    if policy is None:
        raise ValueError("a density or a policy must be given where the folder of gates names none, got neither")
    if policy.last_rows_dense:
        raise ValueError(
            "last_rows_dense must be 0 in vLLM, where every chunk of a prompt has last rows, got "
            f"{policy.last_rows_dense}"
        )
    if policy.needs_length and shares_pages:
        if options.policy is not None:
            raise ValueError(
                f"a policy must choose for a beginning whatever follows it where requests share pages, got {policy}; "
                "use TopK with rule 'row_share', or --no-enable-prefix-caching"
            )
        _tell_of_the_rule()
        policy = replace(policy, rule="row_share")
    if folder.budgets is not None and shares_density(policy):
        folder.budgets.check(policy.density)
    return policy


@functools.cache
def _tell_of_the_rule() -> None:
    logger.warning(
        "gates keep the same share of the blocks of every row (rule 'row_share') in place of the same number "
        "('same_k'), which depends on the length of the prompt, as requests share pages of equal beginnings; "
        "--no-enable-prefix-caching keeps the rule of the folder"
    )


def decode_policy(options: Options, folder: GateFolder) -> Policy | None:
    """The policy that tokens are decoded by; None is vLLM's own dense decoding.

    Raises:
        ValueError: one that means nothing for a single token.
    """
    policy = folder.decode_policy if options.decode_policy == "saved" else options.decode_policy
    if options.decode_tokens is not None:
        policy = TokenBudget(tokens=options.decode_tokens)
    check_decode_policy(policy)
    return policy
