"""`SeerConfig`: what ``adapter_config.json`` says of a set of gates. Importing it makes the method known to PEFT."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from peft import PeftConfig, PeftType

from seerattn.gate.config import AttnGateConfig
from seerattn.gate_files import CONFIG, WEIGHTS, check_gates, check_layers, check_sizes, read_budgets, read_config
from seerattn.saving import write_whole
from seerattn.selection.budgets import HeadBudgets, shares_density
from seerattn.selection.decode_policy import check_decode_policy
from seerattn.selection.policies import policy_from_dict


def _register_type(name: str) -> None:
    # PeftType is a closed enumeration and register_peft_method refuses names that it lacks.
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_map_[name] = member
    PeftType._member_names_.append(name)
    PeftType._value2member_map_[name] = member
    # From Python 3.12 on members are plain class attributes; the enum's own __setattr__ would refuse this one.
    type.__setattr__(PeftType, name, member)


if "SEER" not in PeftType._member_map_:
    _register_type("SEER")


@dataclass
class SeerConfig(PeftConfig):
    """Configuration of the gates of a model, saved as ``adapter_config.json``.

    Attributes:
        gate: form of the gates, `AttnGateConfig.to_dict`.
        policy: `Policy.to_dict` of the policy to start with; None runs dense until `set_policy`.
        decode_policy: the same of tokens that are decoded; None decodes dense.
        budgets: `HeadBudgets.to_dict`, by which a density is shared among heads; None shares it equally.
        layers: indices of the decoder layers with a gate; None is every full-attention layer.
        base_model: sizes and RoPE of the model that the gates belong to, filled in when they are attached.
        target_modules: names of the gated modules, filled in when they are attached.
    """

    gate: dict = field(default_factory=lambda: AttnGateConfig().to_dict())
    policy: dict | None = None
    decode_policy: dict | None = None
    budgets: dict | None = None
    layers: list[int] | None = None
    base_model: dict | None = None
    target_modules: list[str] | None = None
    # Whether what is not ours keeps its requires_grad; PEFT's and transformers' own functions freeze the model.
    keeps_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        # Without a task type, PeftModel does not go through the tuner's forward.
        self.task_type = self.task_type or "CAUSAL_LM"
        super().__post_init__()
        self.peft_type = PeftType("SEER")
        for name in ("gate", "policy", "decode_policy", "budgets", "base_model"):
            value = getattr(self, name)
            if not isinstance(value, dict) and (value is not None or name == "gate"):
                raise ValueError(f"{name} of gates must be an object of JSON, got {str(value)[:40]!r}")
        if self.auto_mapping is not None:
            # PEFT would import the module that it names.
            raise ValueError(f"auto_mapping of gates must be null, got {str(self.auto_mapping)[:80]}")
        check_layers(self.layers)
        names = self.target_modules
        if names is not None and (
            not isinstance(names, (list, set, tuple)) or any(type(name) is not str for name in names)
        ):
            raise ValueError(f"target_modules of gates must be a list of str or null, got {str(names)[:40]!r}")
        if not isinstance(self.base_model_name_or_path, (str, type(None))):
            got = str(self.base_model_name_or_path)[:40]
            raise ValueError(f"base_model_name_or_path of gates must be a name or null, got {got}")
        AttnGateConfig.from_dict(self.gate)
        policy = None if self.policy is None else policy_from_dict(self.policy)
        check_decode_policy(None if self.decode_policy is None else policy_from_dict(self.decode_policy))
        if self.base_model is not None:
            check_sizes(self.base_model, self.layers)
        budgets = self.head_budgets(self.base_model, self.layers)
        if budgets is not None and shares_density(policy):
            budgets.check(policy.density)

    def head_budgets(self, base: Mapping[str, Any] | None, layers: Sequence[int] | None) -> HeadBudgets | None:
        """The budgets, which must be of these gates; see `seerattn.gate_files.read_budgets`."""
        return read_budgets(self.budgets, AttnGateConfig.from_dict(self.gate), base, layers)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SeerConfig:
        """Reads the config of a folder or Hub repository, which must hold whole gates.

        Raises:
            ValueError: the gates are missing, truncated, pickled, not finite, or beside tensors of something else.
        """
        folder = gate_folder(pretrained_model_name_or_path, subfolder, **kwargs)
        config = super().from_pretrained(str(folder))
        check_folder(folder, config)
        if config.base_model_name_or_path is not None:
            config.base_model_name_or_path = _beside(folder, config.base_model_name_or_path)
        return config


def check_folder(folder: Path, config: SeerConfig) -> dict[int, str]:
    """Checks the weights of a gate folder against its config; see `check_gates`, whose result is returned."""
    modules = check_gates(folder, AttnGateConfig.from_dict(config.gate), config.base_model, config.layers)
    config.head_budgets(config.base_model, list(modules))
    return modules


def check_gate_folder(folder: Path) -> dict[str, Any]:
    """The config of a folder of whole gates, as it stands in its file.

    Raises:
        ValueError: they are not whole; see `SeerConfig.from_pretrained`.
    """
    SeerConfig.from_pretrained(str(folder))
    return read_config(folder)


def save_settings(folder: Path, **settings: Any) -> None:
    """Writes fields of a `SeerConfig` into the ``adapter_config.json`` of a folder of gates, whole or not at all.

    Raises:
        ValueError: the gates are not whole, or the settings do not fit them or each other.
    """
    values = check_gate_folder(folder) | settings
    names = {field.name for field in fields(SeerConfig)}
    check_folder(folder, SeerConfig(**{name: value for name, value in values.items() if name in names}))
    write_whole(folder / CONFIG, json.dumps(values, indent=2, sort_keys=True) + "\n")


def gate_folder(name: str | Path, subfolder: str | None = None, **download: Any) -> Path:
    """The folder of saved gates, downloaded where ``name`` is that of a repository on the Hub.

    Raises:
        ValueError: there are no gates under that name.
    """
    folder = folder_of(name, (CONFIG, WEIGHTS), subfolder, **download)
    read_config(folder)
    return folder


def folder_of(name: str | Path, files: Sequence[str], subfolder: str | None = None, **download: Any) -> Path:
    """A folder with files of gates, downloaded where ``name`` is that of a repository on the Hub.

    Raises:
        ValueError: there is neither a folder of that name nor a repository with the files.
    """
    folder = Path(name, subfolder or "")
    if folder.exists():
        return folder
    known = ("revision", "token", "cache_dir", "force_download", "local_files_only")
    options = {key: value for key, value in download.items() if key in known}
    try:
        paths = [hf_hub_download(str(name), file, subfolder=subfolder, **options) for file in files]
    except (HFValidationError, HfHubHTTPError, EntryNotFoundError, OSError) as error:
        raise ValueError(f"gates must be a folder or the name of gates on the Hub, got {name}") from error
    return Path(paths[0]).parent


def _beside(folder: Path, base: str) -> str:
    """A relative path of a base model, found from the folder of its gates where it is not found from here."""
    if os.path.exists(base) or os.path.isabs(base):
        return base
    found = next((parent / base for parent in folder.resolve().parents if (parent / base).is_dir()), None)
    return base if found is None else str(found)
