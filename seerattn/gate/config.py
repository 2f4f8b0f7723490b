"""`AttnGateConfig`: everything that defines the form of a gate."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Literal

from seerattn.options import check_options, option, read_options
from seerattn.selection.map_form import MAX_POWER, PUBLISHED, Keys, MapForm
from seerattn.texts import short

Pooling = Literal["avg", "max", "min", "salient"]
Share = Literal["query_head", "kv_group"]
Init = Literal["identity", "normal"]

BLOCK_SIZES = (32, 64, 128)
# Nothing that is of use comes near these, and a slip of the keyboard must not fill the memory.
MAX_GATE_DIM = 1024
MAX_DISTANCES = 1 << 16
# Of the published form, and of gates saved before there was another one.
PUBLISHED_TARGET = {"target_keys": PUBLISHED.keys, "target_power": None}


@dataclass(frozen=True)
class AttnGateConfig:
    """Form of the gates of a model.

    The defaults measured best at their cost, on a public model and on the reference model (docs/targets.md,
    docs/ablation.md). Finer sub-blocks find more and cost more: 4 x 8 take 3.4 ms at 128k tokens on an H200, 8 x 8 5.3
    (docs/LOG.md).

    Attributes:
        block_q: query block size in tokens.
        block_k: key block size in tokens.
        q_pooling: how the queries of a sub-block become one vector; several poolings are concatenated. "salient" is
            an average whose weights are learned: the softmax over the window of one learned vector a head times the
            tokens. It starts as "avg".
        k_pooling: the same for keys.
        q_linear: whether a linear follows the query pooling; without it the pooled query is used as it is, which
            needs one query pooling, ``gate_dim == head_dim`` and ``share == "query_head"``.
        gate_dim: width of gate queries and keys; None is the head dim of the model.
        rope: whether gate queries and keys are rotated with the model's own frequencies at the position of the first
            token of their sub-block.
        qk_norm: RMSNorm with a learned weight on gate queries and keys, before the rotation.
        target_keys: of the map that the gate learns: what a query row gives to a key block is the "max" or the "sum" of
            its probabilities there, see `MapForm`. Scores of key sub-blocks are reduced to fit, by the maximum or the
            log-sum-exp.
        target_power: of the power mean over query rows that the gate learns, 1 or more; None is the largest row. Scores
            ``s`` of query sub-blocks are reduced to fit, by ``log(mean(exp(power * s))) / power`` or the maximum.
        query_subblocks: queries are pooled in this many pieces a block; a block's score reduces those of its pieces as
            the target asks.
        key_subblocks: the same for keys.
        normalize_subblocks: subtract from the scores of every query sub-block their log-sum-exp over its causal keys
            before reducing them. The target is made of *softmax rows*, so a query sub-block whose attention is flat
            must not outbid one that is sharp.
        distance_bias: learned bias per head and block distance; distances from this many blocks on share the last
            entry. 0 is off.
        share: one gate a query head (the paper), or one a KV group, which makes index lists and scores ``G`` times
            fewer.
        init: "identity" starts as mean-pooled attention (the parts of both linears that read "avg", or else
            "salient", are identities, all else is a tenth of the noise that "normal" draws, with standard deviation
            0.02.
        exclude_forced: leave the blocks that selection keeps anyway - the first block and the diagonal - out of the
            target and out of the gate's softmax while training, so that the gate need not learn them.
    """

    block_q: int = option(64, help="Tokens of a query block.", choices=BLOCK_SIZES)
    block_k: int = option(64, help="Tokens of a key block.", choices=BLOCK_SIZES)
    q_pooling: tuple[Pooling, ...] = option(("salient",), help="How queries become one vector.")
    k_pooling: tuple[Pooling, ...] = option(("salient", "max", "min"), help="How keys become one vector.")
    q_linear: bool = option(True, help="A linear after the query pooling.")
    gate_dim: int | None = option(None, help="Width of the gate, even; default the head dim.", low=2, high=MAX_GATE_DIM)
    rope: bool = option(True, help="Rotate gate queries and keys.")
    qk_norm: bool = option(False, help="RMSNorm on both sides.")
    target_keys: Keys = option("sum", help="What a query row gives to a key block, of its probabilities there.")
    target_power: float | None = option(
        4.0, help="Power mean of that over query rows to learn; none is the largest.", low=1, high=MAX_POWER
    )
    query_subblocks: int = option(4, help="Pieces that a query block is pooled in.", low=1)
    key_subblocks: int = option(8, help="Pieces that a key block is pooled in.", low=1)
    normalize_subblocks: bool = option(True, help="Softmax within each query piece before they are reduced.")
    distance_bias: int = option(
        0, help="Learned bias by block distance, up to so many blocks.", low=0, high=MAX_DISTANCES
    )
    share: Share = option("query_head", help="Whose one gate is.")
    init: Init = option("identity", help="Weights to start from.")
    exclude_forced: bool = option(True, help="Train without the blocks that selection keeps anyway.")

    @classmethod
    def paper(cls, **overrides) -> AttnGateConfig:
        """The published form (arXiv 2410.13276, section 3): Q avg, K max+min+avg, no Q linear, gate RoPE, 64 x 64.

        Its target is the published one, `PUBLISHED`.
        """
        form = cls(
            q_pooling=("avg",),
            k_pooling=("max", "min", "avg"),
            q_linear=False,
            **PUBLISHED_TARGET,
            query_subblocks=1,
            key_subblocks=1,
            normalize_subblocks=False,
            init="normal",
            exclude_forced=False,
        )
        return replace(form, **overrides)

    def __post_init__(self) -> None:
        if self.target_power == math.inf:
            object.__setattr__(self, "target_power", None)  # JSON has no infinity
        check_options(self)
        for name in ("q_pooling", "k_pooling"):
            kinds = getattr(self, name)
            if not kinds or len(set(kinds)) < len(kinds):
                raise ValueError(f"{name} must be one pooling or several different ones, got {short(kinds)}")
        for block, pieces in (("block_q", "query_subblocks"), ("block_k", "key_subblocks")):
            if getattr(self, block) % getattr(self, pieces):
                raise ValueError(f"{pieces} must divide {block} = {getattr(self, block)}, got {getattr(self, pieces)}")
        if self.gate_dim is not None and self.gate_dim % 2:
            raise ValueError(f"gate_dim must be even, got {self.gate_dim}")
        if not self.q_linear and (len(self.q_pooling) > 1 or self.share == "kv_group"):
            raise ValueError(
                "q_linear must be true for several query poolings or share='kv_group', "
                f"got false with {list(self.q_pooling)} and {self.share!r}"
            )

    @property
    def target(self) -> MapForm:
        """The form of the map that the gate learns."""
        return MapForm(self.target_keys, math.inf if self.target_power is None else self.target_power)

    @property
    def q_size(self) -> int:
        """Tokens of a query sub-block."""
        return self.block_q // self.query_subblocks

    @property
    def k_size(self) -> int:
        """Tokens of a key sub-block."""
        return self.block_k // self.key_subblocks

    def to_dict(self) -> dict:
        """Plain JSON types; `from_dict` restores an equal config."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> AttnGateConfig:
        """Inverse of `to_dict`. A target that is not told, as gates of old have none, is the published one.

        Raises:
            ValueError: it is no dictionary, a key is unknown or a value is none that a gate can have.
        """
        if not isinstance(values, dict):
            raise ValueError(f"gate config must be a dictionary of fields of AttnGateConfig, got {short(values)}")
        return read_options(cls, PUBLISHED_TARGET | values, where="gate config")
