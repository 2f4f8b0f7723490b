"""How a layer of vLLM rotates its queries and keys: by the tables of its own module, which it is watched to use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seerattn.gate.rope import Pairing
from seerattn.selection.selector import RotaryTables

# Of the largest number: what rounding the rotated vectors and the tables can leave, 8 times over.
_ROUNDINGS = 16
_WATCHED_TOKENS = 16

# A call of a rotary module: the module, queries and keys before it, and behind it, each ``[tokens, heads * D]``.
Call = tuple[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotary module of a layer.

    Attributes:
        module: has ``cos_sin_cache [positions, width]``, the cosines and then the sines of all pairs. vLLM may cast it
            to another dtype at any time.
        width: leading channels of a head that are rotated.
        interleaved: whether channel ``2 i`` is rotated with ``2 i + 1``; otherwise ``i`` with ``i + width / 2``.
    """

    module: nn.Module
    width: int
    interleaved: bool

    def tables(self, tokens: int, device: torch.device) -> RotaryTables:
        """Tables of the positions ``0 .. tokens``."""
        cos, sin = self.module.cos_sin_cache[:tokens].to(device)[None].chunk(2, dim=-1)
        return RotaryTables(cos, sin, self.width, self.interleaved)

    def pairing(self) -> Pairing:
        """The pairs, for a gate."""
        return Pairing(self.width, self.interleaved)

    def frequencies(self, head_dim: int) -> Tensor:
        """Frequencies of all pairs of a head, fp32 ``[head_dim / 2]``, 0 where nothing rotates.

        They are read off the module's own table, whatever scaling made it: made again, as that of a model in bf16 is
        rounded to 8 bits.
        """
        with torch.device("cpu"):
            table = self.module._compute_cos_sin_cache().double().cpu()
        return F.pad(frequencies_of(table), (0, (head_dim - self.width) // 2))


def frequencies_of(table: Tensor) -> Tensor:
    """Rotation frequencies, fp32, of tables ``[positions, width]`` of cosines and sines, scaled by anything.

    The angle at position 1 is the frequency, to the rounding of the table. At 2, 4, 8, ... it is known but for whole
    turns, which the last estimate tells, and its error is divided by the position.
    """
    cos, sin = table.chunk(2, dim=-1)
    angle = torch.atan2(sin, cos)
    found, position = angle[1], 2
    while position < len(table):
        turns = torch.round((found * position - angle[position]) / (2 * torch.pi))
        found, position = (angle[position] + 2 * torch.pi * turns) / position, 2 * position
    return found.float()


def unrotate(tables: RotaryTables) -> Callable[[Tensor, int], Tensor]:
    """See `AttentionContext.unrotate`."""
    if tables.cos is None:
        return lambda x, start: x.float()
    pairs = tables.width // 2
    first, second = slice(0, pairs), slice(pairs, tables.width)
    if tables.interleaved:
        first, second = slice(0, tables.width, 2), slice(1, tables.width, 2)

    def undo(x: Tensor, start: int) -> Tensor:
        end = start + x.shape[2]
        cos, sin = (t[:, None, start:end].float() for t in (tables.cos, tables.sin))
        # The division takes back YaRN's scale of the tables, and their rounding.
        norm = cos.square() + sin.square()
        x = x.float()
        out = x.clone()
        out[..., first] = (x[..., first] * cos + x[..., second] * sin) / norm
        out[..., second] = (x[..., second] * cos - x[..., first] * sin) / norm
        return out

    return undo


def prove_rotation(
    parent: nn.Module, name: str, config: Any, dtype: torch.dtype, attended: list[tuple[Tensor, Tensor]]
) -> Rotation | None:
    """Runs the module around an attention layer on a few tokens, and sees how it rotates.

    Args:
        parent: holds the attention layer; its forward takes ``positions`` and ``hidden_states``.
        name: of the attention layer.
        config: vLLM's whole one.
        dtype: of the model.
        attended: to which the attention layer adds the queries and keys of every call meanwhile.

    Returns:
        The rotation, or None where the layer does not rotate.

    Raises:
        ValueError: it rotates in a way that cannot be undone, or cannot be watched.
    """
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

    text = config.model_config.hf_text_config
    kind = str((getattr(text, "rope_parameters", None) or {}).get("rope_type", "default"))
    modules = [module for module in parent.modules() if isinstance(module, RotaryEmbeddingBase)]
    if kind == "longrope" or "dynamic" in kind or any(isinstance(module, MRotaryEmbedding) for module in modules):
        raise ValueError(
            f"gates in vLLM need a rotation that depends on the position of a token alone, got {kind} in {name}; serve "
            "this model without gates"
        )
    if not modules and getattr(text, "rope_parameters", None):
        raise ValueError(
            f"an attention layer must have its rotary module beside it, got none beside {name}; serve this model "
            "without gates"
        )
    device = next(parent.parameters()).device
    last = config.model_config.max_model_len - 1
    positions = torch.linspace(0, last, _WATCHED_TOKENS, device=device).long()
    noise = torch.randn(_WATCHED_TOKENS, text.hidden_size, generator=torch.Generator().manual_seed(0))
    calls: list[Call] = []
    try:
        with torch.no_grad(), set_forward_context(None, config), _watching(modules, calls):
            parent(positions=positions, hidden_states=noise.to(device, dtype))
    except TypeError as error:
        raise ValueError(
            f"the module around {name} must take positions and hidden_states, got {type(parent).__name__}, which says "
            f"{error}; serve this model without gates"
        ) from error
    if not attended:
        raise ValueError(
            f"{name} must be reached by the module around it, got {type(parent).__name__}, where it is not"
        )
    if not calls:
        return None
    module, before, behind = calls[-1]
    rotation = Rotation(module, module.rotary_dim, not module.is_neox_style)
    tables = rotation.tables(last + 1, device)
    here = RotaryTables(tables.cos[:, positions], tables.sin[:, positions], rotation.width, rotation.interleaved)
    for given, turned, reached in zip(before, behind, attended[-1]):
        given, turned = (x.view(_WATCHED_TOKENS, -1, module.head_size) for x in (given, turned))
        error = (unrotate(here)(turned.transpose(0, 1)[None], 0)[0].transpose(0, 1) - given.float()).abs().max()
        bound = _ROUNDINGS * torch.finfo(dtype).eps * given.abs().max()
        if len(calls) > 1 or not torch.equal(turned, reached.view_as(turned)) or error > bound:
            raise ValueError(
                f"queries and keys must go to attention as their rotary module leaves them, and it must rotate by its "
                f"tables, got {type(module).__name__} in {name}, which does otherwise; serve this model without gates"
            )
    return rotation


@contextmanager
def _watching(modules: list[nn.Module], calls: list[Call]) -> Iterator[None]:
    """Notes what rotary modules, which may work in place, take and give."""
    taken: list[tuple[Tensor, ...]] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        vectors = [*args[1:3], *(kwargs[name] for name in ("query", "key") if name in kwargs)]
        taken.append(tuple(x.clone() for x in vectors))

    def behind(module: nn.Module, args: tuple, given: tuple) -> None:
        calls.append((module, taken.pop(), tuple(x.clone() for x in given)))

    hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    hooks += [module.register_forward_hook(behind) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
