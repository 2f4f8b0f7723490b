"""What all offline searches share: which model a plan is of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from seerattn.hf.loading import read_config
from seerattn.methods.head_rules import describe_model
from seerattn.results.environment import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def describe(config: PreTrainedConfig) -> dict[str, Any]:
    """What plans keep of a model, given its configuration; the weights only where they lie in a folder."""
    folder = config._name_or_path
    weights = fingerprint(folder) if folder and Path(folder).is_dir() else None
    return describe_model(config.get_text_config(), weights)


def describe_named(model: str, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """`describe` of a folder or the name of a model on the Hub, without loading its weights.

    Raises:
        ValueError: there is no such model.
    """
    return describe(read_config(model, trust_remote_code=trust_remote_code))
