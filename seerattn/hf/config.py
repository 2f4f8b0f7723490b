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
from seerattn.hf.checkpoint import CONFIG, WEIGHTS, check_weights, read_config
from seerattn.hf.identity import check_sizes
from seerattn.saving import write_whole
from seerattn.selection.budgets import HeadBudgets, shares_density
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
        budgets: `HeadBudgets.to_dict`, by which a density is shared among heads; None shares it equally.
        layers: indices of the decoder layers with a gate; None is every full-attention layer.
        base_model: sizes and RoPE of the model that the gates belong to, filled in when they are attached.
        target_modules: names of the gated modules, filled in when they are attached.
    """

    gate: dict = field(default_factory=lambda: AttnGateConfig().to_dict())
    policy: dict | None = None
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
        for name in ("gate", "policy", "budgets", "base_model"):
            value = getattr(self, name)
            if not isinstance(value, dict) and (value is not None or name == "gate"):
                raise ValueError(f"{name} of gates must be an object of JSON, got {str(value)[:40]!r}")
        if self.auto_mapping is not None:
            # PEFT would import the module that it names.
            raise ValueError(f"auto_mapping of gates must be null, got {str(self.auto_mapping)[:80]}")
        for name, kind in (("layers", int), ("target_modules", str)):
            values = getattr(self, name)
            if values is not None and (
                not isinstance(values, (list, set, tuple)) or any(type(value) is not kind for value in values)
            ):
                raise ValueError(f"{name} of gates must be a list of {kind.__name__} or null, got {str(values)[:40]!r}")
        if self.layers is not None and (len(set(self.layers)) < len(self.layers) or min(self.layers, default=0) < 0):
            raise ValueError(f"layers of gates must differ and be 0 or more, got {str(self.layers)[:40]}")
        if not isinstance(self.base_model_name_or_path, (str, type(None))):
            got = str(self.base_model_name_or_path)[:40]
            raise ValueError(f"base_model_name_or_path of gates must be a name or null, got {got}")
        AttnGateConfig.from_dict(self.gate)
        policy = None if self.policy is None else policy_from_dict(self.policy)
        if self.base_model is not None:
            check_sizes(self.base_model, self.layers)
        budgets = self.head_budgets(self.base_model, self.layers)
        if budgets is not None and shares_density(policy):
            budgets.check(policy.density)

    def head_budgets(self, base: Mapping[str, Any] | None, layers: Sequence[int] | None) -> HeadBudgets | None:
        """The budgets, which must be of these gates.

        Args:
            base: sizes of their model, None where they are not known yet.
            layers: with a gate, None where they are not known yet.

        Raises:
            ValueError: they are none, or those of other blocks, another target, or other layers and heads.
        """
        if self.budgets is None:
            return None
        budgets, form = HeadBudgets.from_dict(self.budgets), AttnGateConfig.from_dict(self.gate)
        here, there = (f"blocks of {x.block_q} x {x.block_k} tokens" for x in (form, budgets))
        if here == there:
            here, there = f"the target {form.target}", f"the target {budgets.target}"
        if here == there and base is not None and layers is not None:
            sizes = base["num_attention_heads" if form.share == "query_head" else "num_key_value_heads"]
            heads = sizes if isinstance(sizes, list) else [sizes] * len(layers)
            found = {layer: count for layer, count in enumerate(budgets.heads) if count}
            here, there = f"heads by layer {dict(zip(sorted(layers), heads))}", f"heads by layer {found}"
        if here != there:
            raise ValueError(
                f"budgets must be those of the gates, with {here:.200}, got budgets for {there:.200}; make them with "
                "seerattn calibrate --budgets"
            )
        return budgets

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
    """Checks the weights of a gate folder against its config; see `check_weights`, whose result is returned."""
    if config.base_model is None:
        raise ValueError(f"{folder / CONFIG} must hold base_model, the sizes of the gates' model, got none")
    modules = check_weights(folder, AttnGateConfig.from_dict(config.gate), config.base_model)
    if config.layers is not None and sorted(config.layers) != list(modules):
        raise ValueError(f"{folder / WEIGHTS} must hold gates of layers {config.layers}, got {list(modules)}")
    check_sizes(config.base_model, list(modules))
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
