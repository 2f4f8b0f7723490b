"""The decision of `impl="auto"` between dense and sparse attention, on tables whose answer is known."""

import json

import pytest
import torch

from seerattn.ops import crossover
from seerattn.ops.crossover import SHIPPED, LayerShape, load_table, prefer_dense, table_path

SMOLLM2 = LayerShape(heads=9, kv_heads=3, head_dim=64)
LENGTHS = [2**power for power in range(7, 18)]

# Dense is 1 ms at 1k and 16 ms at 4k; sparse attention costs its density of that plus a tenth; choosing 0.5 ms.
TABLE = {
    "device": "Test GPU",
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "rows": [
        {"tokens": 1024, "dense_ms": 1.0, "overhead_ms": 0.5, "sparse_ms": {"0.1": 0.2, "1.0": 1.1}},
        {"tokens": 4096, "dense_ms": 16.0, "overhead_ms": 0.5, "sparse_ms": {"0.1": 3.2, "1.0": 17.6}},
    ],
}


@pytest.fixture
def device(tmp_path, monkeypatch):
    """A GPU with a table of the user's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
    monkeypatch.setattr(crossover, "preferred", lambda op, impl, device: "triton")
    path = table_path("Test GPU")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(TABLE))
    caches = (load_table, crossover._prefer_dense_cuda)
    for cache in caches:
        cache.cache_clear()
    yield torch.device("cuda", 0)
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(
    "tokens, density, dense",
    [
        (1024, 0.3, False),  # 0.5 + 0.4 < 1
        (1024, 0.5, True),  # 0.5 + 0.6 > 1
        (4096, 0.85, False),  # 0.5 + 15.2 < 16
        (4096, 0.9, True),  # 0.5 + 16.0 > 16
        (2560, 0.5, False),  # half way: 8.5 dense, 0.5 + 5.1
        (128, 0.01, False),  # beyond the table the nearest length counts: 0.5 + 0.2 < 1
        (1 << 20, 0.1, False),
        (1 << 20, 1.0, True),
    ],
)
def test_the_faster_side_of_the_table_is_chosen(device, tokens, density, dense):
    assert prefer_dense(q_len=tokens, k_len=tokens, density=density, device=device) == dense


def test_the_cost_of_choosing_no_longer_counts_once_blocks_are_chosen(device):
    assert prefer_dense(q_len=1024, k_len=1024, density=0.6, device=device)
    assert not prefer_dense(q_len=1024, k_len=1024, density=0.6, device=device, selected=True)


def test_a_short_chunk_pays_for_choosing_with_its_share_of_the_pairs(device):
    # The last 32 of 4096 queries are 1.6 % of the pairs: 0.25 ms dense, 0.5 ms to choose.
    assert prefer_dense(q_len=32, k_len=4096, density=0.1, device=device)
    assert not prefer_dense(q_len=1024, k_len=4096, density=0.1, device=device)


def test_a_gpu_without_triton_runs_dense(device, monkeypatch):
    monkeypatch.setattr(crossover, "preferred", lambda op, impl, device: "reference")
    assert prefer_dense(q_len=4096, k_len=4096, density=0.05, device=device)


def write(table: dict) -> None:
    """Puts another table in the place of the device's."""
    table_path("Test GPU").write_text(json.dumps(table))
    load_table.cache_clear()
    crossover._prefer_dense_cuda.cache_clear()


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("tokens, dense, sparse, choosing", [(1024, 1.0, 0.2, 0.125), (4096, 16.0, 3.2, 0.5)])
def test_times_of_a_batch_are_those_of_one_sequence_times_its_size_or_what_the_host_takes(
    device, batch, tokens, dense, sparse, choosing
):
    table, shape = load_table("Test GPU"), LayerShape(batch=batch)
    assert table.dense(tokens, tokens, shape) == pytest.approx(batch * dense)
    assert table.sparse(tokens, tokens, shape, 0.1) == pytest.approx(batch * sparse)
    # Choosing takes half a millisecond at both lengths, so the host is what takes it.
    assert table.choosing(tokens, shape) == pytest.approx(max(0.5, batch * choosing))


def test_work_grows_with_heads_and_their_width_and_the_hosts_share_does_not(device):
    table, small = load_table("Test GPU"), LayerShape(heads=16, kv_heads=4, head_dim=64)
    assert table.dense(4096, 4096, small) == pytest.approx(4.0)
    assert table.sparse(4096, 4096, small, 0.1) == pytest.approx(0.8)
    assert table.choosing(4096, small) == 0.5


def test_a_table_decides_for_its_own_shape_as_it_says_and_without_one_for_llamas(device):
    calls = [(1024, 0.3), (1024, 0.5), (4096, 0.85), (4096, 0.9)]

    def decisions(shape: LayerShape) -> list[bool]:
        return [prefer_dense(q_len=n, k_len=n, density=d, device=device, shape=shape) for n, d in calls]

    write({"rows": TABLE["rows"]})
    assert decisions(LayerShape()) == [False, True, False, True]
    other = LayerShape(batch=4, heads=9, kv_heads=3, head_dim=64)
    write(TABLE | other._asdict())
    assert decisions(other) == [False, True, False, True]
    assert decisions(LayerShape()) != decisions(other)


def test_a_layer_that_the_host_takes_longer_for_than_dense_attention_takes_runs_dense(device):
    ask = {"q_len": 1024, "k_len": 1024, "density": 0.1, "device": device}
    assert not prefer_dense(**ask)
    write(TABLE | {"host_ms": 1.5})
    assert prefer_dense(**ask)
    assert not prefer_dense(**ask, shape=LayerShape(batch=2))


@pytest.fixture
def shipped(device):
    """A GPU for which the shipped table decides."""
    table_path("Test GPU").write_bytes(SHIPPED.read_bytes())
    return device


SHAPES = [LayerShape(), SMOLLM2, LayerShape(heads=32, kv_heads=8, head_dim=64), LayerShape(4, 4, 1, 256)]


def first_sparse(device: torch.device, density: float, shape: LayerShape) -> int:
    """The shortest length at which a prompt runs sparse."""
    asked = {"density": density, "device": device, "shape": shape}
    return next(n for n in LENGTHS if not prefer_dense(q_len=n, k_len=n, **asked))


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_runs_sparse_does_so_at_every_greater_length(shipped, density, shape):
    for batch in (1, 4, 32):
        of = shape._replace(batch=batch)
        dense = [prefer_dense(q_len=n, k_len=n, density=density, device=shipped, shape=of) for n in LENGTHS]
        assert dense == sorted(dense, reverse=True) and not dense[-1]


@pytest.mark.parametrize("density", [0.1, 0.2])
def test_smaller_layers_go_sparse_at_longer_prompts_and_batches_at_shorter_ones(shipped, density):
    small, large = first_sparse(shipped, density, SMOLLM2), first_sparse(shipped, density, LayerShape())
    assert small == 32768 and large == 8192
    for shape in SHAPES:
        firsts = [first_sparse(shipped, density, shape._replace(batch=batch)) for batch in (1, 2, 4, 8, 16, 32)]
        assert firsts == sorted(firsts, reverse=True) and firsts[-1] < firsts[0]


def changed(**values) -> bytes:
    """The table with other values in its second row."""
    return json.dumps(TABLE | {"rows": [TABLE["rows"][0], TABLE["rows"][1] | values]}).encode()


BROKEN = {
    "nothing": b"",
    "no text": b"\xff\xfe" + bytes(5000),
    "nested deeply": b"[" * 100_000,
    "a list": b"[]",
    "no rows": b"{}",
    "rows that are none": b'{"rows": 3}',
    "rows that are empty": b'{"rows": []}',
    "a row that is none": b'{"rows": [null]}',
    "a field too many": changed(comment="slow"),
    "a field too few": b'{"rows": [{"tokens": 64}]}',
    "tokens in words": changed(tokens="many"),
    "a time that is none": changed(dense_ms=None),
    "a time that is no number": changed(overhead_ms=float("nan")),
    "a time before the start": changed(dense_ms=-1.0),
    "an endless time": changed(overhead_ms=10**400),
    "sparse times in a list": changed(sparse_ms=[1.0, 2.0]),
    "a sparse time in words": changed(sparse_ms={"0.1": "fast", "1.0": 17.6}),
    "no sparse times": changed(sparse_ms={}),
    "sparse times of other densities": changed(sparse_ms={"0.2": 3.2, "1.0": 17.6}),
    "no tokens": changed(tokens=0),
    "a batch of none": json.dumps(TABLE | {"batch": 0}).encode(),
    "heads in words": json.dumps(TABLE | {"heads": "many"}).encode(),
    "a host time in words": json.dumps(TABLE | {"host_ms": "long"}).encode(),
    "a host time that is no number": json.dumps(TABLE | {"host_ms": float("nan")}).encode(),
    "a density in words": json.dumps({"rows": [TABLE["rows"][0] | {"sparse_ms": {"few": 0.2}}]}).encode(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_table_is_refused_with_its_path(device, name):
    table_path("Test GPU").write_bytes(BROKEN[name])
    told = r"Test-GPU\.json must be a table of seerattn bench crossover, got .*; delete it$"
    for tokens in (64, 2048, 1 << 20):
        with pytest.raises(ValueError, match=told) as error:
            prefer_dense(q_len=tokens, k_len=tokens, density=0.5, device=device)
        assert len(str(error.value)) < 600


def test_a_folder_in_the_place_of_a_table_is_refused_with_its_path(device):
    table_path("Test GPU").unlink()
    table_path("Test GPU").mkdir()
    with pytest.raises(ValueError, match=r"Test-GPU\.json must be a table of seerattn bench crossover"):
        prefer_dense(q_len=64, k_len=64, density=0.5, device=device)


def test_a_gpu_without_a_table_uses_the_shipped_one(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Other GPU")
    assert prefer_dense(q_len=256, k_len=256, density=0.5, device=device)
    assert not prefer_dense(q_len=131072, k_len=131072, density=0.1, device=device)


def test_a_kind_of_device_that_was_not_measured_never_prefers_dense():
    assert not prefer_dense(q_len=64, k_len=64, density=1.0, device="mps")


@pytest.mark.parametrize(
    "q_len, k_len, density, dense",
    [(512, 512, 0.1, True), (1024, 1024, 0.23, True), (2048, 2048, 0.38, True), (2048, 2048, 0.12, False)]
    + [(4096, 4096, 0.5, True), (4096, 4096, 0.3, False), (16384, 16384, 0.1, False), (1, 16384, 0.1, True)],
)
def test_cpu_decisions_match_measured_times(q_len, k_len, density, dense):
    assert prefer_dense(q_len=q_len, k_len=k_len, density=density, device="cpu") == dense
