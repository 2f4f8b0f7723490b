"""What `impl="flash4"` does around flash-attn-4's kernel: lists, tiles and slices. The kernel runs only on Hopper.

In its place stands `two_lists_attention`, which follows the kernel's own rules in fp64: which list a tile of rows
takes, which rows and heads it holds, and where it masks.
"""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from seerattn.ops.block_sparse_attention import flash4, reference
from seerattn.selection.block_indices import BlockIndices
from tests.ops.test_block_sparse_attention import assert_exact, make_blocks, make_qkv, oracle, token_mask


def two_lists_attention(q, out, lse, k, v, full_indices, full_counts, diagonal, sinks, scale, form):
    """The kernel: every tile walks the listed diagonal blocks, masked token by token, and then the full ones."""
    batch, heads, q_tokens, _ = q.shape
    k_tokens, members = k.shape[2], form.group if form.packed else 1
    for b in range(batch):
        for head in range(heads // members):
            kv_head = head * members // form.group
            rows = torch.arange(q_tokens * members)
            for tile, part in enumerate(rows.split(form.tile_m)):
                token, member = part // members, part % members
                lists = (b, head, tile // form.tiles)
                visible = torch.zeros(len(part), k_tokens, dtype=torch.bool)
                for j in full_indices[lists][: int(full_counts[lists])].tolist():
                    visible[:, j * form.tile_n : (j + 1) * form.tile_n] = True
                for j in diagonal.indices[lists][: int(diagonal.counts[lists])].tolist():
                    keys = torch.arange(j * form.tile_n, min((j + 1) * form.tile_n, k_tokens))
                    visible[:, keys] = keys <= token[:, None] + k_tokens - q_tokens
                query = q[b, head * members + member, token]
                scores = query @ k[b, kv_head].T * scale
                if form.softcap is not None:
                    scores = form.softcap * torch.tanh(scores / form.softcap)
                scores = scores.masked_fill(~visible, -torch.inf)
                total = scores.logsumexp(-1)
                if form.sinks:
                    total = torch.logaddexp(total, sinks[head * members + member].double())
                out[b, head * members + member, token] = (scores - total[:, None]).exp() @ v[b, kv_head]
                lse[b, head * members + member, token] = total.float()


def run(monkeypatch, *args, **kwargs):
    monkeypatch.setattr(flash4, "_launch", two_lists_attention)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    call = {"scale": 0.2, "softcap": None, "sinks": None, "return_lse": True} | kwargs
    return flash4.block_sparse_attention(*args, **call)


def exact(q, k, v, blocks, **kwargs):
    mask = token_mask(blocks, q.shape[1], q.shape[2], k.shape[2])
    return oracle(q, k, v, mask, scale=0.2, **kwargs)


def assert_matches(actual, expected):
    assert_exact(actual[0], expected[0])
    torch.testing.assert_close(actual[1].double(), expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("heads, kv_heads, mask_heads", [(4, 1, 1), (4, 2, 4), (6, 2, 2), (8, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("block_q, block_k", [(64, 64), (64, 128), (128, 64)])
@pytest.mark.parametrize("q_tokens, k_tokens", [(1, 1), (200, 200), (130, 258), (150, 290), (1, 64), (65, 128)])
def test_ragged_calls_match_dense_oracle(
    q_tokens, k_tokens, block_q, block_k, heads, kv_heads, mask_heads, monkeypatch
):
    q, k, v = make_qkv(2, heads, kv_heads, q_tokens, k_tokens)
    blocks = make_blocks(2, mask_heads, q_tokens, k_tokens, block_q, block_k)
    assert_matches(run(monkeypatch, q, k, v, blocks, lengths=[k_tokens] * 2), exact(q, k, v, blocks))


def test_32_query_tokens_of_four_heads_match_dense_oracle(monkeypatch):
    q, k, v = make_qkv(1, 8, 2, 120, 200)
    blocks = make_blocks(1, 2, 120, 200, 32, 128)
    assert_matches(run(monkeypatch, q, k, v, blocks, lengths=[200]), exact(q, k, v, blocks))


@pytest.mark.parametrize("mask_heads", [2, 4])
def test_softcap_and_sinks_match_dense_oracle(mask_heads, monkeypatch):
    q, k, v = make_qkv(1, 4, 2, 100, 140)
    blocks = make_blocks(1, mask_heads, 100, 140, 64, 64)
    extra = {"softcap": 2.0, "sinks": torch.linspace(-2, 3, 4)}
    assert_matches(run(monkeypatch, q, k, v, blocks, lengths=[140], **extra), exact(q, k, v, blocks, **extra))


def test_padded_rows_match_the_reference(monkeypatch):
    lengths = [200, 131, 64, 1, 0]
    q, k, v = make_qkv(len(lengths), 4, 2, 200, 200)
    for b, n in enumerate(lengths):
        for x in (q, k, v):
            x[b, :, : 200 - n] = torch.nan
    rows = [make_blocks(1, 2, n, n, 64, 64, seed=n) for n in lengths[:-1]]
    empty, none = torch.zeros(1, 2, 0, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    rows.append(BlockIndices(empty, empty[..., 0], 64, 64, none, none))
    blocks = BlockIndices.stack(rows)
    call = {"scale": 0.2, "softcap": None, "sinks": None, "lengths": lengths, "return_lse": True}
    expected = reference.block_sparse_attention(q, k, v, blocks, **call)
    out, lse = run(monkeypatch, q, k, v, blocks, **call)
    assert_exact(out, expected[0])
    torch.testing.assert_close(lse, expected[1])


def test_packed_sequences_match_each_sequence_alone(monkeypatch):
    bounds = [0, 70, 70, 200]
    q, k, v = make_qkv(1, 4, 2, 200, 200)
    rows = [make_blocks(1, 2, n, n, 64, 64, seed=n) for n in (70, 130)]
    empty, none = torch.zeros(1, 2, 0, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    stacked = BlockIndices.stack([rows[0], BlockIndices(empty, empty[..., 0], 64, 64, none, none), rows[1]])
    out, lse = run(monkeypatch, q, k, v, stacked, lengths=[70, 0, 130], cu_seqlens=bounds)
    for (begin, end), blocks in zip([(0, 70), (70, 200)], rows):
        alone = exact(*(x[:, :, begin:end] for x in (q, k, v)), blocks)
        assert_matches((out[:, :, begin:end], lse[:, :, begin:end]), alone)


def test_output_lies_in_memory_as_a_model_wants_it(monkeypatch):
    q, k, v = make_qkv(1, 4, 2, 100, 100)
    out, _ = run(monkeypatch, q, k, v, make_blocks(1, 2, 100, 100, 64, 64), lengths=[100])
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("block_q, block_k", [(64, 64), (32, 128), (128, 64), (64, 128), (128, 128)])
@pytest.mark.parametrize("q_start, q_len", [(0, 1), (0, 300), (64, 65), (63, 200), (127, 2), (128, 127), (200, 1)])
def test_diagonal_blocks_are_the_listed_ones_with_a_later_key(q_start, q_len, block_q, block_k):
    k_len = q_start + q_len
    blocks = make_blocks(2, 3, q_len, k_len, block_q, block_k)
    diagonal = flash4.diagonal_blocks(q_start, k_len, block_q, block_k, batch=2, heads=3, device=torch.device("cpu"))
    assert diagonal.counts.shape == blocks.counts.shape
    for (b, h, row), count in zip(torch.cartesian_prod(*map(torch.arange, blocks.counts.shape)), blocks.counts.ravel()):
        listed = blocks.indices[b, h, row, :count].tolist()
        block = q_start // block_q + int(row)
        first = max(block * block_q, q_start)
        crossed = [j for j in listed if any(key > first for key in range(j * block_k, (j + 1) * block_k))]
        n = int(diagonal.counts[b, h, row])
        assert diagonal.indices[b, h, row, :n].tolist() == crossed
        assert listed[len(listed) - n :] == crossed


def test_geometry_is_computed_once_for_all_layers():
    args = (0, 1000, 64, 64)
    kwargs = {"batch": 1, "heads": 2, "device": torch.device("cpu")}
    assert flash4.diagonal_blocks(*args, **kwargs) is flash4.diagonal_blocks(*args, **kwargs)


@pytest.mark.parametrize(
    "heads, kv_heads, mask_heads, block_q, expected",
    [
        (32, 8, 8, 64, (True, 128, 2)),
        (32, 8, 8, 32, (True, 128, 1)),
        (32, 8, 8, 16, (True, 64, 1)),
        (32, 8, 32, 64, (False, 64, 1)),
        (32, 8, 32, 128, (False, 128, 1)),
        (12, 4, 4, 64, (False, 64, 1)),  # tiles would cut a token's three heads apart
        (8, 8, 8, 128, (False, 128, 1)),
        (32, 8, 32, 32, None),
        (12, 4, 4, 32, None),
    ],
)
def test_tiles_hold_whole_tokens_of_one_query_block(heads, kv_heads, mask_heads, block_q, expected):
    q, k, _ = make_qkv(1, heads, kv_heads, 8, 8)
    form = flash4.choose_form(q, k, make_blocks(1, mask_heads, 8, 8, block_q, 64), softcap=None, sinks=None)
    assert (form and (form.packed, form.tile_m, form.tiles)) == expected


def refusal(dim=64, heads=4, kv_heads=2, mask_heads=4, block_q=64, block_k=64, dtype=torch.bfloat16, scale=1.0):
    q, k, v = (torch.zeros(1, h, 8, dim, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    blocks = make_blocks(1, mask_heads, 8, 8, block_q, block_k)
    return flash4.refusal(q, k, v, blocks, scale=scale, lengths=[8], softcap=None, sinks=None)


@pytest.mark.parametrize(
    "call, reason",
    [
        ({"dtype": torch.float32}, "fp16 or bf16"),
        ({"dim": 36}, "multiples of 8"),
        ({"block_k": 32}, "key blocks of"),
        ({"block_q": 32}, "whole 64 rows"),
        ({"dim": 256, "block_k": 128}, "shared memory"),
        ({"scale": 0.0}, "positive scales, got 0.0"),
        ({}, "CUDA device"),
    ],
)
def test_refusal_names_what_the_kernel_cannot_serve(call, reason):
    assert reason in refusal(**call)


def test_refusal_of_gradients():
    q, k, v = (torch.zeros(1, 2, 8, 64, dtype=torch.bfloat16) for _ in range(3))
    blocks = make_blocks(1, 2, 8, 8, 64, 64)
    reason = flash4.refusal(q, k, v.requires_grad_(), blocks, scale=1.0, softcap=None, sinks=None)
    assert "backward" in reason


@pytest.mark.parametrize("found", ["4.0.0b35", None])
def test_refusal_of_another_version_says_which_is_needed(found, monkeypatch):
    def version(package):
        if found is None:
            raise PackageNotFoundError
        return found

    monkeypatch.setattr(flash4, "version", version)
    monkeypatch.setattr(flash4, "_unsupported_device", lambda device: None)
    flash4._wrong_installation.cache_clear()
    reason = refusal()
    flash4._wrong_installation.cache_clear()
    assert "flash-attn-4 4.0.0b36" in reason
    assert f"got {found or 'none'}" in reason


def test_a_fitting_call_on_a_fitting_machine_is_not_refused(monkeypatch):
    monkeypatch.setattr(flash4, "_unsupported_device", lambda device: None)
    monkeypatch.setattr(flash4, "version", flash4.VERSIONS.__getitem__)
    flash4._wrong_installation.cache_clear()
    assert refusal(dim=128, heads=32, kv_heads=8, mask_heads=8) is None
    flash4._wrong_installation.cache_clear()


def test_import_needs_neither_flash_attn_nor_triton():
    code = "import sys; sys.modules.update(dict.fromkeys(('flash_attn', 'cutlass', 'triton')));"
    code += "import seerattn.ops.block_sparse_attention.flash4"
    subprocess.run([sys.executable, "-c", code], check=True)
