"""Policies for one token of every sequence: from scores of finished blocks to `DecodeBlocks`.

A token has one row of scores, so a policy means what it means for a row that depends on itself alone. The token's own
block, the unfinished one, has no score: it is always kept, and so are the first ``sink_blocks``.
"""

from __future__ import annotations

from dataclasses import replace
from reprlib import repr as short  # a value may be of any size

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattn.selection.decode_blocks import DecodeBlocks, share_of
from seerattn.selection.policies import KeepAll, Policy, TokenBudget, TopK, is_number


def check_decode_policy(policy: object) -> None:
    """Refuses what cannot choose the blocks of one token.

    Raises:
        ValueError: it is no policy, or has a setting that means nothing there.
    """
    if policy is None:
        return
    if not isinstance(policy, Policy):
        raise ValueError(
            "decode_policy must be a policy such as TokenBudget(tokens=1024), or None for dense decoding, got "
            f"{short(policy)}"
        )
    if policy.last_rows_dense:
        raise ValueError(
            f"last_rows_dense of a decode_policy must be 0, got {policy.last_rows_dense}: a token has one row, which "
            "would be dense; decode_policy=None is that"
        )
    if policy.skip_threshold is not None:
        raise ValueError(
            f"skip_threshold of a decode_policy must be None, got {policy.skip_threshold}: attention of one token "
            "skips no blocks"
        )
    if policy.setting is not None and not is_number(policy.setting[1]):
        raise ValueError(
            f"{policy.setting[0]} of a decode_policy must be one number, got {short(policy.setting[1])}: the heads of "
            "a KV group share the blocks of a token"
        )


def choose_blocks(
    scores: Tensor, policy: Policy, *, tokens: int, block_k: int, layer: int = 0, forced_scored: bool = True
) -> DecodeBlocks:
    """Chooses the blocks of the last token of sequences of one length.

    `TopK` keeps a share of the row's own blocks whatever its rule: both rules are about rows that share a number. The
    same goes for its ``heads``.

    Args:
        scores: fp32 ``[B, HKV, N]``, logits over the ``N = (tokens - 1) // block_k`` blocks before the token's own.
        policy: how many of them to keep; forced ones count.
        tokens: keys of a sequence, the token's own included.
        block_k: key block size in tokens.
        layer: index of the layer.
        forced_scored: whether the scores of the first blocks mean anything; if not, they are left out of every softmax.
    """
    if isinstance(policy, TopK):
        policy = replace(policy, rule="row_share", length=None)
    row = F.pad(scores, (0, 1), value=-torch.inf)
    mask = policy.keep_token(row, tokens=tokens, block_k=block_k, layer=layer, forced_scored=forced_scored)
    return DecodeBlocks.from_mask(mask, block_k=block_k, width=most_blocks(policy, mask.shape[-1], block_k))


def group_scores(scores: Tensor, kv_heads: int, *, unscored: int = 0) -> Tensor:
    """Scores that the heads of a KV group share: the logarithm of the largest probability that one of them gives.

    A block matters as much as to the head that needs it most, as in `seerattn.selection.target_map.group_target`.

    Args:
        scores: fp32 ``[B, Hm, N]``, logits of each head over blocks; ``Hm`` is a multiple of ``kv_heads``.
        kv_heads: ``HKV``.
        unscored: first blocks that take part in no softmax.

    Returns:
        fp32 ``[B, HKV, N]``, -inf for what is not scored.
    """
    scores = scores.clone()
    scores[..., :unscored] = -torch.inf
    # Where nothing is left the softmax is NaN.
    scores = scores.log_softmax(-1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    return scores.unflatten(1, (kv_heads, -1)).amax(2)


def reads_all(policy: Policy, tokens: int, block_k: int) -> bool:
    """Whether a policy keeps every block of a sequence of ``tokens`` keys, whatever their scores."""
    number = -(-tokens // block_k)
    return (
        isinstance(policy, KeepAll) or most_blocks(policy, number, block_k) == _least(policy, number, block_k) == number
    )


def nominal_density(policy: Policy, tokens: int, block_k: int) -> float | None:
    """The share of the blocks of ``tokens`` keys that a policy keeps; None where scores decide."""
    number = -(-tokens // block_k)
    counted = _counted(policy, number, block_k)
    return None if counted is None else counted / number


def _counted(policy: Policy, number: int, block_k: int) -> int | None:
    """How many of ``number`` blocks a policy keeps; None where scores decide."""
    match policy:
        case KeepAll():
            return number
        case TokenBudget():
            kept = -(-policy.tokens // block_k)
        case TopK():
            kept = share_of(number, policy.density)
        case _:
            return None
    return min(number, max(kept, min(policy.sink_blocks, number - 1) + 1))


def most_blocks(policy: Policy, number: int, block_k: int) -> int:
    """How many of ``number`` blocks a policy keeps at most."""
    counted = _counted(policy, number, block_k)
    return number if counted is None else counted


def _least(policy: Policy, number: int, block_k: int) -> int:
    counted = _counted(policy, number, block_k)
    return min(policy.sink_blocks, number - 1) + 1 if counted is None else counted
