"""The one way in which models are read by folder or name on the Hub: what is not whole is refused in a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_SHOWN = 3  # weights that an error names
_WHY = 240  # characters of a foreign error that are passed on


def read_config(name: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model.

    Args:
        name: a folder or the name of a model on the Hub.
        trust_remote_code: whether code that comes with the model may run. Nobody is asked in the terminal.

    Raises:
        ValueError: there is no such model, or it cannot be read.
    """
    from transformers import AutoConfig

    with _reading(f"a folder or the name of a causal language model, got {name}", name):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def read_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; arguments and errors are those of `read_config`."""
    from transformers import AutoTokenizer

    with _reading(f"one with a tokenizer, got {name}", name):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


def read_model(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    config: PreTrainedConfig | None = None,
    trust_remote_code: bool = False,
    kind: type[PreTrainedModel] | None = None,
    spread: bool = False,
) -> PreTrainedModel:
    """A causal language model with all of its weights; sliding windows of SDPA run in bands (`seerattn.hf.banded`).

    Args:
        name: a folder or the name of a model on the Hub.
        dtype: of the weights.
        device: where to; the meta device gives the model of the config without reading weights.
        config: its configuration, if that is known already.
        trust_remote_code: see `read_config`.
        kind: class of the model, where it is not for the config to say.
        spread: let accelerate deal the layers out to all accelerators that there are, and what they have no room for to
            the memory of the host; ``device`` is not asked.

    Raises:
        ValueError: there is no such model, it cannot be read, or its weights are not those that its config asks for.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    if config is None and kind is None:
        config = read_config(name, trust_remote_code=trust_remote_code)
    with _reading(f"a causal language model that can be loaded, got {name}", name):
        if device.type == "meta":
            with init_empty_weights():
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            # Under the context every registered parameter becomes one of its own.
            model.tie_weights()
            return model
        options: dict[str, Any] = {} if kind is not None else {"trust_remote_code": trust_remote_code}
        options |= {"device_map": "auto"} if spread else {}
        model, report = (kind or AutoModelForCausalLM).from_pretrained(
            name,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            # Told by us, by name.
            ignore_mismatched_sizes=True,
            **options,
        )
    _check_weights(name, model, report)
    _skip_windows(model)
    if spread:
        return model
    with _reading(f"a model that device {device} has room for, got {name}", name):
        return model.to(device)


def _skip_windows(model: PreTrainedModel) -> None:
    """Lets windows that transformers leaves to SDPA run in bands."""
    from seerattn.hf.banded import BANDED
    from seerattn.hf.placement import set_implementation, text_implementation

    config = model.config.get_text_config()
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    has_windows = window is not None if types is None else "sliding_attention" in types
    if has_windows and text_implementation(model) == "sdpa":
        set_implementation(model, BANDED)


def _check_weights(name: str, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Refuses weights that would be left at random or left out; those that are tied or may be missing are not told."""
    if report["missing_keys"]:
        raise ValueError(
            f"model must hold all weights of its config, got {name} without {_some(report['missing_keys'])}, which "
            "would be random; mend its config.json or its weights"
        )
    if report["mismatched_keys"]:
        key, found, wanted = min(report["mismatched_keys"])
        raise ValueError(
            f"model must hold weights of the sizes in its config, got {name} with {len(report['mismatched_keys'])} "
            f"others such as {key}, {list(found)} in place of {list(wanted)}; mend its config.json or its weights"
        )
    dropped = _dropped(model, report["unexpected_keys"])
    if dropped:
        raise ValueError(
            f"model must hold weights of its config alone, got {name} with {_some(dropped)}, which would be left out; "
            "mend its config.json or its weights"
        )
    if report["error_msgs"]:
        raise ValueError(f"model must be whole, got {name}: {_short(report['error_msgs'][0])}")


def _dropped(model: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """Unexpected weights without which the layers of the model compute something else than those that were saved.

    They are of one more layer or expert, or of a module of a layer that the model has: a bias, a norm. Other parts of a
    checkpoint, such as a vision tower or buffers of old versions, are not missed.
    """
    alike = {_without_numbers(key) for key, _ in model.named_parameters()}
    modules = dict(model.named_modules())
    # Layers that predict further tokens follow the others in a checkpoint, and only some inference servers run them.
    text = model.config.get_text_config()
    layers, further = getattr(text, "num_hidden_layers", 0), getattr(text, "num_nextn_predict_layers", None) or 0

    def is_missed(key: str) -> bool:
        numbers = [int(part) for part in key.split(".") if part.isdecimal()]
        if not numbers or layers <= numbers[0] < layers + further:
            return False
        if _without_numbers(key) in alike:
            return True
        owner, _, leaf = key.rpartition(".")
        if owner in modules:
            return leaf == "bias" and isinstance(getattr(modules[owner], "weight", None), nn.Parameter)
        return leaf == "weight" and owner.rpartition(".")[0] in modules

    return [key for key in unexpected if is_missed(key)]


def _without_numbers(key: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", key)


def _some(keys: Iterable[str]) -> str:
    names = sorted(keys)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


@contextmanager
def _reading(contract: str, name: str) -> Iterator[None]:
    """Tells what goes wrong inside the ``with`` as a fault of the model."""
    try:
        yield
    # Files of other people through readers of other people: a damaged one has been seen to raise KeyError, TypeError,
    # AttributeError, ZeroDivisionError, RecursionError, ImportError, UnpicklingError and more.
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model must run with the code in transformers, got {name}, which brings code of its own; read that "
                "code, then allow it with --trust-remote-code"
            ) from error
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"model must be {contract}: {kind}{_short(str(error))}") from error


def _short(text: str) -> str:
    line = " ".join(text.split()) or "no reason given"
    return line if len(line) <= _WHY else line[:_WHY] + "..."
