"""Attention backends of vLLM by the names that it has for them, each made when it is looked up.

Two of them can have gates: that of CPUs and FlashAttention. All others are vLLM's own classes, which refuse to be made
where gates are asked for: vLLM would run dense and nobody would know.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from seerattn.vllm.options import current_options

GATED = {"CPU_ATTN": "seerattn.vllm.cpu", "FLASH_ATTN": "seerattn.vllm.cuda"}


def __getattr__(name: str) -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if name not in AttentionBackendEnum.__members__:
        raise AttributeError(f"module 'seerattn.vllm.backends' has no attribute {name!r}")
    return _backend(name, AttentionBackendEnum[name].value)


@cache
def _backend(name: str, path: str) -> type:
    if name in GATED:
        return import_module(GATED[name]).Backend
    module, _, attribute = path.rpartition(".")
    stock = getattr(import_module(module), attribute)
    impl_of = stock.get_impl_cls

    def get_impl_cls() -> type:
        if current_options() is not None:
            raise ValueError(
                f"the attention backend must be {' or '.join(GATED)} where gates are asked for, got {name}; choose one "
                "with --attention-backend, or leave the gates out of --additional-config"
            )
        return impl_of()

    stock.get_impl_cls = staticmethod(get_impl_cls)
    return stock
