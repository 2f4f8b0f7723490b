"""Which implementation of an op runs: the one place that knows what `impl="auto"` means.

An implementation is a module. It is imported when it is first needed, so nothing here needs Triton or a GPU. Beside the
function of the op it has ``refusal``, which takes the arguments of a call and says in a sentence why it cannot serve
it, or None; the reference serves everything and has none.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

# In the order in which "auto" tries them.
IMPLS: dict[str, dict[str, str]] = {
    "block_sparse_attention": {
        "gluon": "seerattn.ops.block_sparse_attention.gluon_fwd",
        "triton": "seerattn.ops.block_sparse_attention.triton_fwd",
        "flash4": "seerattn.ops.block_sparse_attention.flash4",
        "reference": "seerattn.ops.block_sparse_attention.reference",
    },
    "paged_attention": {
        "triton": "seerattn.ops.paged_attention.triton_fwd",
        "reference": "seerattn.ops.paged_attention.reference",
    },
    "decode_attention": {
        "triton": "seerattn.ops.decode_attention.triton_split",
        "reference": "seerattn.ops.decode_attention.reference",
    },
    "attention_map": {
        "triton": "seerattn.ops.attention_map.triton_fwd",
        "reference": "seerattn.ops.attention_map.reference",
    },
    # The reference of these is torch modules, which their caller hands over: see `implementation`.
    "gate_scores": {"triton": "seerattn.ops.gate_scores.triton_select"},
    "pool_windows": {"triton": "seerattn.ops.gate_scores.triton_pool"},
    "gate_query": {"triton": "seerattn.ops.gate_query.triton_one"},
    "decode_select": {"triton": "seerattn.ops.decode_select.triton_one"},
}

# Not chosen by "auto": betas of pinned versions, which compile for 4 to 8 s at the first call of every form.
ON_REQUEST = ("flash4",)


def check_impl(op: str, impl: str) -> None:
    """Refuses a name that no implementation of ``op`` has."""
    if impl not in ("auto", *_names(op)):
        raise ValueError(f"impl must be one of {', '.join(('auto', *_names(op)))} for {op}, got {impl!r}")


def implementation(
    op: str, impl: str, device: torch.device, *args: Any, reference: ModuleType | None = None, **kwargs: Any
) -> ModuleType:
    """The module that serves a call of ``op`` with these arguments.

    Args:
        op: name of the op.
        impl: "auto" or the name of an implementation.
        device: where the call runs.
        args: of the call.
        reference: the caller's own, of an op that has none here.
        kwargs: of the call.

    Raises:
        ValueError: an explicit ``impl`` that does not exist or cannot run; nothing is substituted for it.
    """
    check_impl(op, impl)
    if impl == "auto":
        candidates = (_module(op, name, reference) for name in _available(op, device))
        return next(m for m in candidates if not hasattr(m, "refusal") or m.refusal(*args, **kwargs) is None)
    reason = refusal(op, impl, device, *args, **kwargs)
    if reason is not None:
        raise ValueError(f"impl={impl!r} cannot run this {op}: {reason}; use another impl, or 'auto'")
    return _module(op, impl, reference)


def refusal(op: str, impl: str, device: torch.device, *args: Any, **kwargs: Any) -> str | None:
    """Why one implementation cannot serve a call of ``op``, in a sentence; None if it can."""
    reason = _missing(impl, device)
    if reason is not None or impl == "reference":
        return reason
    module = _module(op, impl, None)
    return module.refusal(*args, **kwargs)


def preferred(op: str, impl: str, device: torch.device) -> str:
    """The name behind ``impl`` on a device, for those who must name what they measure."""
    check_impl(op, impl)
    return next(_available(op, device)) if impl == "auto" else impl


@functools.cache
def _names(op: str) -> tuple[str, ...]:
    """Implementations of an op in their order; each has a reference, here or with its caller."""
    return tuple(dict.fromkeys((*IMPLS[op], "reference")))


def _module(op: str, impl: str, reference: ModuleType | None) -> ModuleType:
    return reference if reference is not None and impl == "reference" else _imported(IMPLS[op][impl])


# Layers ask one after the other, and each answer takes microseconds.
_imported = functools.cache(import_module)


def _available(op: str, device: torch.device) -> Iterator[str]:
    """Implementations that "auto" may choose on a device; Triton's interpreter is for tests and never chosen."""
    for name in _names(op):
        if name in ON_REQUEST:
            continue
        if name == "reference" or (device.type == "cuda" and _missing(name, device) is None):
            yield name


def _missing(impl: str, device: torch.device) -> str | None:
    """What an implementation needs and the machine lacks, as a sentence."""
    if impl == "reference":
        return None
    return _lacking(impl, device, impl == "triton" and os.environ.get("TRITON_INTERPRET") == "1")


@functools.cache
def _lacking(impl: str, device: torch.device, interpreted: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda" and not interpreted:
        return f"it needs a CUDA device, got {device}"
    if impl == "gluon":
        import triton

        if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
            return f"it is written in the Gluon of Triton 3.6, got Triton {triton.__version__}"
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) != (9, 0) or torch.version.hip is not None:
            return f"it is written for compute capability 9.0 (Hopper), got {major}.{minor}"
    if impl == "flash4" and importlib.util.find_spec("flash_attn") is None:
        return "flash-attn-4 is not installed (pip install 'seerattn[flash4]')"
    return None
