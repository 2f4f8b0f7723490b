"""Parts of a decoder whose many small kernels `torch.compile` fuses, while attention stays as it is.

Of a decoded token of the Llama-3.1-8B shape norms alone take 5 to 10 % on an H200, in eight kernels each. A whole
forward cannot be compiled: attention of this library is code of its own that the compiler does not see through.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

BACKEND = "inductor"


def small_parts(model: nn.Module, attention: Iterable[str]) -> list[nn.Module]:
    """What stands beside attention in the decoder layers, and norms wherever they are.

    Args:
        model: the transformers model.
        attention: names of its attention modules.
    """
    parts: dict[str, nn.Module] = {}
    for name in attention:
        layer, _, own = name.rpartition(".")
        beside = model.get_submodule(layer).named_children()
        parts |= {f"{layer}.{child}": module for child, module in beside if child != own}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{part}.") for part in parts)
        if not inside and _is_norm(module):
            parts[name] = module
    return list(parts.values())


def _is_norm(module: nn.Module) -> bool:
    sizes = [parameter.ndim for parameter in module.parameters()]
    return not any(True for _ in module.children()) and bool(sizes) and set(sizes) == {1}


@contextmanager
def compiled(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, these modules run compiled; what was compiled before stays so."""
    # torch has no public way to ask, or to take `Module.compile` back.
    own = [part for part in parts if part._compiled_call_impl is None]
    for part in own:
        part.compile(backend=BACKEND)
    try:
        yield
    finally:
        for part in own:
            part._compiled_call_impl = None
