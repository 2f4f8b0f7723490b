"""Policies: from block scores to the blocks that are computed.

A policy sees scores ``[B, Hm, Nq, Nk]`` (logits over key blocks, -inf where nothing is causal) and returns
`BlockIndices`. The diagonal is always kept; the first ``sink_blocks`` blocks are kept unless that is 0; both count in
the density. A setting is one number for the whole model or, as calibration makes them, one a layer and head. The one
density of a `TopK` is shared among heads before it chooses where there are budgets, see `seerattn.selection.budgets`.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cached_property, lru_cache
from reprlib import repr as short  # a value may be of any size
from typing import Literal

import torch
from torch import Tensor

from seerattn.selection.block_indices import (
    BlockIndices,
    causal_block_mask,
    check_skip_threshold,
    forced_block_mask,
    num_query_blocks,
)

Setting = float | Sequence[Sequence[float]]
# Blocks, rows and tokens are counted in 32 bits.
_MOST = 2**31 - 1


@dataclass(frozen=True)
class _Rows:
    """What a policy knows of the rows it chooses for."""

    layer: int
    tokens: int
    block_q: int
    block_k: int
    causal: Tensor  # bool [1, 1, Nq, Nk]
    forced: Tensor  # bool [1, 1, Nq, Nk]


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """What all policies share.

    Attributes:
        sink_blocks: first key blocks that every row keeps.
        last_rows_dense: this many last query-block rows keep every block. The official evaluation uses 2, which by
            itself answers a question at the end of a prompt; 0 measures the gate.
        skip_threshold: attention leaves out the values of a kept block whose probabilities are below this share of one
            that every row has met before (BLASST, arXiv 2512.12087), dense last rows included. It chooses no other
            blocks, and counts in no density. None leaves nothing out.
    """

    sink_blocks: int = 1
    last_rows_dense: int = 0
    skip_threshold: float | None = None

    def __post_init__(self) -> None:
        for name in ("sink_blocks", "last_rows_dense"):
            _check_whole(name, getattr(self, name), 0)
        check_skip_threshold(self.skip_threshold)

    def select(
        self,
        scores: Tensor,
        *,
        q_start: int,
        q_len: int,
        block_q: int,
        block_k: int,
        layer: int = 0,
        forced_scored: bool = True,
    ) -> BlockIndices:
        """Chooses blocks of one unpadded call.

        Args:
            scores: fp32 ``[B, Hm, Nq, Nk]``.
            q_start: position of the first query.
            q_len: number of queries.
            block_q: query block size in tokens.
            block_k: key block size in tokens.
            layer: index of the layer, for settings given per layer.
            forced_scored: whether the scores of forced blocks mean anything; if not, they are left out of every
                softmax.
        """
        num_q_blocks, num_k_blocks = scores.shape[2:]
        geometry = (q_start, q_len, num_q_blocks, num_k_blocks, block_q, block_k)
        if num_q_blocks != num_query_blocks(q_start, q_len, block_q):
            raise ValueError(
                f"scores must have a row for each of the {num_query_blocks(q_start, q_len, block_q)} query blocks, "
                f"got {num_q_blocks}"
            )
        causal = causal_block_mask(*geometry, device=scores.device)
        forced = forced_block_mask(*geometry, self.sink_blocks, device=scores.device)
        if self.last_rows_dense:
            forced[:, -self.last_rows_dense :] = causal[:, -self.last_rows_dense :]
        rows = _Rows(layer, q_start + q_len, block_q, block_k, causal[:, None], forced[:, None])
        mask = self._kept(scores, rows, forced_scored)
        blocks = BlockIndices.from_mask(mask, block_q=block_q, block_k=block_k, q_start=q_start, q_len=q_len)
        return replace(blocks, skip_threshold=self.skip_threshold)

    def keep_token(
        self, scores: Tensor, *, tokens: int, block_k: int, layer: int = 0, forced_scored: bool = True
    ) -> Tensor:
        """Chooses blocks of the last token of sequences; nothing waits for the device.

        Args:
            scores: fp32 ``[B, Hm, Nk]``, of all blocks; the last one, the token's own, is kept whatever it has.
            tokens: keys of a sequence.
            block_k: key block size in tokens.
            layer: index of the layer.
            forced_scored: as of `select`.

        Returns:
            Bool ``[B, Hm, Nk]``.
        """
        place = torch.arange(scores.shape[2], device=scores.device)
        forced = ((place < self.sink_blocks) | (place == len(place) - 1))[None, None, None]
        rows = _Rows(layer, tokens, 1, block_k, torch.ones_like(forced), forced)
        return self._kept(scores[:, :, None], rows, forced_scored)[:, :, 0]

    def keep_tokens(self, scores: Tensor, positions: Tensor, *, block_k: int, forced_scored: bool = True) -> Tensor:
        """What `keep_token` chooses for single tokens of one sequence, each as if it were the last one.

        Args:
            scores: fp32 ``[B, Hm, R, Nk]``, of all blocks of the sequence.
            positions: int64 ``[R]``, where the tokens stand, on the device of the scores.
            block_k: key block size in tokens.
            forced_scored: as of `select`.

        Returns:
            Bool ``[B, Hm, R, Nk]``, False behind the block of a token.
        """
        place = torch.arange(scores.shape[3], device=scores.device)
        own = positions.div(block_k, rounding_mode="floor")[:, None]
        causal, forced = place <= own, (place < self.sink_blocks) | (place == own)
        rows = _Rows(0, scores.shape[3] * block_k, 1, block_k, causal[None, None], (causal & forced)[None, None])
        return self._kept(scores, rows, forced_scored) & rows.causal

    def _kept(self, scores: Tensor, rows: _Rows, forced_scored: bool) -> Tensor:
        """Bool ``[B, Hm, Nq, Nk]``; of blocks that are not causal any value."""
        hidden = ~rows.causal if forced_scored else ~rows.causal | rows.forced
        return self._keep(scores.masked_fill(hidden, -torch.inf), rows) | rows.forced

    @property
    def nominal_density(self) -> float | None:
        """Density that the policy names, averaged over layers and heads; None where only scores can tell."""
        return None

    @property
    def needs_length(self) -> bool:
        """Whether a prompt that comes in chunks gets other blocks than one that comes at once."""
        return False

    @property
    def setting(self) -> tuple[str, Setting] | None:
        """Name and value of the field that may have a value for each layer and head, if there is one."""
        return None

    @abstractmethod
    def _keep(self, scores: Tensor, rows: _Rows) -> Tensor:
        """Bool ``[B, Hm, Nq, Nk]``; forced and non-causal blocks may have any value."""

    def to_dict(self) -> dict:
        """Plain JSON types, with the name of the policy under "policy"; `policy_from_dict` restores it.

        What a policy from before there was skipping does not tell, one that skips nothing does not tell either.
        """
        values = {"policy": type(self).__name__} | asdict(self)
        if self.skip_threshold is None:
            del values["skip_threshold"]
        return values


@dataclass(frozen=True, kw_only=True)
class KeepAll(Policy):
    """Every causal block: dense attention, computed by the sparse kernel."""

    nominal_density = 1.0

    def _keep(self, scores: Tensor, rows: _Rows) -> Tensor:
        return rows.causal.expand(scores.shape)


@dataclass(frozen=True, kw_only=True)
class TopK(Policy):
    """The best blocks of every row, so many that the causal area has a given density.

    Attributes:
        density: share of the causal block area to compute, in (0, 1].
        rule: "same_k" keeps the same number in every row: early rows are cheap and need their few blocks (oracle
            perplexity 33.2 against 36.5 at density .1, docs/LOG.md). "row_share" keeps the same share of each row's
            own blocks, and so does not depend on the length of the prompt.
        length: tokens of the whole prompt where it is known before its last chunk; "same_k" derives its number from
            it. None takes the keys of the call at hand.
        heads: "calibrated" shares one density among heads as the budgets of the gates say (`HeadBudgets`), equally
            where they have none; "equal" gives every head the same.
    """

    density: Setting
    rule: Literal["same_k", "row_share"] = "same_k"
    length: int | None = None
    heads: Literal["calibrated", "equal"] = "calibrated"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("density", self.density)
        if self.rule not in ("same_k", "row_share"):
            raise ValueError(f"rule must be 'same_k' or 'row_share', got {short(self.rule)}")
        if self.length is not None:
            _check_whole("length", self.length, 1)
        if self.heads not in ("calibrated", "equal"):
            raise ValueError(f"heads must be 'calibrated' or 'equal', got {short(self.heads)}")

    def prompt_tokens(self, tokens: int) -> int:
        """Tokens of the whole prompt as far as a call with ``tokens`` keys can tell."""
        return max(self.length or 0, tokens)

    def to_dict(self) -> dict:
        """See `Policy.to_dict`. Calibrated heads go without saying, as in policies from before there were any."""
        values = super().to_dict()
        if self.heads == "calibrated":
            del values["heads"]
        return values

    @cached_property
    def nominal_density(self) -> float:
        """See `Policy.nominal_density`."""
        if isinstance(self.density, (int, float)):
            return self.density
        values = [value for row in self.density for value in row]
        return sum(values) / len(values)

    @property
    def needs_length(self) -> bool:
        """See `Policy.needs_length`."""
        return self.rule == "same_k" and self.length is None

    @property
    def setting(self) -> tuple[str, Setting]:
        """See `Policy.setting`."""
        return "density", self.density

    def _keep(self, scores: Tensor, rows: _Rows) -> Tensor:
        if self.rule == "same_k":
            geometry = (self.prompt_tokens(rows.tokens), rows.block_q, rows.block_k)
            k = _map_setting(self.density, rows.layer, scores, lambda share: rows_k(*geometry, share))
        else:
            k = (rows.causal.sum(-1, keepdim=True) * _at_layer(self.density, rows.layer, scores)).ceil()
        return _ranks(scores, rows.forced) < k


@dataclass(frozen=True, kw_only=True)
class TokenBudget(Policy):
    """The best blocks of every row up to a number of key tokens, forced blocks included."""

    tokens: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_whole("tokens", self.tokens, 1)

    def _keep(self, scores: Tensor, rows: _Rows) -> Tensor:
        return _ranks(scores, rows.forced) < -(-self.tokens // rows.block_k)


@dataclass(frozen=True, kw_only=True)
class Threshold(Policy):
    """Blocks whose score exceeds a threshold.

    Attributes:
        threshold: the level.
        on: "softmax" compares probabilities over the row's key blocks (the official rule, 5e-4 to 5e-3); "score"
            compares the raw scores, which for a gate with normalised sub-blocks estimate the logarithm of the largest
            attention probability in the block.
    """

    threshold: Setting
    on: Literal["softmax", "score"] = "softmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on not in ("softmax", "score"):
            raise ValueError(f"on must be 'softmax' or 'score', got {short(self.on)}")
        _values("threshold", self.threshold)

    @property
    def setting(self) -> tuple[str, Setting]:
        """See `Policy.setting`."""
        return "threshold", self.threshold

    def _keep(self, scores: Tensor, rows: _Rows) -> Tensor:
        level = scores if self.on == "score" else _softmax(scores)
        return level > _at_layer(self.threshold, rows.layer, scores)


@dataclass(frozen=True, kw_only=True)
class TopP(Policy):
    """The smallest set of blocks of each row that holds a share ``p`` of the gate's probability mass."""

    p: Setting

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("p", self.p)

    @property
    def setting(self) -> tuple[str, Setting]:
        """See `Policy.setting`."""
        return "p", self.p

    def _keep(self, scores: Tensor, rows: _Rows) -> Tensor:
        mass, order = _softmax(scores).sort(dim=-1, descending=True, stable=True)
        # A block is needed while the mass before it is short of p.
        needed = mass.cumsum(-1) - mass < _at_layer(self.p, rows.layer, scores)
        return torch.zeros_like(needed).scatter_(-1, order, needed)


POLICIES: dict[str, type[Policy]] = {c.__name__: c for c in (KeepAll, TopK, TokenBudget, Threshold, TopP)}


def policy_from_dict(values: dict) -> Policy:
    """Inverse of `Policy.to_dict`.

    Raises:
        ValueError: it is no policy: names what is unknown, missing or of a wrong kind.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"policy must be an object with a name under 'policy', got {short(values)}")
    name = values.get("policy")
    if not isinstance(name, str) or name not in POLICIES:
        raise ValueError(f"policy must be one of {sorted(POLICIES)}, got {short(name)}")
    known = {f.name: f.default is MISSING for f in fields(POLICIES[name])}
    given = {key: value for key, value in values.items() if key != "policy"}
    unknown = [key for key in given if key not in known]
    missing = [key for key, needed in known.items() if needed and key not in given]
    if unknown:
        raise ValueError(f"{name} must have no other fields than {', '.join(known)}, got {short(unknown)}")
    if missing:
        raise ValueError(f"{name} must have {', '.join(missing)}, got none")
    return POLICIES[name](**given)


# Every layer and head of a prompt asks again, and heads with budgets each for their own density.
@lru_cache(maxsize=1 << 14)
def rows_k(tokens: int, block_q: int, block_k: int, density: float) -> int:
    """The ``k`` that realises the density nearest to ``density`` in a prompt of ``tokens``.

    The official code rounds down the continuous solution ``(1 - sqrt(1 - density)) Nq``, which at 4k tokens
    and density .1 realises .092; the nearest ``k`` errs to either side.
    """
    realised = _realised(tokens, block_q, block_k)
    # Rounded like those that it is compared with: half way between two, as .5 is in 8 blocks, that decides.
    density = float(torch.tensor(density, dtype=torch.float32))
    above = bisect_left(realised, density)
    nearest = range(max(above - 1, 0), min(above + 1, len(realised)))
    return min(nearest, key=lambda i: abs(realised[i] - density)) + 1


@lru_cache(maxsize=64)
def _realised(tokens: int, block_q: int, block_k: int) -> tuple[float, ...]:
    """Densities of a prompt whose rows keep 1, 2, ... blocks each, rounded to fp32."""
    num_rows = num_query_blocks(0, tokens, block_q)
    causal = causal_block_mask(0, tokens, num_rows, -(-tokens // block_k), block_q, block_k)[0].sum(-1)
    at_least = causal.bincount().flip(0).cumsum(0).flip(0)[1:]
    return tuple((at_least.cumsum(0) / causal.sum()).tolist())


def _ranks(scores: Tensor, forced: Tensor) -> Tensor:
    """Rank of every block in its row, forced ones first, the earlier block first among equals."""
    order = scores.masked_fill(forced, torch.inf).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over key blocks; zero in rows where nothing has a score."""
    return scores.softmax(-1).nan_to_num(0.0)


def _at_layer(setting: Setting, layer: int, scores: Tensor) -> float | Tensor:
    return _map_setting(setting, layer, scores, lambda value: value)


def _map_setting(setting: Setting, layer: int, scores: Tensor, f: Callable[[float], float]) -> float | Tensor:
    """``f`` of the setting: a number, or ``[Hm, 1, 1]`` where the setting has a value a head."""
    if isinstance(setting, (int, float)):
        return f(setting)
    values = setting[layer] if layer < len(setting) else ()
    if len(values) != scores.shape[1]:
        raise ValueError(f"a setting per head must have {scores.shape[1]} values a layer, got {len(values)}")
    return torch.tensor([f(value) for value in values], device=scores.device, dtype=torch.float32)[:, None, None]


def _check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST:
        raise ValueError(f"{name} must be a whole number of at least {least}, at most {_MOST}, got {short(value)}")


def _check_share(name: str, setting: object) -> None:
    wrong = [value for value in _values(name, setting) if not 0 < value <= 1]
    if wrong:
        raise ValueError(f"{name} must be in (0, 1], got {short(wrong[0])}")


def _values(name: str, setting: object) -> list[float]:
    """The numbers of a setting, of which a list by layer may leave layers empty but not all.

    Raises:
        ValueError: it is none.
    """
    rows = setting if isinstance(setting, (list, tuple)) else [[setting]]
    values = [value for row in rows for value in (row if isinstance(row, (list, tuple)) else [None])]
    # NaN compares with nothing; a whole number may have more digits than any float.
    if not values or not all(is_number(value) and abs(value) <= sys.float_info.max for value in values):
        raise ValueError(f"{name} must be a finite number, or one a layer and head, got {short(setting)}")
    return values


def is_number(value: object) -> bool:
    """Whether a value is a number; a bool is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
