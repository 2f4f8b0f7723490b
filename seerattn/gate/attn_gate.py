"""`AttnGate`: predicts from pooled queries and keys which blocks of an attention map matter."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seerattn.gate.config import AttnGateConfig
from seerattn.gate.heads import Heads, heads_of_gate
from seerattn.gate.pooling import Pooled, pool_blocks
from seerattn.gate.rope import Pairing, angles, block_positions, rotate, turn
from seerattn.selection.map_form import PUBLISHED

# Sub-block scores held at once, in elements. Larger problems are walked in strips of query blocks, each against its
# causal prefix only, which also halves the work.
STRIP_ELEMENTS_CPU = 1 << 21  # 8 MiB; 2^19 and 2^22 take 1.4x as long at 16k tokens
STRIP_ELEMENTS_DEVICE = 1 << 26
# The score of a pair of sub-blocks that is none, until blocks are scored: a log-sum-exp of nothing but -inf has no
# gradient.
HIDDEN = -1e30
# Standard deviation of what the linears begin with. Beside an identity .02 buries what mean-pooled attention knows: the
# loss of a layer of SmolLM2 on other text was .030 after 120 steps, and without noise .028 (docs/LOG.md).
NOISE = {"identity": 0.002, "normal": 0.02}


class AttnGate(nn.Module):
    """The gate of one attention layer (arXiv 2410.13276, section 3).

    Queries and keys before RoPE are pooled per sub-block, projected per head, rotated at the position of the first
    token of their sub-block, and multiplied; scores of a block's pairs of sub-blocks are reduced as the target asks, in
    the published form by the maximum. Everything is fp32. Block (i, j) depends on the tokens of query block i and
    key block j alone unless `normalize_subblocks` is set, which adds the log-sum-exp over the causal keys of block i -
    known in full when block i is computed. So chunked and one-shot calls score alike wherever chunks are cut on block
    boundaries.

    Args:
        config: form of the gate.
        num_heads: query heads ``H`` of the layer.
        num_kv_heads: key/value heads ``HKV``, a divisor of ``H``.
        head_dim: ``D``.
        inv_freq: fp32 ``[DG / 2]``, rotation frequencies of the base model at the width of the gate. Needed if
            ``config.rope``; it belongs to the model and is not saved with the gate.
        pairing: which channels the base model rotates together, at the width of the gate; by default the halves of
            all of them, as the Llama family does. It belongs to the model as well.
        part: the heads of the layer that it is for, where a process has some of them; then ``num_heads`` and
            ``num_kv_heads`` are their numbers, and of the weights of a whole gate it loads those of its heads.

    Raises:
        ValueError: sizes that do not fit each other or the form.
    """

    def __init__(
        self,
        config: AttnGateConfig,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        inv_freq: Tensor | None = None,
        pairing: Pairing | None = None,
        part: Heads | None = None,
    ) -> None:
        super().__init__()
        if part is not None:
            part.check(config)
            self.register_load_state_dict_pre_hook(_keep_own_heads)
        self.part = part
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
        gate_dim = config.gate_dim or head_dim
        if not config.q_linear and gate_dim != head_dim:
            raise ValueError(f"gate_dim must be the head dim {head_dim} without a q linear, got {gate_dim}")
        if config.rope and (inv_freq is None or inv_freq.shape != (gate_dim // 2,)):
            got = None if inv_freq is None else list(inv_freq.shape)
            raise ValueError(f"inv_freq must be [{gate_dim // 2}] for a gate with RoPE, got {got}")
        pairing = pairing or Pairing(gate_dim)
        if pairing.width % 2 or not 2 <= pairing.width <= gate_dim:
            raise ValueError(f"pairing must rotate an even number of 2 to {gate_dim} channels, got {pairing.width}")
        self.config, self.pairing = config, pairing
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim, self.gate_dim = head_dim, gate_dim
        self.group = num_heads // num_kv_heads
        self.mask_heads = num_kv_heads if config.share == "kv_group" else num_heads

        members = self.group if config.share == "kv_group" else 1
        if config.q_linear:
            q_width = members * len(config.q_pooling) * head_dim
            self.q_weight = nn.Parameter(torch.empty(self.mask_heads, q_width, gate_dim))
        else:
            self.register_parameter("q_weight", None)
        # Without a q linear the k linear must tell the query heads of a group apart: one matrix a query head, as
        # published. With one, a matrix a KV head is enough.
        k_heads = num_kv_heads if config.q_linear else num_heads
        self.k_weight = nn.Parameter(torch.empty(k_heads, len(config.k_pooling) * head_dim, gate_dim))
        for name, kinds, heads in (
            ("q_salience", config.q_pooling, num_heads),
            ("k_salience", config.k_pooling, num_kv_heads),
        ):
            learned = nn.Parameter(torch.zeros(heads, head_dim)) if "salient" in kinds else None
            self.register_parameter(name, learned)
        self.q_norm = nn.RMSNorm(gate_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(gate_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        if config.distance_bias:
            self.distance_bias = nn.Parameter(torch.zeros(self.mask_heads, config.distance_bias))
        else:
            self.register_parameter("distance_bias", None)
        self.register_buffer("inv_freq", inv_freq.float() if config.rope else None, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the linears anew as `config.init` says; learned pooling starts as the plain average."""
        for salience in (self.q_salience, self.k_salience):
            if salience is not None:
                nn.init.zeros_(salience)
        for weight, kinds, members in (
            (self.q_weight, self.config.q_pooling, self.group if self.config.share == "kv_group" else 1),
            (self.k_weight, self.config.k_pooling, 1),
        ):
            if weight is None:
                continue
            nn.init.normal_(weight, std=NOISE[self.config.init])
            mean = next((kind for kind in ("avg", "salient") if kind in kinds), None)
            if self.config.init == "identity" and mean is not None:
                self._add_identity(weight, kinds.index(mean), len(kinds), members)

    def _add_identity(self, weight: Tensor, kind: int, kinds: int, members: int) -> None:
        eye = torch.eye(self.head_dim, self.gate_dim, dtype=weight.dtype, device=weight.device) / members
        with torch.no_grad():
            blocks = weight.view(weight.shape[0], members, kinds, self.head_dim, self.gate_dim)
            blocks[:, :, kind] += eye

    def gate_queries(self, q: Tensor | Pooled, start: int = 0, rows: Tensor | None = None) -> Tensor:
        """Projects queries to ``[B, Hm, Wq, DG]``.

        Args:
            q: queries before RoPE ``[B, H, T, D]`` at positions from ``start`` on, or the same pooled: into the gate's
                own windows, or into windows of one token, which a gate with learned pooling needs.
            start: position of the first query; what is pooled has its own.
            rows: see `forward`.
        """
        c = self.config
        q = self._pooled(q, start, c.q_size, c.q_pooling, self.q_salience)
        pooled = q.features
        positions = block_positions(q.start, pooled.shape[2], c.q_size, pooled.device)
        if rows is not None:
            # A copy that waited would leave the device idle until all that follows it is launched.
            windows = self._windows(rows, q.length).to(pooled.device, non_blocking=True)
            pooled, positions = pooled[:, :, windows], positions[windows]
        return self._place(self._projected(pooled), positions, q.inv_freq)

    def _projected(self, pooled: Tensor) -> Tensor:
        """Gate queries ``[B, Hm, Wq, DG]`` before they rotate, of pooled ones ``[B, H, Wq, kinds * D]``."""
        if self.config.share == "kv_group":
            batch, _, windows, width = pooled.shape
            if windows > 1:
                pooled = pooled.view(batch, self.num_kv_heads, self.group, windows, width).transpose(2, 3)
            pooled = pooled.reshape(batch, self.num_kv_heads, windows, self.group * width)
        if self.q_weight is not None:
            pooled = pooled @ self.q_weight
        return self.q_norm(pooled)

    def gate_keys(self, k: Tensor | Pooled, start: int = 0) -> Tensor:
        """Projects keys to ``[B, h, Wk, DG]``; arguments are those of `gate_queries`, with ``HKV`` heads.

        Keys of finished sub-blocks never change, so a caller may cache them, as long as the model's frequencies stay.
        ``h`` is ``HKV``, or ``H`` for a gate without a q linear.
        """
        c = self.config
        k = self._pooled(k, start, c.k_size, c.k_pooling, self.k_salience)
        pooled = k.features
        if self.k_weight.shape[0] != self.num_kv_heads:
            pooled = pooled.repeat_interleave(self.group, dim=1)
        positions = block_positions(k.start, pooled.shape[2], c.k_size, pooled.device)
        return self._place(self.k_norm(pooled @ self.k_weight), positions, k.inv_freq)

    def _pooled(
        self, x: Tensor | Pooled, start: int, size: int, kinds: tuple[str, ...], salience: Tensor | None
    ) -> Pooled:
        inv_freq = None
        if isinstance(x, Pooled):
            # Where a window is one token, learned pooling runs all the same, so that its gradient is zero, not missing.
            if x.size == size and (salience is None or size > 1):
                return x
            if x.size != 1:
                raise ValueError(f"pooled tokens must come in windows of {size} tokens or 1, got {x.size}")
            x, start, inv_freq = x.features, x.start, x.inv_freq
        features = pool_blocks(x, size=size, start=start, kinds=kinds, salience=salience)
        return Pooled(features, size, start, x.shape[2], inv_freq)

    def _place(self, x: Tensor, positions: Tensor, inv_freq: Tensor | None) -> Tensor:
        if self.inv_freq is None:
            return x
        return rotate(x, positions, self.inv_freq if inv_freq is None else inv_freq, self.pairing)

    def _windows(self, rows: Tensor, length: int) -> Tensor:
        """Numbers of the query sub-blocks of some query blocks of ``length`` tokens, on the host."""
        pieces = self.config.query_subblocks
        windows = (rows.cpu()[:, None] * pieces + torch.arange(pieces)).flatten()
        return windows[windows * self.config.q_size < length]

    def scores(self, gate_q: Tensor, gate_k: Tensor, *, q_start: int, q_len: int, rows: Tensor | None = None) -> Tensor:
        """Block scores from projected queries and keys.

        Args:
            gate_q: ``[B, Hm, Wq, DG]`` of the ``q_len`` queries from position ``q_start`` on.
            gate_k: ``[B, h, Wk, DG]`` of all keys ``0 .. q_start + q_len``.
            q_start: position of the first query.
            q_len: number of queries.
            rows: see `forward`; ``gate_q`` then holds their queries alone.

        Returns:
            fp32 ``[B, Hm, Nq, Nk]``, -inf for blocks without a causal pair. Logits over key blocks: their softmax is
            the predicted row of the map that is the gate's target.
        """
        c = self.config
        q_size, k_size = c.q_size, c.k_size
        batch, heads, windows, _ = gate_q.shape
        num_k_blocks = -(-gate_k.shape[2] // c.key_subblocks)
        numbers = q_start // q_size + torch.arange(windows) if rows is None else self._windows(rows, q_len)
        budget = STRIP_ELEMENTS_CPU if gate_q.device.type == "cpu" else STRIP_ELEMENTS_DEVICE
        per_strip = budget // max(1, batch * heads * gate_k.shape[2] * c.query_subblocks)
        strip = max(1, per_strip) * c.query_subblocks
        # Strips are cut on block boundaries, so that all sub-blocks of a block lie in one strip.
        edges = [0, *range(strip - int(numbers[0]) % c.query_subblocks, windows, strip), windows]
        rows = []
        for begin, end in pairwise(edges):
            last = min((int(numbers[end - 1]) + 1) * q_size, q_start + q_len) - 1
            keys = gate_k[:, :, : last // k_size + 1]
            args = (gate_q[:, :, begin:end], keys, numbers[begin:end], last)
            if torch.is_grad_enabled() and len(edges) > 2:
                row = checkpoint(self._strip_scores, *args, use_reentrant=False)
            else:
                row = self._strip_scores(*args)
            rows.append(F.pad(row, (0, num_k_blocks - row.shape[-1]), value=-torch.inf))
        return torch.cat(rows, dim=2)

    def _strip_scores(self, gate_q: Tensor, gate_k: Tensor, numbers: Tensor, last: int) -> Tensor:
        """Scores of the query sub-blocks of ascending ``numbers [Wq]``, on the host; the last token is at ``last``."""
        c = self.config
        q_size, k_size = c.q_size, c.k_size
        device, first_window = gate_q.device, int(numbers[0])
        s = self._products(gate_q, gate_k)
        q_window = numbers.to(device, non_blocking=True)
        k_window = torch.arange(s.shape[-1], device=device)
        if self.distance_bias is not None:
            s = s + self._bias(q_window // c.query_subblocks, k_window)
        q_last = ((q_window + 1) * q_size - 1).clamp(max=last)
        # Only windows from the first query on can lie ahead of a query.
        ahead = first_window * q_size // k_size + 1
        s[..., ahead:].masked_fill_(k_window[ahead:] * k_size > q_last[:, None], HIDDEN)
        if c.target_keys == "sum":
            # A row's log-sum-exp is that of its blocks', a sixteenth of the scores of 16 sub-blocks.
            s = self._over_queries(self._normalized(self._over_keys(s)), first_window)
        elif c.target == PUBLISHED:
            # Two maxima may take queries first, along whole lines of memory: a tenth of the time of a gate on a CPU.
            s = self._over_keys(self._over_queries(self._normalized(s), first_window))
        else:
            s = self._over_queries(self._over_keys(self._normalized(s)), first_window)
        return s.masked_fill(s < HIDDEN / 2, -torch.inf)

    def token_angles(self, positions: Tensor, inv_freq: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """How single queries at ``positions [R]`` rotate, see `token_queries`; None of a gate that does not rotate."""
        if self.inv_freq is None:
            return None
        starts = positions.div(self.config.q_size, rounding_mode="floor") * self.config.q_size
        return angles(starts, self.inv_freq if inv_freq is None else inv_freq)

    def token_queries(self, tokens: Pooled, positions: Tensor, factors: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Projects single queries, each as a query block of which it alone is there, to ``[B, Hm, R, DG]``.

        Whatever the pooling, a window of one token is that token. It rotates at the first position of its sub-block.

        Args:
            tokens: single queries before RoPE, windows of one token, ``[B, H, R, D]``.
            positions: int64 ``[R]``, where they stand, on the device of the queries.
            factors: their `token_angles`, if they are known already.
        """
        # Learned pooling runs all the same where it is trained, so that its gradient is zero, not missing.
        pooled = pool_blocks(tokens.features, size=1, start=0, kinds=self.config.q_pooling, salience=self.q_salience)
        gate_q, factors = self._projected(pooled), factors or self.token_angles(positions, tokens.inv_freq)
        return gate_q if factors is None else turn(gate_q, factors, self.pairing)

    def token_scores(self, gate_q: Tensor, gate_k: Tensor, positions: Tensor) -> Tensor:
        """Scores of single tokens over the blocks that are finished before them.

        Args:
            gate_q: ``[B, Hm, R, DG]``, see `token_queries`.
            gate_k: ``[B, h, W, DG]``, gate keys from the first one on.
            positions: int64 ``[R]``, where the tokens stand, on the device of the queries.

        Returns:
            fp32 ``[B, Hm, R, N]`` for the ``N`` blocks that the gate keys are of, -inf for those that a token's own
            block or a later one is. Logits, see `scores`.
        """
        batch, heads, count, _ = gate_q.shape
        budget = STRIP_ELEMENTS_CPU if gate_q.device.type == "cpu" else STRIP_ELEMENTS_DEVICE
        strip = max(1, budget // max(1, batch * heads * gate_k.shape[2]))
        if count <= strip:
            return self._token_scores(gate_q, gate_k, positions)
        found = []
        for part, at in zip(gate_q.split(strip, 2), positions.split(strip)):
            args = (part, gate_k, at)
            if torch.is_grad_enabled():
                found.append(checkpoint(self._token_scores, *args, use_reentrant=False))
            else:
                found.append(self._token_scores(*args))
        return torch.cat(found, 2)

    def _token_scores(self, gate_q: Tensor, gate_k: Tensor, positions: Tensor) -> Tensor:
        c = self.config
        s = self._products(gate_q, gate_k)
        window = torch.arange(s.shape[-1], device=s.device)
        if self.distance_bias is not None:
            s = s + self._bias(positions.div(c.block_q, rounding_mode="floor"), window)
        finished = positions.div(c.block_k, rounding_mode="floor")
        s = s.masked_fill(window >= finished[:, None] * c.key_subblocks, HIDDEN)
        s = self._over_keys(self._normalized(s))
        return s.masked_fill(s < HIDDEN / 2, -torch.inf)

    def _products(self, gate_q: Tensor, gate_k: Tensor) -> Tensor:
        """Products ``[B, Hm, Wq, Wk]`` of gate queries and gate keys."""
        batch, heads, windows, _ = gate_q.shape
        # Told in full: there may be no query at all.
        shared = gate_k.shape[1]
        grouped = gate_q.reshape(batch, shared, heads // shared * windows, self.gate_dim)
        products = grouped * self.gate_dim**-0.5 @ gate_k.transpose(-1, -2)
        return products.view(batch, heads, windows, gate_k.shape[2])

    def _bias(self, q_block: Tensor, k_window: Tensor) -> Tensor:
        """Bias by distance ``[Hm, Wq, Wk]`` of query blocks ``[Wq]`` and key sub-blocks ``[Wk]``."""
        c = self.config
        distance = q_block[:, None] * c.block_q - k_window // c.key_subblocks * c.block_k
        return self.distance_bias[:, (distance // c.block_k).clamp(0, c.distance_bias - 1)]

    def _normalized(self, s: Tensor) -> Tensor:
        return s.log_softmax(-1) if self.config.normalize_subblocks else s

    def _over_keys(self, s: Tensor) -> Tensor:
        """Scores ``[.., Wk]`` of key sub-blocks as those of key blocks."""
        pieces = self.config.key_subblocks
        if pieces == 1:
            return s
        s = F.pad(s, (0, -s.shape[-1] % pieces), value=HIDDEN).unflatten(-1, (-1, pieces))
        return s.amax(-1) if self.config.target_keys == "max" else s.logsumexp(-1)

    def _over_queries(self, s: Tensor, first_window: int) -> Tensor:
        """Scores ``[B, Hm, Wq, ..]`` of query sub-blocks from ``first_window`` on as those of query blocks."""
        pieces, power = self.config.query_subblocks, self.config.target_power
        if pieces == 1:
            return s
        head = first_window % pieces
        ends = (head, -(head + s.shape[2]) % pieces)
        count = F.pad(torch.ones(s.shape[2], device=s.device), ends).view(-1, pieces).sum(1)
        s = F.pad(s, (0, 0, *ends), value=HIDDEN).unflatten(2, (-1, pieces))
        return s.amax(3) if power is None else ((s * power).logsumexp(3) - count.log()[:, None]) / power

    def forward(self, q: Tensor | Pooled, k: Tensor | Pooled, rows: Tensor | None = None) -> Tensor:
        """Scores the last ``T`` tokens as queries against all ``S`` keys.

        Args:
            q: queries before RoPE ``[B, H, T, D]``, any float dtype, or the same pooled.
            k: keys before RoPE ``[B, HKV, S, D]``, the first at position 0, ``T <= S``, or the same pooled.
            rows: int64 ``[R]``, ascending query blocks to score, of a whole sequence (``T == S``); by default all.

        Returns:
            fp32 ``[B, Hm, Nq, Nk]``, see `scores`; with ``rows`` those rows alone, ``[B, Hm, R, Nk]``.
        """
        q_len, k_len = (x.length if isinstance(x, Pooled) else x.shape[2] for x in (q, k))
        if not 1 <= q_len <= k_len:
            raise ValueError(f"k must hold the keys of all queries and of the past, got T = {q_len}, S = {k_len}")
        start = k_len - q_len
        if rows is not None and start:
            raise ValueError(f"q must be a whole sequence to score some of its rows, got T = {q_len}, S = {k_len}")
        gate_q, gate_k = self.gate_queries(q, start, rows), self.gate_keys(k)
        return self.scores(gate_q, gate_k, q_start=start, q_len=q_len, rows=rows)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}/{self.num_kv_heads}, head_dim={self.head_dim}, gate_dim={self.gate_dim}"


def _keep_own_heads(gate: AttnGate, state_dict: dict[str, Tensor], prefix: str, *others: object) -> None:
    """Pre-hook of loading: of the weights of a whole gate those of the heads of this process."""
    names = [name for name, _ in gate.named_parameters() if f"{prefix}{name}" in state_dict]
    whole = {name: state_dict[f"{prefix}{name}"] for name in names}
    for name, x in heads_of_gate(whole, gate.config, gate.part).items():
        state_dict[f"{prefix}{name}"] = x


def parameter_count(config: AttnGateConfig, *, layers: int, num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """Parameters of the gates of a whole model, counted without allocating them."""
    inv_freq = torch.empty((config.gate_dim or head_dim) // 2) if config.rope else None
    with torch.device("meta"):
        gate = AttnGate(config, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, inv_freq=inv_freq)
    return layers * sum(math.prod(p.shape) for p in gate.parameters())
