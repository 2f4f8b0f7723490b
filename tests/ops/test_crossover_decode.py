"""The decision of `impl="auto"` between dense and sparse decoding, on tables whose answer is known."""

import json
from itertools import product

import pytest
import torch

from seerattn.ops import crossover, crossover_decode
from seerattn.ops.crossover import LayerShape, load_table, table_path
from seerattn.ops.crossover_decode import SHIPPED, load_decode_table, prefer_dense_decode

SHAPE = {"heads": 32, "kv_heads": 8, "head_dim": 128}
PROMPTS = {"rows": [{"tokens": 1024, "dense_ms": 1.0, "overhead_ms": 0.5, "sparse_ms": {"0.1": 0.2, "1.0": 1.1}}]}
# A key takes 1 ns dense, and .2 and 1.1 of that at densities .1 and 1; choosing takes .2 of it and 5 us.
ROWS = [
    {
        "tokens": n,
        "dense_ms": n * 1e-6,
        "overhead_ms": 5e-3 + n * 2e-7,
        "sparse_ms": {"0.1": n * 2e-7, "1.0": n * 1.1e-6},
    }
    for n in (1 << 15, 1 << 18, 1 << 21)
]
TABLE = SHAPE | PROMPTS | {"decode_rows": ROWS, "decode_host_ms": 0.5}


@pytest.fixture
def device(tmp_path, monkeypatch):
    """A GPU with a table of the user's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
    for module in (crossover, crossover_decode):
        monkeypatch.setattr(module, "preferred", lambda op, impl, device: "triton")
    table_path("Test GPU").parent.mkdir(parents=True)
    write(TABLE)
    yield torch.device("cuda", 0)
    forget()


def forget() -> None:
    for cache in (load_table, load_decode_table, crossover._prefer_dense_cuda, crossover_decode._prefer_dense_cuda):
        cache.cache_clear()


def write(table: dict | bytes) -> None:
    """Puts another table in the place of the device's."""
    table_path("Test GPU").write_bytes(table if isinstance(table, bytes) else json.dumps(table).encode())
    forget()


@pytest.mark.parametrize("shape", [LayerShape(), LayerShape(4, 9, 3, 64), LayerShape(kv_heads=16, head_dim=256)])
@pytest.mark.parametrize("graphs", [False, True])
def test_the_smaller_of_two_times_is_chosen(device, shape, graphs):
    decided = set()
    for keys, density in product((1 << 14, 1 << 16, 300_000, 1 << 19, 1 << 20, 1 << 23), (0.05, 0.1, 0.3, 0.6, 0.9)):
        # As many keys of the table's layer as have these bytes. Before its first row times are those of that row.
        alike = keys * shape.kv_heads * shape.head_dim / 1024
        at = max(alike, 1 << 15)
        # Linear between the densities, that of the nearest beyond; beyond the last row all grow with the keys.
        sparse = at * 1e-6 * (0.2 + 0.9 * max(0.0, density - 0.1) / 0.9)
        choosing = 2e-7 * at + 5e-3 * max(1.0, at / (1 << 21))
        expected = max(choosing + sparse, 0.0 if graphs else 0.5) >= 1e-6 * at
        if abs(choosing + sparse - 1e-6 * at) > 1e-9:
            asked = {"keys": keys, "density": density, "device": device, "shape": shape, "graphs": graphs}
            assert prefer_dense_decode(**asked) == expected
            decided.add(expected)
    assert decided == {True, False}


def test_sequences_count_by_their_keys_alone(device):
    for batch in (1, 4, 64):
        asked = {"density": 0.1, "device": device, "shape": LayerShape(batch=batch)}
        assert prefer_dense_decode(keys=480_000, **asked) and not prefer_dense_decode(keys=520_000, **asked)


@pytest.mark.parametrize("graphs", [False, True])
def test_more_that_is_read_never_makes_sparse_what_was_dense_and_more_keys_never_dense_what_was_sparse(device, graphs):
    keys, densities = [1 << power for power in range(10, 25)], [n / 20 for n in range(1, 21)]
    decided = [[prefer_dense_decode(keys=n, density=d, device=device, graphs=graphs) for d in densities] for n in keys]
    assert all(row == sorted(row) for row in decided)
    assert all(column == sorted(column, reverse=True) for column in map(list, zip(*decided)))
    write(SHAPE | PROMPTS | {"decode_rows": json.loads(SHIPPED.read_text())["decode_rows"], "decode_host_ms": 0.0})
    for n in keys:
        row = [prefer_dense_decode(keys=n, density=d, device=device, graphs=graphs) for d in densities]
        assert row == sorted(row)


def test_a_table_without_times_of_decoded_tokens_leaves_them_to_the_shipped_ones(device, monkeypatch):
    shipped = json.loads(SHIPPED.read_text())
    write(SHAPE | PROMPTS)
    assert [vars(row) for row in load_decode_table("Test GPU").rows] == shipped["decode_rows"]
    assert load_decode_table("Test GPU").host_ms == shipped["decode_host_ms"]
    table_path("Test GPU").unlink()
    forget()
    assert [vars(row) for row in load_decode_table("Test GPU").rows] == shipped["decode_rows"]
    # Launched one by one, 24 x 32k tokens of a layer of the 8B shape take 1 ms dense, and the host 2.4 sparse.
    step = {"keys": 24 << 15, "density": 0.1, "device": device, "shape": LayerShape(24)}
    assert prefer_dense_decode(**step) and not prefer_dense_decode(**step, graphs=True)
    assert not prefer_dense_decode(**step | {"keys": 4 << 20})


def test_prompts_do_not_look_at_times_of_decoded_tokens(device):
    with_rows = load_table("Test GPU")
    write(SHAPE | PROMPTS)
    assert vars(load_table("Test GPU").rows[0]) == vars(with_rows.rows[0])


def changed(**values) -> dict:
    return TABLE | {"decode_rows": [ROWS[0], ROWS[1] | values]}


BROKEN = {
    "rows that are none": TABLE | {"decode_rows": 3},
    "rows that are empty": TABLE | {"decode_rows": []},
    "a row that is none": TABLE | {"decode_rows": [None]},
    "a field too many": changed(comment="slow"),
    "a time that is none": changed(dense_ms=None),
    "a time that is no number": changed(overhead_ms=float("nan")),
    "a time before the start": changed(dense_ms=-1.0),
    "no keys": changed(tokens=0),
    "sparse times of other densities": changed(sparse_ms={"0.2": 3.2, "1.0": 17.6}),
    "no host time": {name: value for name, value in TABLE.items() if name != "decode_host_ms"},
    "a host time in words": TABLE | {"decode_host_ms": "long"},
    "a host time of nothing": TABLE | {"decode_host_ms": None},
    "a shape that no layer has": TABLE | {"kv_heads": 0},
    "no rows of prompts": {name: value for name, value in TABLE.items() if name != "rows"},
    "a list": b"[]",
    "no text": b"\xff\xfe" + bytes(5000),
    "nested deeply": b"[" * 100_000,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_table_is_refused_with_its_path(device, name):
    write(BROKEN[name])
    told = r"Test-GPU\.json must be a table of seerattn bench crossover, got .*; delete it$"
    for keys in (64, 1 << 17, 1 << 24):
        with pytest.raises(ValueError, match=told) as error:
            prefer_dense_decode(keys=keys, density=0.5, device=device)
        assert len(str(error.value)) < 600


def test_a_gpu_without_triton_decodes_dense_and_a_device_that_was_not_measured_never(device, monkeypatch):
    assert not prefer_dense_decode(keys=64, density=1.0, device="mps")
    monkeypatch.setattr(crossover_decode, "preferred", lambda op, impl, device: "reference")
    assert prefer_dense_decode(keys=1 << 24, density=0.05, device=device, graphs=True)


# Tokens of one sequence or several and milliseconds of a layer, dense and at densities .1 and .2.
MEASURED = [
    (LayerShape(1, 8, 2, 64), 1024, 0.42, 1.2, 1.2),
    (LayerShape(1, 8, 2, 64), 4096, 0.74, 1.4, 1.5),
    (LayerShape(1, 8, 2, 64), 32768, 8.7, 4.3, 6.5),
    (LayerShape(4, 8, 2, 64), 4096, 1.8, 2.1, 2.5),
    (LayerShape(4, 8, 2, 64), 16384, 17.0, 7.3, 11.0),
    (LayerShape(1, 32, 8, 128), 4096, 4.9, 5.4, 6.8),
    (LayerShape(1, 32, 8, 128), 32768, 45.0, 21.0, 38.0),
    (LayerShape(4, 32, 8, 128), 1024, 4.7, 6.5, 8.3),
    (LayerShape(4, 32, 8, 128), 16384, 77.0, 41.0, 100.0),
]


def test_a_cpu_never_decodes_sparse_where_that_was_measured_to_be_slower():
    for shape, tokens, dense, *sparse in MEASURED:
        asked = {"keys": shape.batch * tokens, "device": "cpu", "shape": shape}
        for density, ms in zip((0.1, 0.2), sparse):
            assert prefer_dense_decode(density=density, **asked) or ms < dense
        # And does so at a tenth where a sequence is long.
        assert prefer_dense_decode(density=0.1, **asked) == (tokens < 16384)
