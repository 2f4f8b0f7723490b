"""Decoding by CUDA graphs: the host launches a step as a whole, not kernel by kernel.

A step takes the host longer than the GPU, and a sparse one has more to launch than a dense one. Inside of
`decode_graphs` transformers' `generate` with a static cache records a step (`seerattn.hf.fixed_step`) and repeats it.
It asks a model for a compiled forward there (`get_compiled_call`), and gets the graph instead: its loop, its sampling
and its cache stay its own. What a graph cannot repeat runs as it would without one, and that is said once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from seerattn.gate_decode import GateDecoder
from seerattn.hf.capturing import CAPTURE
from seerattn.hf.compiled_parts import compiled, small_parts
from seerattn.hf.decode import count_all, decode_impl
from seerattn.hf.dense_steps import is_dense
from seerattn.hf.fixed_step import FIXED, FixedStep, GateKeys
from seerattn.hf.identity import transformers_model
from seerattn.hf.mask import Unservable
from seerattn.hf.meters import density_meters
from seerattn.hf.state import Attachment, LayerState, attachment_of, check_filled, layer_states
from seerattn.selection.decode_selector import DecodeSelector
from seerattn.selection.selector import AttentionContext, RotaryTables

logger = logging.getLogger(__name__)

# What transformers passes to a forward that a step makes anew, or that changes nothing in it.
KNOWN = {"input_ids", "past_key_values", "position_ids", "attention_mask", "cache_position", "use_cache", "return_dict"}
KNOWN |= {"logits_to_keep"}


@contextmanager
def decode_graphs(model: nn.Module, *, compile: bool = False) -> Iterator[None]:
    """Inside, ``model.generate(..., cache_implementation="static")`` decodes by CUDA graphs.

    Tokens are those that decoding gives without graphs, up to the rounding of gate keys to 16 bits, which changed three
    in ten thousand entries of lists where it was measured. It serves greedy and sampled answers and any batch, also one
    that is padded on the left, of models whose layers have no window. A graph is recorded in every call of `generate`,
    at its third token. Layers without a decode policy attend to all keys by this library's kernel.

    Args:
        model: that was attached to, on a GPU.
        compile: also fuse the small kernels of norms and MLPs by `torch.compile`: a step of an 8B model takes a tenth
            less, and the first one of a process some ten seconds more. Numbers change by roundings, as there.

    Raises:
        ValueError: no model that was attached to, or one that is not on a CUDA device.
    """
    attachment, inner = attachment_of(model), transformers_model(model)
    if attachment is None:
        raise ValueError("decode_graphs needs a model that seerattn.attach returned, got one that was not attached to")
    if inner.device.type != "cuda":
        raise ValueError(f"decode_graphs needs a model on a CUDA device, got one on {inner.device}")
    if "get_compiled_call" in vars(inner):
        raise ValueError("decode_graphs must not be entered twice for one model")
    inner.get_compiled_call = lambda _=None: DecodeGraph(inner, attachment, compile=compile)
    try:
        yield
    finally:
        del inner.get_compiled_call


def fits_graphs(model: nn.Module) -> bool:
    """Whether `decode_graphs` would record the steps of a model as it is now."""
    attachment, inner = attachment_of(model), transformers_model(model)
    if attachment is None or {x.device.type for x in inner.parameters()} != {"cuda"}:
        return False
    cache = StaticCache(config=inner.config, max_cache_len=1)
    decoders = [one for one in attachment.now().decoders.values() if one is not None]
    return (
        len({x.device for x in inner.parameters()}) == 1
        and len(cache.layers) == len(attachment.layers)
        and _has_no_windows(cache)
        and all(_is_served(one, inner.device, 1) for one in decoders)
    )


def _has_no_windows(cache: Cache) -> bool:
    return all(type(layer) is StaticLayer for layer in cache.layers)


def _is_served(decoder: DecodeSelector, device: torch.device, tokens: int) -> bool:
    """Whether the kernel chooses for a decoder, up to so many tokens."""
    return isinstance(decoder, GateDecoder) and decoder.serves_many(device, tokens)


class DecodeGraph:
    """The forward of the decode steps of one call of `generate`.

    Args:
        model: the transformers model.
        attachment: what was attached to it.
        records: whether steps are recorded; a CPU has no graphs and runs each.
        compile: whether norms and MLPs of a step are compiled, see `decode_graphs`.

    Attributes:
        refused: why steps run without a graph; None where they do not.
    """

    def __init__(
        self, model: PreTrainedModel, attachment: Attachment, *, records: bool = True, compile: bool = False
    ) -> None:
        self.model, self.attachment, self.records = model, attachment, records
        self._states = {state.layer: state for state in layer_states(model)}
        names = [state.found.name for state in self._states.values()]
        self._parts = small_parts(model, names) if compile else []
        self.refused: str | None = None
        self._step: FixedStep | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._tokens = 0
        # Where the keys of each sequence begin in the cache.
        self._starts: list[int] = []
        # Layers that "auto" decodes dense though something would choose.
        self._dense: list[int] = []

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        """One forward of transformers' loop: logits of ``[B, 1]`` new tokens, or a part of a prompt as it is."""
        ids = inputs.get("input_ids")
        if self.refused is not None or (self._step is None and (ids is None or ids.shape[1] != 1)):
            return self.model(**inputs)
        try:
            if self._step is None:
                self._begin(inputs)
            return self._run(inputs)
        except Unservable as reason:
            self.refused = str(reason)
            _tell(str(reason))
            self._take_back(inputs.get("past_key_values"))
            return self.model(**inputs)

    def _begin(self, inputs: dict[str, Any]) -> None:
        """Makes room for what steps share, and the gate keys of the prompt.

        Raises:
            Unservable: a graph could not repeat this.
        """
        ids, cache = inputs["input_ids"], inputs.get("past_key_values")
        tokens = self._check(inputs, ids, cache)
        starts = _starts(inputs.get("position_ids"), inputs.get("attention_mask"), ids.shape[0], tokens)
        running, batch, device = self.attachment.now(), ids.shape[0], ids.device
        room = cache.layers[0].max_cache_len
        if self.records and decode_impl(running) == "reference":
            raise Unservable("impl must be a kernel, got 'reference'")
        keys = {}
        for index, decoder in running.decoders.items():
            if decoder is None:
                continue
            place = cache.layers[index].keys.device
            if not _is_served(decoder, place, room):
                raise Unservable(f"layer {index} chooses by what the kernel of single tokens does not have")
            found = self._states[index].found
            if running.impl == "auto" and is_dense(decoder, [room] * batch, found, place, graphs=True):
                # It is so with all tokens that there may be, and as long as there are fewer.
                self._dense.append(index)
                continue
            check_filled(decoder.gate, index)
            if decoder.finished_windows(room):
                keys[index] = GateKeys.of(decoder, starts, room, place)
        # Repeated steps write to the cache without torch's knowledge.
        self.attachment.gate_cache.doubt(cache)
        # Otherwise no hook tells the attention of layers that decode dense.
        self.attachment.decodes = True
        self._cache, self._tokens, self._starts = cache, tokens, starts
        self._ids = torch.zeros(batch, 1, dtype=ids.dtype, device=device)
        self._position = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        padding = torch.tensor(starts, dtype=torch.int32, device=device) if any(starts) else None
        self._step = FixedStep(running, room, lengths, padding, keys)

    def _check(self, inputs: dict[str, Any], ids: Tensor, cache: Any) -> int:
        """Tokens in the cache; the host waits here, once."""
        given = (name for name, value in inputs.items() if value is not None and value is not False)
        if others := sorted({*given} - KNOWN):
            raise Unservable(f"a step must be given tokens alone, got {', '.join(others)}")
        if not isinstance(cache, Cache) or not _has_no_windows(cache):
            raise Unservable(f"all layers must be in a static cache without windows, got {type(cache).__name__}")
        if len(cache.layers) != len(self._states) or not all(layer.is_initialized for layer in cache.layers):
            raise Unservable("gates or selectors must have been attached to every attention layer")
        if len({layer.keys.device for layer in cache.layers}) > 1:
            raise Unservable("the model must be on one GPU")
        if CAPTURE.get() is not None or any(layer.part for layer in self.attachment.layers.values()):
            raise Unservable("attention must not be watched, and heads not be dealt out to processes")
        tokens = int(cache.layers[0].cumulative_length)
        if tokens + 1 > cache.layers[0].max_cache_len:
            raise Unservable(f"the cache must have room for a token, got {tokens} in {cache.layers[0].max_cache_len}")
        return tokens

    def _run(self, inputs: dict[str, Any]) -> CausalLMOutputWithPast:
        """One step: by hand, recorded, or repeated."""
        step, ids = self._step, inputs["input_ids"]
        if ids.shape != self._ids.shape or inputs.get("past_key_values") is not self._cache:
            raise Unservable(f"all steps must be of one batch and one cache, got tokens of shape {list(ids.shape)}")
        tokens = self._tokens + 1
        self._ids.copy_(ids)
        self._position.fill_(tokens - 1)
        step.lengths.fill_(tokens)
        if step.starts is not None:
            self._position.sub_(step.starts[:, None])
            step.lengths.sub_(step.starts)
        self._finish_blocks(tokens)
        if self._graph is not None:
            self._graph.replay()
        elif self._logits is None or not self.records:
            # Kernels are compiled, and what cannot be served shows.
            self._logits = self._forward()
        else:
            self._record()
            self._graph.replay()
        self._count(tokens)
        self._tokens = tokens
        return CausalLMOutputWithPast(logits=self._logits.clone(), past_key_values=self._cache)

    def _count(self, tokens: int) -> None:
        """Tells those who count what was read of so many tokens of the cache."""
        step, meters, rows = self._step, density_meters(self.attachment), {}
        if not meters:
            return
        for row, start in enumerate(self._starts):
            rows.setdefault(tokens - start, []).append(row)
        for own, some in rows.items():
            for index, counts in step.counts.items():
                block_k, heads = step.keys[index].gate.config.block_k, self._states[index].heads
                found = counts.clone() if len(some) == len(counts) else counts[some]
                for meter in meters:
                    meter.decode.add(index, heads, found, own, block_k)
            for index in self._dense:
                for _ in some if step.starts is not None else some[:1]:
                    count_all(meters, step.running, self._states[index], own, self._ids.device)

    def _record(self) -> None:
        """Records a step; nothing of it is computed.

        Raises:
            Unservable: a model that asks the device in the middle of its forward, as experts may.
        """
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._logits = self._forward()
        except RuntimeError as error:
            raise Unservable(f"the forward cannot be recorded ({str(error).splitlines()[0]})") from error
        self._graph = graph

    def _forward(self) -> Tensor:
        token = FIXED.set(self._step)
        try:
            # Nobody looks at the mask, and transformers makes none where one of four axes is given.
            mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self._ids.device)
            given = {"input_ids": self._ids, "position_ids": self._position, "past_key_values": self._cache}
            with compiled(self._parts):
                return self.model(**given, attention_mask=mask, use_cache=True, return_dict=True).logits
        finally:
            FIXED.reset(token)

    def _finish_blocks(self, tokens: int) -> None:
        """Gate keys of the blocks that tokens before this one have finished; in most steps there are none."""
        tables: dict[Any, tuple[Tensor, Tensor]] = {}
        for index, keys in self._step.keys.items():
            held, context = keys.keys, partial(_context, self._states[index], tables)
            keys.fill(self._cache.layers[index].keys, context, tokens)
            if keys.keys is not held:
                # What was recorded reads others. This step runs by hand, as its kernels are other ones, too.
                self._graph = self._logits = None

    def _take_back(self, cache: Any) -> None:
        """What layers before the one that refused have written is written again."""
        if self._step is not None and cache is self._cache:
            for layer in cache.layers:
                layer.cumulative_length.fill_(self._tokens)


def _starts(position: Tensor | None, mask: Any, batch: int, tokens: int) -> list[int]:
    """Where the keys of each sequence begin behind so many tokens of the cache; the host waits here, once.

    Raises:
        Unservable: it is not padding on the left that tells sequences apart.
    """
    shown = None
    if isinstance(mask, Tensor) and mask.ndim in (2, 4):
        shown = mask if mask.ndim == 2 else mask[:, 0, -1]
        hidden = torch.finfo(shown.dtype).min / 2 if shown.is_floating_point() and mask.ndim == 4 else None
        shown = (shown.bool() if hidden is None else shown > hidden)[:, : tokens + 1].expand(batch, -1).cpu()
    if position is None:
        found = [0] * batch if shown is None else (tokens + 1 - shown.sum(1)).tolist()
    elif position.ndim != 2 or position.shape[1] != 1:
        raise Unservable(f"steps must have one position a sequence, got position_ids {list(position.shape)}")
    else:
        found = (tokens - position[:, 0]).expand(batch).tolist()
    if shown is None:
        is_padding = not any(found)
    else:
        is_padding = bool((shown == (torch.arange(shown.shape[1]) >= torch.tensor(found)[:, None])).all())
    if not is_padding or min(found) < 0:
        raise Unservable("sequences must be told apart by padding on the left alone")
    return found


def _context(state: LayerState, tables: dict[Any, tuple[Tensor, Tensor]]) -> AttentionContext:
    """What gate keys are made with: how the keys of positions that count up by one were rotated."""
    rotation = state.rotation

    def unrotate(x: Tensor, start: int) -> Tensor:
        if rotation is None:
            return x.float()
        name = (rotation.embedding, tuple(rotation.arguments.items()), start, x.shape[2])
        if name not in tables:
            tables[name] = rotation.tables(torch.arange(start, start + x.shape[2])[None], x)
        return rotation.unrotate(x, *tables[name])

    rotary = RotaryTables() if rotation is None else None
    return AttentionContext(layer=state.layer, scale=1.0, softcap=None, unrotate=unrotate, rotary=rotary)


@functools.cache
def _tell(reason: str) -> None:
    logger.warning("decoded without a CUDA graph: %s", reason)
