"""Losses and recall against fp64 loops over rows."""

import math

import pytest
import torch
from torch import Tensor

from seerattn.selection.target_map import group_target, target_recall
from seerattn.training.losses import gate_loss

B, H, N = 2, 4, 6


def causal(n: int) -> Tensor:
    return torch.ones(n, n).tril().bool()


def maps(seed: int = 0, n: int = N) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(B, H, n, n, generator=g).masked_fill(~causal(n), -math.inf)
    target = torch.rand(B, H, n, n, generator=g) * causal(n)
    target = target / target.sum(-1, keepdim=True)
    target[0, :, -1] = 0  # a row of padding
    return scores, target


def row_loss(s: Tensor, t: Tensor, kind: str) -> float:
    p = s.double().softmax(-1)
    if kind == "kl":
        return sum(float(a * (a / b).log()) for a, b in zip(t.double(), p) if a > 0)
    if kind in ("overlap", "ranking"):
        order = sorted(range(len(t)), key=lambda j: -float(t[j]))
        best = [j for j in order[: math.ceil(len(t) / 10)] if t[j] > 0]
        if kind == "overlap":
            return -math.log(sum(float(p[j]) for j in best))
        pairs = [(i, j) for i in best for j in range(len(t)) if j not in best]
        return sum(math.log1p(math.exp(float(s[j]) - float(s[i]))) for i, j in pairs) / max(len(pairs), 1)
    gaps = [float(abs(a - b)) for a, b in zip(t.double(), p)]
    if kind == "mse":
        return sum(x * x for x in gaps)
    return sum(0.5 * x * x if x < 1 else x - 0.5 for x in gaps)


KINDS = ["kl", "mse", "smooth_l1", "overlap", "ranking"]


@pytest.mark.parametrize("n", [N, 23])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row_weight", ["uniform", "mass"])
@pytest.mark.parametrize("forced", [False, True])
def test_loss_matches_a_loop_over_rows(kind, row_weight, forced, n) -> None:
    scores, target = maps(n=n)
    ignore = torch.eye(n, dtype=torch.bool) if forced else torch.zeros(n, n, dtype=torch.bool)
    ignore[:, 0] |= forced
    samples = []
    for b in range(B):
        total, weights = 0.0, 0.0
        for h in range(H):
            for i in range(n):
                use = causal(n)[i] & ~ignore[i]
                t = target[b, h, i][use].double()
                mass = float(t.sum())
                if mass == 0:
                    continue
                weight = mass if row_weight == "mass" else 1.0
                total += weight * row_loss(scores[b, h, i][use], t / mass, kind)
                weights += weight
        samples.append(total / weights)
    got = gate_loss(scores, target, ignore=ignore, kind=kind, row_weight=row_weight)
    assert float(got) == pytest.approx(sum(samples) / B, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_finite_where_rows_have_nothing_left(kind) -> None:
    scores, target = maps()
    scores.requires_grad_()
    ignore = torch.eye(N, dtype=torch.bool)
    ignore[:, 0] = True  # leaves nothing in the first two rows
    (gradient,) = torch.autograd.grad(gate_loss(scores, target, ignore=ignore, kind=kind), scores)
    assert bool(gradient.isfinite().all())
    assert not gradient[:, :, :2].any()
    assert bool(gradient[1, :, 2:].abs().sum() > 0)


def test_kl_is_zero_exactly_where_the_gate_is_the_target() -> None:
    _, target = maps()
    scores = target.double().log()
    assert abs(float(gate_loss(scores, target.double()))) < 1e-12


def test_kl_does_not_change_with_the_length_of_a_uniform_map() -> None:
    losses = []
    for n in (8, 64):
        scores = torch.zeros(1, 1, 1, n)
        scores[..., 0] = math.log(n - 1)  # the gate gives half of its mass to one block
        losses.append(float(gate_loss(scores.double(), torch.eye(n)[:1].view(1, 1, 1, n).double())))
    assert losses == pytest.approx([math.log(2)] * 2)


def test_no_rows_at_all_cost_nothing() -> None:
    scores, target = maps()
    assert float(gate_loss(scores, torch.zeros_like(target))) == 0.0


@pytest.mark.parametrize("row_weight", ["uniform", "mass"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_a_batch_is_the_mean_of_its_samples_alone(kind, row_weight) -> None:
    scores, target = maps()
    target[0, :, 2:] = 0  # few rows count
    alone = [gate_loss(scores[b : b + 1], target[b : b + 1], kind=kind, row_weight=row_weight) for b in range(B)]
    got = gate_loss(scores, target, kind=kind, row_weight=row_weight)
    assert float(got) == pytest.approx(float(sum(alone)) / B, rel=1e-6) and float(alone[0]) != float(alone[1])
    target[0] = 0
    got = gate_loss(scores, target, kind=kind, row_weight=row_weight)
    assert float(got) == pytest.approx(float(alone[1]) / B, rel=1e-6)


def test_group_target_is_the_normalised_maximum_of_the_group() -> None:
    _, target = maps()
    grouped = group_target(target, 2)
    for b in range(B):
        for m in range(2):
            for i in range(N):
                top = torch.maximum(target[b, 2 * m, i], target[b, 2 * m + 1, i]).double()
                expected = top / top.sum() if top.sum() > 0 else top
                assert torch.allclose(grouped[b, m, i].double(), expected, atol=1e-7)
    assert torch.equal(group_target(target, H), target)


def test_recall_is_the_mean_kept_share_of_rows_that_hold_a_query() -> None:
    _, target = maps()
    mask = torch.rand(B, 2, N, N, generator=torch.Generator().manual_seed(3)) < 0.5
    got = target_recall(mask, target)
    for b in range(B):
        for h in range(H):
            rows = [i for i in range(N) if target[b, h, i].sum() > 0]
            expected = sum(float(target[b, h, i][mask[b, h // 2, i]].sum()) for i in rows) / len(rows)
            assert float(got[b, h]) == pytest.approx(expected, abs=1e-6)


def test_unknown_kinds_are_rejected() -> None:
    scores, target = maps()
    with pytest.raises(ValueError, match="kind must be one of"):
        gate_loss(scores, target, kind="l1")
    with pytest.raises(ValueError, match="row_weight must be one of"):
        gate_loss(scores, target, row_weight="entropy")
