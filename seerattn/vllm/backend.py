"""Gates before a backend of vLLM: its classes with prompts and answers read sparsely, and all else left to it.

A forward of vLLM packs tokens of many requests. The builder of metadata splits it once for all layers (`Split`): parts
of prompts are chosen for and attended to one by one, each as if it were alone. So are decoded tokens where there is a
decode policy, which are attended to together. What is decoded without one, and prompts that are too short to gain, go
to the backend as they would without gates. A forward in which nothing chooses is the backend's own.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seerattn.gate.heads import Heads
from seerattn.gate_decode import GateDecoder
from seerattn.gate_selector import GateSelector
from seerattn.ops.block_sparse_attention import block_sparse_attention
from seerattn.ops.crossover import LayerShape, prefer_dense
from seerattn.ops.decode_attention import decode_attention
from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.decode_blocks import DecodeBlocks
from seerattn.selection.selector import AttentionContext, Memory, RotaryTables
from seerattn.vllm import density
from seerattn.vllm.decoding import decodes_dense, used_decode_policy
from seerattn.vllm.gates import LayerGate, check_model, has_gate, layer_number, load_gate, open_folder
from seerattn.vllm.options import chosen_policy, current_options, read
from seerattn.vllm.pages import GatePages, Written
from seerattn.vllm.refusals import check_decoding, check_engine, check_layer
from seerattn.vllm.requests import Request, follow_workers, requests_of
from seerattn.vllm.rotation import Rotation, prove_rotation, unrotate
from seerattn.vllm.rows import Part, Rest, Row, Split, rest_of, split_rows
from seerattn.vllm.steps import Asked, Step, Steps, finished, listed_pages, steps_of, together

# What makes attention logits of q and k, as keyword arguments of the ops.
Logits = dict[str, Any]


class GatedBackend:
    """What a backend with gates does otherwise; the class beside it is vLLM's."""

    gated_impl: type
    gated_builder: type

    @classmethod
    def get_impl_cls(cls) -> type:
        """The backend's own without options."""
        return super().get_impl_cls() if current_options() is None else cls.gated_impl

    @classmethod
    def get_builder_cls(cls) -> type:
        """It splits nothing where no layer has a gate."""
        return cls.gated_builder


class GatedImpl:
    """Attention of one layer, with or without a gate; the class beside it is vLLM's."""

    gate: LayerGate | None = None
    rotation: Rotation | None = None
    store: GatePages | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from vllm.config import get_current_vllm_config

        super().__init__(*args, **kwargs)
        self.config = get_current_vllm_config()
        options, model = read(self.config.additional_config), self.config.model_config
        self._attended: list[tuple[Tensor, Tensor]] | None = None
        self._parent: weakref.ref[nn.Module] | None = None
        check_engine(self.config)
        check_layer(self)
        self._gates, self._folder = options.gates, open_folder(options.gates)
        check_model(self._folder, model)
        shares_pages = bool(self.config.cache_config.enable_prefix_caching)
        self._policy = chosen_policy(options, self._folder, shares_pages=shares_pages)
        self._decode_policy = used_decode_policy(options, self._folder, self.config, _device())
        # The module around the layer is known when it takes the layer in, right after this.
        self._hook = nn.modules.module.register_module_module_registration_hook(partial(_note_parent, self))

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Loads the gate of the layer, and proves how it rotates."""
        super().process_weights_after_loading(act_dtype)
        self._hook.remove()
        layers = self.config.compilation_config.static_forward_context
        name = next(name for name, layer in layers.items() if getattr(layer, "impl", None) is self)
        number = layer_number(name, self.config.model_config.hf_text_config.num_hidden_layers)
        if not has_gate(self._folder, number, is_windowed=layers[name].sliding_window is not None):
            return
        if self._parent is None:
            raise ValueError(
                f"an attention layer must be a part of the module that calls it, got {name}, which is none; serve this "
                "model without gates"
            )
        parent = self._parent()
        self._attended = []
        rotation = prove_rotation(parent, name, self.config, act_dtype, self._attended)
        self._attended = None
        self.gate = load_gate(
            self._gates,
            self._folder,
            self._policy,
            number,
            self._heads(),
            None if rotation is None else rotation.frequencies(self.head_size),
            None if rotation is None else rotation.pairing(),
            next(parent.parameters()).device,
            self._decode_policy,
        )
        if self._decode_policy is not None:
            check_decoding(self.config)
        self.rotation, self.store = rotation, None

    def _heads(self) -> Heads:
        from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

        model = self.config.model_config
        return Heads.of_rank(
            model.hf_text_config.num_attention_heads,
            model.get_total_num_kv_heads(),
            get_tensor_model_parallel_rank(),
            get_tensor_model_parallel_world_size(),
        )

    def forward(
        self,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """See vLLM's ``AttentionImpl.forward``.

        Args:
            layer: vLLM's attention layer.
            query: post-RoPE ``[T, H, D]``, new tokens of all requests.
            key: the same of the keys ``[T, HKV, D]``, which are in the cache already.
            value: and of the values.
            kv_cache: ``[pages, HKV, page, 2 D]``.
            attn_metadata: the backend's own, a `Split`, or None where no request runs.
            output: ``[T, H, D]``, written to.
            output_scale: of a quantised output.
            output_block_scale: of a quantised output.
        """
        stock = partial(super().forward, layer)
        scales = {"output_scale": output_scale, "output_block_scale": output_block_scale}
        if self._attended is not None:
            self._attended.append((query.clone(), key.clone()))
        if isinstance(attn_metadata, Split) and self.gate is None:
            attn_metadata = attn_metadata.whole
        if not isinstance(attn_metadata, Split):
            return stock(query, key, value, kv_cache, attn_metadata, output, **scales)
        if output_scale is not None or output_block_scale is not None:
            raise ValueError("attention with gates must write what it computes, got a quantised output; switch "
                             "fuse_attn_quant off in the compilation config")  # fmt: skip
        if attn_metadata.rest is not None:
            tokens, metadata = attn_metadata.rest
            out = torch.empty_like(output[tokens])
            stock(query[tokens], key[tokens], value[tokens], kv_cache, metadata, out)
            output[tokens] = out
        for part in attn_metadata.parts:
            found = self._sparse(layer, query[part.begin : part.begin + part.tokens], kv_cache, part)
            output[part.begin : part.begin + part.tokens] = found
        if attn_metadata.steps is not None:
            steps = attn_metadata.steps
            output[steps.tokens] = self._decoded(layer, query[steps.tokens], kv_cache, steps)
        return output

    def read_pages(self, layer: nn.Module, kv_cache: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[1, HKV, P * page, D]`` that some pages hold.

        Args:
            layer: vLLM's attention layer.
            kv_cache: ``[pages, HKV, page, 2 D]``.
            pages: their numbers, int64 ``[P]``.
        """
        raise NotImplementedError

    def attend(
        self, query: Tensor, layer: nn.Module, kv_cache: Tensor, part: Part, blocks: BlockIndices, logits: Logits
    ) -> Tensor:
        """Attention ``[T, H, D]`` of the queries ``[T, H, D]`` of a part of a prompt to the blocks that were chosen.

        This is where a backend whose pages an op can read calls it; the others gather them.
        """
        k, v = (x[:, :, : part.end] for x in self.read_pages(layer, kv_cache, part.pages.tensor))
        return block_sparse_attention(query.transpose(0, 1)[None], k, v, blocks, **logits)[0].transpose(0, 1)

    def attend_tokens(
        self, query: Tensor, layer: nn.Module, kv_cache: Tensor, steps: Steps, blocks: DecodeBlocks, logits: Logits
    ) -> Tensor:
        """Attention ``[n, H, D]`` of decoded tokens ``[n, H, D]`` to the blocks that were chosen for each.

        The pages that are listed are gathered, each once, unless the backend has them as an op reads them.
        """
        page = kv_cache.shape[2]
        pages, tables = listed_pages(blocks, steps, page, self.gate.form.k_size)
        both = self.read_pages(layer, kv_cache, pages)
        k, v = (x[0].unflatten(1, (len(pages), page)).permute(1, 2, 0, 3) for x in both)
        return decode_attention(query, k, v, lengths=steps.lengths, blocks=blocks, block_table=tables, **logits)

    def _decoded(self, layer: nn.Module, query: Tensor, kv_cache: Tensor, steps: Steps) -> Tensor:
        """Sparse attention ``[n, H, D]`` of decoded tokens."""
        logits, chosen, first = self._logits(query), [], 0
        for step in steps.rows:
            rows = query[first : first + step.asked.tokens]
            chosen += self._select_tokens(rows.transpose(0, 1)[None], layer, kv_cache, step, logits)
            first += step.asked.tokens
        return self.attend_tokens(query, layer, kv_cache, steps, together(chosen), logits)

    def _select_tokens(
        self, q: Tensor, layer: nn.Module, kv_cache: Tensor, step: Step, logits: Logits
    ) -> list[DecodeBlocks]:
        """Blocks of each decoded token of a request with queries ``[1, H, T, D]``."""
        gate, asked = self.gate, step.asked
        memory = self._pages(kv_cache).recall_keys(step.pages, step.known, asked.start)
        keys = self._finished_keys(layer, kv_cache, step)
        context = self._context(q, asked.end, memory, logits)
        decoder, found = GateDecoder(gate.gate, gate.decode_policy), []
        for number in range(asked.tokens):
            tokens = asked.start + number + 1
            # Gate keys that an earlier one of them left behind are those of the same keys.
            memory.known = tokens - 1
            found.append(decoder.select_token(q[:, :, number : number + 1], keys[:, :, :tokens], context))
            if number >= asked.seen:
                asked.counted.meter.decode.add(gate.layer, q.shape[1], found[-1].counts, tokens, gate.form.block_k)
        self.store.keep_keys(step.pages, step.known, memory, len(kv_cache))
        return found

    def _finished_keys(self, layer: nn.Module, kv_cache: Tensor, step: Step) -> Tensor:
        """Keys ``[1, HKV, S, D]`` of a sequence, of which only those of finished blocks without a gate key are read."""
        page, end = kv_cache.shape[2], finished(step.asked.end, self.gate.form.block_k)
        whole = 1, self.num_kv_heads, step.asked.end, self.head_size
        if end <= step.known:
            return kv_cache.new_empty(1, 1, 1, 1).expand(whole)
        first = step.known // page
        new, _ = self.read_pages(layer, kv_cache, step.pages[first : -(-end // page)])
        keys, begin = new.new_empty(whole), first * page
        keys[:, :, begin:end] = new[:, :, : end - begin]
        return keys

    def _logits(self, query: Tensor) -> Logits:
        sinks = None if self.sinks is None else self.sinks.to(query.device)
        return {"scale": self.scale, "softcap": self.logits_soft_cap or None, "sinks": sinks}

    def _pages(self, kv_cache: Tensor) -> GatePages:
        """Gate keys of the layer by page, empty at first."""
        if self.store is None:
            self.store = GatePages(self.gate.gate, kv_cache.shape[2], 2 * self.config.scheduler_config.max_num_seqs)
        return self.store

    def _context(self, q: Tensor, end: int, memory: Memory, logits: Logits) -> AttentionContext:
        """What a selector may know of queries behind which a sequence has ``end`` keys."""
        tables = RotaryTables() if self.rotation is None else self.rotation.tables(end, q.device)
        told = {"unrotate": unrotate(tables), "rotary": tables, "memory": memory}
        return AttentionContext(layer=self.gate.layer, **logits, **told)

    def _sparse(self, layer: nn.Module, query: Tensor, kv_cache: Tensor, part: Part) -> Tensor:
        """Sparse attention ``[T, H, D]`` of a part of a prompt."""
        logits = self._logits(query)
        blocks = self._select(query.transpose(0, 1)[None], layer, kv_cache, part, logits)
        part.counted.add(self.gate.layer, query.shape[1], blocks)
        return self.attend(query, layer, kv_cache, part, blocks, logits)

    def _select(self, q: Tensor, layer: nn.Module, kv_cache: Tensor, part: Part, logits: Logits) -> BlockIndices:
        """Blocks of a part of a prompt with queries ``[1, H, T, D]``."""
        gate = self.gate
        memory = self._pages(kv_cache).recall(part.pages, part.known, part.start)
        context = self._context(q, part.end, memory, logits)
        # Gate vectors of the fused op lie in tiles of its own, not in pages; the modules run on any device.
        selector = GateSelector(gate.gate, gate.policy_of(part.prompt, part.end), impl="reference")
        blocks = selector.select(q, self._new_keys(layer, kv_cache, part), context)
        self.store.keep(part.pages, part.known, part.end, memory, len(kv_cache))
        return blocks

    def _new_keys(self, layer: nn.Module, kv_cache: Tensor, part: Part) -> Tensor:
        """Keys ``[1, HKV, S, D]`` of a sequence, of which those with a gate key are not read, and hold anything."""
        first = part.known.tokens // kv_cache.shape[2]
        new, _ = self.read_pages(layer, kv_cache, part.pages.tensor[first:])
        keys = new.new_empty(*new.shape[:2], part.end, new.shape[3])
        begin = first * kv_cache.shape[2]
        keys[:, :, begin:] = new[:, :, : part.end - begin]
        return keys


class GatedBuilder:
    """Splits forwards with prompts; the class beside it is vLLM's."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, *args, **kwargs)
        layers = vllm_config.compilation_config.static_forward_context
        self._layers = [layers[name] for name in layer_names]
        self._gated = [layer.impl for layer in self._layers if getattr(layer.impl, "gate", None) is not None]
        self._written: Written | None = None
        if not self._gated:
            return
        self._options = read(vllm_config.additional_config)
        form, page = self._gated[0].gate.form, kv_cache_spec.block_size
        if page % form.k_size:
            raise ValueError(
                f"pages must hold whole gate keys, of {form.k_size} tokens each, got pages of {page} tokens; use "
                f"--block-size {form.block_k}"
            )
        impl = self._gated[0]
        self._shape = LayerShape(1, impl.num_heads, impl.num_kv_heads, impl.head_size)
        follow_workers()

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        """Graphs of decode steps alone, where gates are asked for: a graph would leave out how a prompt is read.

        With a decode policy that is used none: it would leave out how an answer is read, too.
        """
        from vllm.v1.attention.backend import AttentionCGSupport

        stock, options = super().get_cudagraph_support(vllm_config, kv_cache_spec), read(vllm_config.additional_config)
        if options is None:
            return stock
        if used_decode_policy(options, open_folder(options.gates), vllm_config, _device()) is not None:
            return AttentionCGSupport.NEVER
        return min(stock, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, key=lambda support: support.value)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        """See vLLM's ``AttentionMetadataBuilder.build``."""
        stock = partial(super().build, common_prefix_len)
        requests = requests_of(common_attn_metadata) if self._gated else None
        if requests is None:
            return stock(common_attn_metadata, *args, **kwargs)
        if self._written is None:
            nothing = torch.zeros(len(self._layers[0].kv_cache), dtype=torch.int32, device=self.device)
            self._written = Written(self.kv_cache_spec.block_size, nothing)
        self._written.write(common_attn_metadata.slot_mapping)
        gate = self._gated[0].gate
        step, decode = gate.form.k_size, None if gate.decode_policy is None else self._decode
        parts, rest, asked = split_rows(common_attn_metadata, requests, self._written, step, self._begin, decode)
        if not parts and not asked:
            return stock(common_attn_metadata, *args, **kwargs)
        steps = None
        if asked:
            steps = steps_of(common_attn_metadata, asked, self._written, step, gate.form.block_k)
        whole = None
        if len(self._gated) < len(self._layers):
            whole = stock(common_attn_metadata, *args, **kwargs)
        left = None
        if rest:
            tokens, common = rest_of(common_attn_metadata, rest)
            left = Rest(tokens, stock(common, *args, **kwargs))
        return Split(parts, steps, left, whole)

    def _begin(self, request: Request, row: Row, tokens: int) -> density.Counted | None:
        """What counts the next tokens of a prompt; None where it is read densely, however it is cut."""
        expected = self._gated[0].gate.policy.nominal_density or 0.0
        lengths = {"q_len": request.prompt, "k_len": request.prompt, "device": self.device}
        is_dense = self._options.impl == "auto" and prefer_dense(**lengths, shape=self._shape, density=expected)
        known = {"layers": len(self._gated), "log": self._options.log and not is_dense, "is_dense": is_dense}
        counted = density.begin_part(request.name, request.prompt, row.start, row.start + tokens, **known)
        return None if is_dense else counted

    def _decode(self, request: Request, row: Row) -> Asked | None:
        """The tokens of an answer that choose their keys; with "auto" its first ones may be decoded dense."""
        policy, block_k = self._gated[0].gate.decode_policy, self._gated[0].gate.form.block_k
        is_dense = partial(decodes_dense, policy, block_k, shape=self._shape, device=self.device)
        whole, tokens = 0, row.end - row.begin
        while self._options.impl == "auto" and whole < tokens and is_dense(keys=row.start + whole + 1):
            whole += 1
        counted = density.of_request(request.name, request.prompt, layers=len(self._gated), log=self._options.log)
        seen = counted.decode(row.start, row.keys, whole, block_k)
        if whole == tokens:
            return None
        return Asked(row.number, row.begin + whole, tokens - whole, row.start + whole, max(0, seen - whole), counted)


def _device() -> torch.device:
    from vllm.platforms import current_platform

    return torch.device(current_platform.device_type)


def _note_parent(impl: GatedImpl, parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Called by torch whenever a module takes another one in."""
    if child is not None and getattr(child, "impl", None) is impl:
        impl._parent = weakref.ref(parent)
