"""seerattn: learned block-sparse attention for the long-context language model you already have.

The names below load what they need when they are first used: importing the package touches no device, no Triton and
no transformers. Gates are a PEFT adapter; importing the package also arranges that PEFT knows them.
"""

from __future__ import annotations

import importlib
from typing import Any

from seerattn import _peft_hook

__version__ = "0.2.0"

_HOME = {
    "attach": "seerattn.hf.attach",
    "detach": "seerattn.hf.attach",
    "set_policy": "seerattn.hf.attach",
    "policy": "seerattn.hf.state",
    "context_parallel": "seerattn.hf.context_parallel",
    "decode_graphs": "seerattn.hf.decode_graph",
    "record_density": "seerattn.hf.meters",
    "DensityMeter": "seerattn.selection.density_meter",
    "SeerConfig": "seerattn.hf.config",
    "load_official_gates": "seerattn.hf.official",
    "AttnGate": "seerattn.gate",
    "AttnGateConfig": "seerattn.gate",
    "AttentionContext": "seerattn.selection",
    "BlockIndices": "seerattn.selection",
    "DecodeBlocks": "seerattn.selection",
    "DecodeSelector": "seerattn.selection",
    "GateDecoder": "seerattn.gate_decode",
    "GateSelector": "seerattn.gate_selector",
    "Selector": "seerattn.selection",
    "Policy": "seerattn.selection",
    "HeadBudgets": "seerattn.selection",
    "KeepAll": "seerattn.selection",
    "TopK": "seerattn.selection",
    "TopP": "seerattn.selection",
    "Threshold": "seerattn.selection",
    "TokenBudget": "seerattn.selection",
    "policy_from_dict": "seerattn.selection",
    "block_sparse_attention": "seerattn.ops.block_sparse_attention",
    "attention_map": "seerattn.ops.attention_map",
    "MapForm": "seerattn.selection.map_form",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'seerattn' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


_peft_hook.install()
