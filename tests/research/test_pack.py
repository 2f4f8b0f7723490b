"""Packed records are the records, and packing them again changes no byte."""

import lzma
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "research" / "records"))
import pack

FOLDER = Path(pack.__file__).parent


def test_packed_records_hold_what_was_packed_and_are_the_same_every_time(tmp_path: Path) -> None:
    content = "".join(f'{{"what": "loss", "value": {i / 7}}}\n' for i in range(500)).encode()
    packed = []
    for name in ("one", "two"):
        path = tmp_path / name / "r.jsonl"
        path.parent.mkdir()
        path.write_bytes(content)
        pack.main([str(path)])
        assert [p.name for p in path.parent.iterdir()] == ["r.jsonl.xz"]
        packed.append((path.parent / "r.jsonl.xz").read_bytes())
    assert packed[0] == packed[1] and len(packed[0]) < len(content) / 4
    assert lzma.decompress(packed[0]) == content


def test_what_is_no_plain_file_of_records_is_left_alone(tmp_path: Path) -> None:
    packed, plain = tmp_path / "a.jsonl.xz", tmp_path / "b.jsonl"
    packed.write_bytes(b"x")
    plain.write_bytes(b"{}\n")
    with pytest.raises(SystemExit) as ended:
        pack.main([str(plain), str(packed)])
    assert ended.value.code == 2
    assert packed.read_bytes() == b"x" and plain.exists()


def test_published_records_are_packed() -> None:
    assert len(list(FOLDER.glob("*.jsonl.xz"))) > 30 and not list(FOLDER.glob("*.jsonl"))
