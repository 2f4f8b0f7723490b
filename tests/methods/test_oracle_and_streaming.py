from dataclasses import replace

import pytest
import torch

from seerattn.methods.a_shape import ShapeSelector
from seerattn.methods.oracle import OracleSelector
from seerattn.methods.streaming import StreamingSelector
from seerattn.ops.block_sparse_attention import block_sparse_attention
from seerattn.selection import AttentionContext, KeepAll, Threshold, TokenBudget, TopK
from seerattn.selection.map_form import PUBLISHED, MapForm

CONTEXT = AttentionContext(layer=0, scale=0.25, softcap=None, unrotate=lambda x, start: x.float())
SHAPES = [(200, 200, 64, 64), (7, 7, 64, 64), (70, 333, 64, 32), (1, 129, 32, 64), (256, 512, 64, 128)]


def qk(q_len: int, k_len: int, heads: int = 4, kv_heads: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, heads, k_len, 32, generator=generator)[:, :, k_len - q_len :]
    return q * 2, torch.randn(1, kv_heads, k_len, 32, generator=generator)


def rows_of(q_len: int, k_len: int, block_q: int) -> list[range]:
    """Positions of the queries of each query block."""
    start = k_len - q_len
    blocks = range(start // block_q, (k_len - 1) // block_q + 1)
    return [range(max(b * block_q, start), min((b + 1) * block_q, k_len)) for b in blocks]


@pytest.mark.parametrize(("q_len", "k_len", "block_q", "block_k"), SHAPES)
@pytest.mark.parametrize(("blocks", "sinks"), [(1, 1), (3, 1), (4, 2), (3, 0)])
def test_streaming_matches_a_loop_over_sinks_and_recent_blocks(q_len, k_len, block_q, block_k, blocks, sinks) -> None:
    policy = TokenBudget(tokens=blocks * block_k, sink_blocks=sinks)
    mask = StreamingSelector(policy, block_q, block_k).select(*qk(q_len, k_len), CONTEXT).to_mask()
    expected = torch.zeros_like(mask)
    for row, positions in enumerate(rows_of(q_len, k_len, block_q)):
        kept = {p // block_k for p in positions} | set(range(min(sinks, positions[-1] // block_k + 1)))
        for block in range(positions[-1] // block_k, -1, -1):
            if len(kept) >= blocks:
                break
            kept.add(block)
        expected[:, :, row, sorted(kept)] = True
    assert torch.equal(mask, expected)


def test_streaming_with_a_threshold_is_a_window_of_tokens() -> None:
    mask = (
        StreamingSelector(Threshold(threshold=-257, on="score", sink_blocks=1)).select(*qk(640, 640), CONTEXT).to_mask()
    )
    distance = torch.arange(10)[:, None] - torch.arange(10)
    assert torch.equal(mask[0, 0], ((distance >= 0) & (distance < 4)) | (torch.arange(10) == 0) & (distance >= 0))


@pytest.mark.parametrize("policy", [TopK(density=0.4, length=300), Threshold(threshold=-130, on="score")])
@pytest.mark.parametrize("kind", [OracleSelector, StreamingSelector])
def test_baselines_choose_the_same_in_chunks_cut_on_block_boundaries(kind, policy) -> None:
    q, k = qk(300, 300)
    whole = kind(policy).select(q, k, CONTEXT).to_mask()
    for begin, end in ((0, 128), (128, 192), (192, 300)):
        part = kind(policy).select(q[:, :, begin:end], k[:, :, :end], CONTEXT).to_mask()
        rows = slice(begin // 64, -(-end // 64))
        assert torch.equal(part, whole[:, :, rows, : part.shape[-1]])


def true_map(q, k, block_q: int, block_k: int, sinks: torch.Tensor | None = None, power=None) -> torch.Tensor:
    """fp64 softmax, tiles by loops - maxima, or power means of sums over keys - row-normalised: ``[H, Nq, Nk]``."""
    q_len, k_len = q.shape[2], k.shape[2]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.double() @ k.double().transpose(-1, -2) * CONTEXT.scale
    future = torch.arange(k_len) > torch.arange(k_len - q_len, k_len)[:, None]
    scores = scores.masked_fill(future, -torch.inf)
    if sinks is not None:
        column = sinks.double().view(1, -1, 1, 1).expand(1, -1, q_len, 1)
        scores = torch.cat((scores, column), dim=-1)
    p = scores.softmax(-1)[0, ..., :k_len]
    rows = rows_of(q_len, k_len, block_q)
    target = torch.zeros(q.shape[1], len(rows), -(-k_len // block_k), dtype=torch.float64)
    for i, positions in enumerate(rows):
        for j in range(target.shape[2]):
            first = positions[0] - (k_len - q_len)
            tile = p[:, first : first + len(positions), j * block_k : (j + 1) * block_k]
            target[:, i, j] = tile.amax((1, 2)) if power is None else (tile.sum(2) ** power).mean(1) ** (1 / power)
    return target / target.sum(-1, keepdim=True)


@pytest.mark.parametrize(("q_len", "k_len", "block_q", "block_k"), SHAPES)
@pytest.mark.parametrize("share", ["query_head", "kv_group"])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.0, 5.0, 9.0, -1.0])], ids=["plain", "sinks"])
@pytest.mark.parametrize("power", [None, 2.0])
def test_oracle_keeps_the_best_blocks_of_the_fp64_map(q_len, k_len, block_q, block_k, share, sinks, power) -> None:
    q, k = qk(q_len, k_len)
    policy = TokenBudget(tokens=3 * block_k, sink_blocks=0)
    selector = OracleSelector(policy, block_q, block_k, share, MapForm("sum", power) if power else PUBLISHED)
    mask = selector.select(q, k, replace(CONTEXT, sinks=sinks)).to_mask()[0]
    target = true_map(q, k, block_q, block_k, sinks, power)
    if share == "kv_group":
        target = target.view(2, 2, *target.shape[1:]).amax(1)
    assert mask.shape == target.shape
    for head in range(target.shape[0]):
        for row, positions in enumerate(rows_of(q_len, k_len, block_q)):
            forced = {p // block_k for p in positions}
            order = sorted(range(positions[-1] // block_k + 1), key=lambda j: -float(target[head, row, j]))
            free = [j for j in order if j not in forced][: max(0, 3 - len(forced))]
            assert set(mask[head, row].nonzero().flatten().tolist()) == forced | set(free)


def test_oracle_never_trades_an_underflown_block_for_one_of_the_future() -> None:
    q, k = qk(320, 320)
    k[:, :, :64] = q[:, ::2, -1:].sign() * 40
    selected = OracleSelector(TokenBudget(tokens=192, sink_blocks=0)).select(q * 40, k, CONTEXT)
    assert selected.counts[0].tolist() == [[1, 2, 3, 3, 3]] * 4


@pytest.mark.parametrize("density", [0.1, 0.3, 1.0])
def test_baselines_and_gate_policies_realise_the_same_density(density: float) -> None:
    q, k = qk(1000, 1000)
    policy = TopK(density=density)
    densities = {s(policy).select(q, k, CONTEXT).density().mean().item() for s in (OracleSelector, StreamingSelector)}
    random = policy.select(torch.randn(1, 4, 16, 16), q_start=0, q_len=1000, block_q=64, block_k=64)
    assert densities == {random.density().mean().item()}


def test_oracle_with_all_blocks_is_dense() -> None:
    assert OracleSelector(KeepAll()).select(*qk(130, 200), CONTEXT).density().min() == 1


@pytest.mark.parametrize("shape", [ShapeSelector(n_local=70, n_last=9), StreamingSelector(TokenBudget(tokens=128))])
def test_lists_that_were_made_in_inference_mode_serve_training(shape) -> None:
    q, k = qk(200, 200)
    with torch.inference_mode():
        shape.select(q, k, CONTEXT)
    q.requires_grad_()
    out = block_sparse_attention(q, k, k, shape.select(q, k, CONTEXT), scale=0.25, impl="triton")
    out.sum().backward()
    assert q.grad.isfinite().all() and q.grad.abs().sum() > 0


def test_streaming_lists_of_layers_follow_their_own_settings() -> None:
    selector = StreamingSelector(TopK(density=((0.2, 0.5), (0.7, 0.3))))
    q, k = qk(640, 640)
    for layer, densities in enumerate(selector.policy.density):
        found = selector.select(q, k, replace(CONTEXT, layer=layer))
        for head, density in enumerate(densities):
            alone = StreamingSelector(TopK(density=density)).select(q, k[:, :1], CONTEXT)
            assert torch.equal(found.to_mask()[:, head], alone.to_mask()[:, 0])
