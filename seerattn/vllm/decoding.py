"""Which tokens of answers choose their keys: "auto" leaves those to vLLM that dense attention is faster for."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from seerattn.gate_files import GateFolder
from seerattn.ops.crossover import LayerShape
from seerattn.ops.crossover_decode import prefer_dense_decode
from seerattn.selection.decode_policy import nominal_density, reads_all
from seerattn.selection.policies import Policy
from seerattn.vllm.options import Options, decode_policy

logger = logging.getLogger("vllm.seerattn")


def decodes_dense(policy: Policy, block_k: int, keys: int, shape: LayerShape, device: torch.device) -> bool:
    """Whether "auto" decodes a token dense: one that would read all, or that dense attention is faster for.

    It is asked of a sequence alone, so that no neighbour changes what it gets.

    Args:
        policy: chooses for the token.
        block_k: tokens of a block.
        keys: of the sequence, that of the token included.
        shape: of the layer in this process, for one sequence.
        device: where it runs.
    """
    density = nominal_density(policy, keys, block_k) or 0.0
    return reads_all(policy, keys, block_k) or prefer_dense_decode(
        keys=keys, density=density, device=device, shape=shape
    )


def used_decode_policy(options: Options, folder: GateFolder, config: Any, device: torch.device) -> Policy | None:
    """The policy that tokens are decoded by; None where none is asked for, or no token would use it.

    On a GPU vLLM decodes by CUDA graphs, which a decode policy takes away. So one that "auto" would pass over up to
    the longest text is left out as a whole, and vLLM keeps its graphs.

    Args:
        options: of the user.
        folder: of the gates.
        config: vLLM's whole one.
        device: of the worker.

    Raises:
        ValueError: a policy that means nothing for a single token.
    """
    policy = decode_policy(options, folder)
    if policy is None or options.impl != "auto" or device.type == "cpu":
        return policy
    model, parallel = config.model_config, config.parallel_config
    heads = model.get_num_attention_heads(parallel), model.get_num_kv_heads(parallel)
    shape = LayerShape(1, *heads, model.get_head_size())
    if not decodes_dense(policy, folder.form.block_k, model.max_model_len, shape, device):
        return policy
    _tell_of_dense(model.max_model_len)
    return None


@functools.cache
def _tell_of_dense(tokens: int) -> None:
    logger.warning(
        "answers are decoded densely, by vLLM's own attention and its CUDA graphs: up to the longest text of %d tokens "
        'that is expected to be faster than a decode policy; "impl": "sparse" uses the policy',
        tokens,
    )
