"""Where a model computes and by which attention: devices of modules, implementations of configs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from seerattn.hf.attention import IMPLEMENTATIONS


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: the device that accelerate's hooks bring it to, or that of its weights."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):
            place = getattr(one, "execution_device", None)
            if place is not None:
                return torch.device(place)
    return next(module.parameters()).device


@contextmanager
def implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Runs ``model`` with another attention implementation."""
    before = text_implementation(model)
    set_implementation(model, name)
    try:
        yield
    finally:
        set_implementation(model, before)


def text_implementation(model: PreTrainedModel) -> str:
    """Name of the attention implementation of a model's text layers."""
    return model.config.get_text_config()._attn_implementation


def set_implementation(model: PreTrainedModel, name: str) -> None:
    """Switches the attention implementation of a model's text layers; other towers keep theirs.

    Raises:
        ValueError: the architecture does not let it be switched.
    """
    model.set_attn_implementation(_request(model.config, model.config.get_text_config(), name))
    if text_implementation(model) != name:
        raise ValueError(
            f"model must call its attention through the transformers attention interface, got {type(model).__name__}, "
            "which does not"
        )


def _request(config: PreTrainedConfig, text: PreTrainedConfig, name: str) -> str | dict | None:
    """What `set_attn_implementation` takes to switch ``text``, which lies somewhere within ``config``."""
    if config is text:
        return name
    parts = ((key, getattr(config, key, None)) for key in config.sub_configs)
    found = ((key, _request(part, text, name)) for key, part in parts if part is not None)
    return next(({key: request} for key, request in found if request is not None), None)


def dense_implementation(model: PreTrainedModel) -> str:
    """Name of the implementation that ours replaces on ``model``.

    Raises:
        ValueError: it is one that ours cannot fall back on.
    """
    current = text_implementation(model)
    for dense, ours in IMPLEMENTATIONS.items():
        if current in (dense, ours):
            return dense
    raise ValueError(
        f"attn_implementation must be one of {list(IMPLEMENTATIONS)} before attaching, got {current!r}; "
        "load the model with attn_implementation='sdpa'"
    )
