"""Where MInference's plans come from: a search over a model, or a file of the official repository."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from seerattn.data.windows import Window, cut_windows
from seerattn.methods.head_rules import HeadRules, describe_model
from seerattn.methods.lines import keep_best, sum_diagonals, token_density
from seerattn.methods.minference.patterns import (
    BLOCK_SPARSE_TOKENS,
    DENSEST,
    SPARSEST,
    Estimate,
    HeadRule,
    Pattern,
)
from seerattn.methods.search import Progress, Search
from seerattn.ops.block_sparse_attention import block_sparse_attention
from seerattn.ops.checks import BLOCK_SIZES
from seerattn.options import option
from seerattn.selection.block_indices import BlockIndices
from seerattn.texts import parse_json

if TYPE_CHECKING:
    from seerattn.hf.capture import AttentionCall
    from seerattn.hf.eval_model import EvalModel

Variant = Literal["paper", "repository"]

# Table 1 of the paper's appendix.
PAPER_SPACE = (
    HeadRule("a_shape", 1024, 4096),
    HeadRule("vertical_slash", 30, 2048),
    HeadRule("vertical_slash", 100, 1800),
    HeadRule("vertical_slash", 500, 1500),
    HeadRule("vertical_slash", 3000, 200),
    HeadRule("block_sparse", tokens=BLOCK_SPARSE_TOKENS),
)
# The repository's, and what its search turns block-sparse heads into.
REPOSITORY_LINES = (
    HeadRule("a_shape", 100, 800),
    HeadRule("vertical_slash", 30, 800),
    HeadRule("vertical_slash", 100, 750),
    HeadRule("vertical_slash", 500, 700),
    HeadRule("vertical_slash", 3500, 100),
)
REPOSITORY_FALLBACK = HeadRule("vertical_slash", 1000, 6096)
# In the repository's search: tokens of the sample, first columns and nearest offsets that are forced, the row from
# which on mass counts, and the block-sparse candidate, an eighth of all blocks of 32.
_SEARCH_TOKENS = 30_000
_SEARCH_FORCED = 30
_SEARCH_FIRST_ROW = 2500
_SEARCH_BLOCK, _SEARCH_BLOCK_SHARE = 32, 8

_FIT_STEPS = 18
# Attention probabilities held at once.
_STRIP_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}

_OFFICIAL: dict[str, Pattern] = {
    "vertical_and_slash": "vertical_slash",
    "stream_llm": "a_shape",
    "block_sparse": "block_sparse",
}


@dataclass(frozen=True, kw_only=True)
class MInferenceSearch(Search):
    """Searches the rules of all heads of a model, one layer at a time while dense attention runs.

    Both variants were published for one sample of 30k tokens. "paper" scales its candidates to the density in any case;
    on shorter windows "repository" shrinks all of its sizes in proportion, or 3500 columns would win by being
    everything. Over several windows scores are averaged, scales in the logarithm.

    Attributes:
        variant: "paper" scales every candidate of the paper's space to the target density and keeps the one whose
            output is nearest to that of dense attention (Algorithm 1); "repository" keeps the candidate of fixed sizes
            that recalls most attention mass, and rewrites it as its ``search_pattern`` does: A-shape becomes
            vertical-slash of the same sizes, block-sparse becomes vertical-slash (1000, 6096).
        density: block density that every candidate of "paper" realises; None is .2, and for "repository" nothing.
    """

    method = "minference"

    variant: Variant = option("paper", help="paper: least error of the output; repository: most attention mass.")
    density: float | None = option(
        None, help="Block density of every candidate of paper; default 0.2.", above=0, below=1
    )
    windows: int = option(1, help="Windows to search on, drawn from all of the data.", low=1)
    official: Path | None = option(None, help="Take over a plan (JSON) of the official repository, without a search.")
    block_q: int = option(64, help="Query block size in tokens.")
    block_k: int = option(64, help="Key block size in tokens.")

    def check(self) -> None:
        super().check()
        if self.variant == "repository" and self.density is not None:
            raise ValueError(
                f"density must be left out of the repository's search, whose sizes are fixed, got {self.density:g}"
            )
        if self.official is not None and not self.official.is_file():
            raise ValueError(f"official must be a file, got {self.official}")
        if self.variant == "paper" and self.density is None:
            object.__setattr__(self, "density", 0.2)
        for name in ("block_q", "block_k"):
            if getattr(self, name) not in BLOCK_SIZES:
                raise ValueError(f"{name} must be one of {', '.join(map(str, BLOCK_SIZES))}, got {getattr(self, name)}")

    @property
    def needs_text(self) -> bool:
        return self.official is None

    def made(self, model: EvalModel, documents: Sequence[Sequence[int]]) -> dict[str, Any]:
        if self.official is not None:
            return read_official(self.official, describe_model(model.model.config)).made
        found = super().made(model, documents)
        del found["official"]
        return found

    def run(
        self, model: EvalModel, documents: Sequence[Sequence[int]], *, progress: Progress | None = None
    ) -> HeadRules:
        """Searches; ``made["found"]`` has the densities that the rules realise on the same windows: of blocks, of the
        causal pairs on its lines, and the number of heads of each pattern.

        Raises:
            ValueError: the density is below that of the blocks that every pattern keeps, or there is too little text.
        """
        if self.official is not None:
            return read_official(self.official, describe_model(model.model.config))
        cut = cut_windows(documents, context=self.context, count=None, bos_token_id=model.bos_token_id)
        windows = draw_windows(cut, self.windows, self.seed)
        search = _PaperSearch(self) if self.variant == "paper" else _RepositorySearch(self)
        model.watch(windows, search.see, advance=progress and progress("searching", len(windows)))
        layers = model.model.config.get_text_config().num_hidden_layers
        rules = [search.rules(layer) for layer in range(layers)]
        meter = _DensityCheck(rules, self)
        model.watch(windows, meter.see, advance=progress and progress("measuring density", len(windows)))
        return self.rules(model, documents, [[rule.to_dict() for rule in heads] for heads in rules], meter.found())


def draw_windows(windows: Sequence[Window], count: int, seed: int) -> list[Window]:
    """Some windows at random.

    Raises:
        ValueError: there are too few.
    """
    if not 0 < count <= len(windows):
        raise ValueError(
            f"windows must be between 1 and the {len(windows)} that the data has at this context, got {count}"
        )
    return random.Random(seed).sample(list(windows), count)


def read_official(path: Path, model: dict[str, Any]) -> HeadRules:
    """Reads a plan of the official repository: a list with ``{"0": ["vertical_and_slash", v, s, score], ...}`` a layer.

    Block-sparse entries become 100 blocks of 64 whatever their sizes, as the official kernel runs them.

    Args:
        path: the JSON file.
        model: the model that it must be for, as of `describe_model`.

    Raises:
        ValueError: not such a file, or one of another number of layers or heads.
    """
    content = path.read_bytes()
    try:
        layers = parse_json(content)
        rules = [{int(head): _official_rule(*entry) for head, entry in heads.items()} for heads in layers]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"an official plan must be a list with one object a layer, of heads with "
            f"[{' or '.join(_OFFICIAL)}, columns, offsets, score], got {path}: {error}"
        ) from error
    found = {"layers": len(rules), "heads": len(rules[0]) if rules else 0}
    every = list(range(found["heads"]))
    if any(sorted(heads) != every for heads in rules) or any(found[name] != model[name] for name in found):
        raise ValueError(
            f"an official plan must have the model's {model['layers']} layers of {model['heads']} heads, "
            f"got {found['layers']} of {found['heads']} in {path}"
        )
    dicts = [[heads[head].to_dict() for head in every] for heads in rules]
    made = {"variant": "official", "source": path.name, "content": hashlib.sha256(content).hexdigest()[:12]}
    return HeadRules(MInferenceSearch.method, model, dicts, made)


def _official_rule(name: str, columns: int, offsets: int, _score: float) -> HeadRule:
    if name not in _OFFICIAL:
        raise ValueError(f"unknown pattern {name!r}")
    pattern = _OFFICIAL[name]
    if pattern == "block_sparse":
        return HeadRule(pattern, tokens=BLOCK_SPARSE_TOKENS)
    return HeadRule(pattern, columns, offsets)


class _PaperSearch:
    """Algorithm 1: candidates at equal cost, the least error of the output."""

    def __init__(self, settings: MInferenceSearch) -> None:
        self._settings = settings
        # By layer and window, [candidates, heads].
        self._errors: dict[int, list[Tensor]] = {}
        self._log_scales: dict[int, list[Tensor]] = {}

    def see(self, call: AttentionCall) -> None:
        estimate = _estimate(call, self._settings)
        dense = call.output.transpose(1, 2).float()
        errors, log_scales = [], []
        for candidate in PAPER_SPACE:
            scales = fit_scales(estimate, candidate, self._settings.density)
            out = _sparse_output(call, estimate.mask([replace(candidate, scale=scale) for scale in scales]), estimate)
            errors.append(_relative_error(out, dense))
            log_scales.append(torch.tensor(scales, dtype=torch.float64).log())
        self._errors.setdefault(call.layer, []).append(torch.stack(errors))
        self._log_scales.setdefault(call.layer, []).append(torch.stack(log_scales))

    def rules(self, layer: int) -> list[HeadRule]:
        if layer not in self._errors:
            return []
        best = _mean(self._errors[layer]).argmin(0).tolist()
        scales = _mean(self._log_scales[layer]).exp()
        return [replace(PAPER_SPACE[i], scale=float(f"{scales[i, head]:.6g}")) for head, i in enumerate(best)]


class _RepositorySearch:
    """``search_pattern`` of the repository: the most attention mass, then every head made vertical-slash."""

    def __init__(self, settings: MInferenceSearch) -> None:
        self._scale = repository_scale(settings.context)
        self._recalls: dict[int, list[Tensor]] = {}

    def see(self, call: AttentionCall) -> None:
        self._recalls.setdefault(call.layer, []).append(recalled_mass(call))

    def rules(self, layer: int) -> list[HeadRule]:
        if layer not in self._recalls:
            return []
        recall = _mean(self._recalls[layer]).T.tolist()
        best = [max(range(len(head)), key=head.__getitem__) for head in recall]
        space = [*REPOSITORY_LINES, REPOSITORY_FALLBACK]
        return [replace(space[i], pattern="vertical_slash", scale=self._scale) for i in best]


def repository_scale(tokens: int) -> float:
    """Factor on the sizes of the repository's search in a window of so many tokens."""
    return min(1.0, tokens / _SEARCH_TOKENS)


class _DensityCheck:
    """Densities that rules realise."""

    def __init__(self, rules: list[list[HeadRule]], settings: MInferenceSearch) -> None:
        self._rules, self._settings = rules, settings
        self._blocks: list[float] = []
        self._tokens: list[float] = []

    def see(self, call: AttentionCall) -> None:
        rules = self._rules[call.layer]
        estimate = _estimate(call, self._settings)
        density = _block_density(estimate.mask(rules), estimate)
        tokens = token_density(*estimate.lines(rules), q_len=call.query.shape[2])[0]
        pooled = torch.tensor([rule.pattern == "block_sparse" for rule in rules], device=density.device)
        self._blocks.append(float(density.mean()))
        self._tokens.append(float(torch.where(pooled, density, tokens).mean()))

    def found(self) -> dict[str, Any]:
        patterns = [rule.pattern for heads in self._rules for rule in heads]
        return {
            "density": round(sum(self._blocks) / len(self._blocks), 6),
            "token_density": round(sum(self._tokens) / len(self._tokens), 6),
            "heads": {pattern: patterns.count(pattern) for pattern in get_args(Pattern)},
        }


def fit_scales(estimate: Estimate, candidate: HeadRule, density: float) -> list[float]:
    """For each head the scale of a candidate whose realised block density comes nearest to the target.

    Raises:
        ValueError: the blocks that every pattern keeps are more than that.
    """
    heads = estimate.shape[1]

    def realised(log_scale: Tensor) -> Tensor:
        rules = [replace(candidate, scale=2.0**x) for x in log_scale.tolist()]
        return _block_density(estimate.mask(rules), estimate).cpu()

    low = torch.full((heads,), math.log2(SPARSEST), dtype=torch.float64)
    high = torch.full((heads,), math.log2(DENSEST), dtype=torch.float64)
    below, above = realised(low), realised(high)
    if bool((below > density).any()):
        raise ValueError(
            f"density must be at least that of the blocks that every head keeps, {float(below.max()):.3f} at this "
            f"context, got {density:g}; use a longer context, smaller blocks or a higher density"
        )
    for _ in range(_FIT_STEPS):
        middle = (low + high) / 2
        found = realised(middle)
        under = found <= density
        low, below = torch.where(under, middle, low), torch.where(under, found, below)
        high, above = torch.where(under, high, middle), torch.where(under, above, found)
    nearest = torch.where(density - below <= above - density, low, high)
    return [2.0**x for x in nearest.tolist()]


def recalled_mass(call: AttentionCall) -> Tensor:
    """Attention mass on each of the repository's candidates, averaged over late queries: float64 ``[6, H]``.

    The last candidate is the block-sparse one. Lines are what they are, not their blocks, and no diagonal is forced.
    """
    q, k = call.query, call.key
    heads, kv_heads, k_len = q.shape[1], k.shape[1], k.shape[2]
    if q.shape[0] != 1 or q.shape[2] != k_len:
        raise ValueError(f"a search must see whole windows one by one, got queries {list(q.shape)} and {k_len} keys")
    context = call.context
    estimate = Estimate.of(q, k, context, block_q=_SEARCH_BLOCK, block_k=_SEARCH_BLOCK)
    scale = repository_scale(k_len)
    lines = [_search_lines(estimate, rule, scale) for rule in REPOSITORY_LINES]
    blocks = estimate.causal.shape[1]
    best = keep_best(
        estimate.pooled.masked_fill(~estimate.causal, -torch.inf),
        torch.full((heads,), blocks // _SEARCH_BLOCK_SHARE, device=q.device),
    )
    first = int(_SEARCH_FIRST_ROW * scale)
    mass = torch.zeros(len(lines) + 1, heads, dtype=torch.float64, device=q.device)
    keys = k.float().transpose(-1, -2)
    at_once = max(1, _STRIP_ELEMENTS["cpu" if q.device.type == "cpu" else "cuda"] // (heads * k_len))
    for begin in range(first, k_len, at_once):
        end = min(begin + at_once, k_len)
        position = torch.arange(begin, end, device=q.device)[:, None]
        rows = (q[:, :, begin:end].float() * call.scale).reshape(1, kv_heads, -1, q.shape[3])
        logits = (rows @ keys[..., :end]).view(heads, -1, end)
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        logits.masked_fill_(torch.arange(end, device=q.device) > position, -torch.inf)
        p = logits.softmax(-1)
        if call.sinks is not None:
            p *= torch.sigmoid(logits.logsumexp(-1) - call.sinks.float()[:, None])[..., None]
        by_offset = sum_diagonals(p)
        for i, (columns, offsets) in enumerate(lines):
            mass[i] += (by_offset * offsets[0, :, :end]).sum(-1) + _mass_off_diagonals(p, columns[0], offsets[0], begin)
        kept = best[0][:, (position // _SEARCH_BLOCK).flatten()].repeat_interleave(_SEARCH_BLOCK, -1)[..., :end]
        mass[-1] += p.masked_fill(~kept, 0).sum((-1, -2))
    return (mass / (k_len - first)).cpu()


def _mass_off_diagonals(p: Tensor, columns: Tensor, offsets: Tensor, begin: int) -> Tensor:
    """Mass on columns of ``p [H, rows, end]`` that lies on no offset, ``[H]``; all heads have as many columns."""
    heads, rows, end = p.shape
    place = columns.nonzero()[:, 1].view(heads, 1, -1)
    # Slots that hold a key up to here in some head; what lies in the future has no mass, wherever it is looked up.
    place = place[..., (place < end).flatten(0, 1).any(0)]
    distance = torch.arange(begin, end, device=p.device)[:, None] - place
    on_offset = offsets.gather(1, distance.clamp(min=0).flatten(1)).view(distance.shape)
    on_columns = p.gather(2, place.clamp(max=end - 1).expand(-1, rows, -1))
    return on_columns.masked_fill(on_offset | (place >= end), 0).sum((-1, -2))


def _search_lines(estimate: Estimate, rule: HeadRule, scale: float) -> tuple[Tensor, Tensor]:
    """Lines as the repository's search draws them, with fewer forced offsets than its kernel."""
    heads = estimate.shape[1]
    if rule.pattern == "a_shape":
        return estimate.lines([rule] * heads, scale)
    forced = math.ceil(_SEARCH_FORCED * scale)
    kept = []
    for scores, size in ((estimate.vertical, rule.columns), (estimate.slash, rule.offsets)):
        raised = scores.clone()
        raised[..., :forced] = torch.inf
        kept.append(keep_best(raised, torch.full((heads,), math.ceil(size * scale), device=scores.device)))
    return kept[0], kept[1]


def _estimate(call: AttentionCall, settings: MInferenceSearch) -> Estimate:
    return Estimate.of(call.query, call.key, call.context, block_q=settings.block_q, block_k=settings.block_k)


def _block_density(mask: Tensor, estimate: Estimate) -> Tensor:
    """Float64 ``[H]`` of the only batch row."""
    return mask[0].sum((-1, -2)).double() / estimate.causal.sum()


def _sparse_output(call: AttentionCall, mask: Tensor, estimate: Estimate) -> Tensor:
    blocks = BlockIndices.from_mask(
        mask,
        block_q=estimate.block_q,
        block_k=estimate.block_k,
        q_start=call.key.shape[2] - call.query.shape[2],
        q_len=call.query.shape[2],
    )
    return block_sparse_attention(call.query, call.key, call.value, blocks, **call.context.logits).float()


def _relative_error(out: Tensor, dense: Tensor) -> Tensor:
    """``||out - dense|| / ||dense||`` of each head, float64 ``[H]``."""
    norms = [x.transpose(0, 1).flatten(1).norm(dim=1) for x in (out - dense, dense)]
    return (norms[0] / norms[1]).double().cpu()


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(0)
