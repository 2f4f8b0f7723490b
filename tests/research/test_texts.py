"""The manifests of published texts say what the texts are, and `check.py` finds what is not as they say."""

import gzip
import json
import re
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2] / "research" / "texts"))
import check
import long

ROOT = Path(__file__).parents[2]
TEXTS = ROOT / "research" / "texts"
ROWS = [json.loads(line) for path in sorted(TEXTS.glob("*.jsonl")) for line in path.read_bytes().splitlines()]
NAMES = "abcde"


def text(name: str) -> str:
    return f"Document {name}: naïve \u2028 words.\r\n"


def row(name: str, file: str = "books/test-000.jsonl.gz") -> dict:
    digest = sha256(text(name).encode("utf-8")).hexdigest()
    place = {"file": file, "set": "books", "split": "test", "id": name, "title": name.upper()}
    return place | {"characters": len(text(name)), "sha256": digest}


def write(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("abcde", []),
        ("abde", ["missing: c (C)"]),
        ("abXde", ["changed: c (C): 28 characters listed, 28 found"]),
        ("Zabcde", ["extra: document 1, 28 characters"]),
        ("abcdea", ["extra: document 6, 28 characters"]),
        ("bcdea", ["moved: a (A)"]),
        ("aXYde", [f"changed: {n} ({n.upper()}): 28 characters listed, 28 found" for n in "bc"]),
        ("aXe", ["changed: b (B): 28 characters listed, 28 found", "missing: c (C)", "missing: d (D)"]),
        ("", [f"missing: {n} ({n.upper()})" for n in NAMES]),
    ],
)
def test_every_document_that_is_not_as_listed_is_told_once(found: str, expected: list[str]) -> None:
    assert list(check.differences([row(name) for name in NAMES], [text(name) for name in found])) == expected


def test_a_repeated_document_is_extra_wherever_it_stands() -> None:
    for found in ("aabcde", "abcdcde", "abcdee"):
        told = list(check.differences([row(name) for name in NAMES], [text(name) for name in found]))
        assert any(sentence.startswith("extra: ") for sentence in told)


def test_texts_as_listed_pass_and_files_that_are_missing_damaged_or_unlisted_do_not(tmp_path: Path) -> None:
    manifest = tmp_path / "books-test.jsonl"
    rows = [row("a"), row("b"), row("c", "books/test-001.jsonl.gz")]
    manifest.write_text("".join(json.dumps(each) + "\n" for each in rows))
    command = [str(tmp_path), str(manifest)]
    app = check.typer.Typer()
    app.command()(check.main)

    write(tmp_path / "books/test-000.jsonl.gz", [text("a"), text("b")])
    write(tmp_path / "books/test-001.jsonl.gz", [text("c")])
    write(tmp_path / "books/train-000.jsonl.gz", [text("of another set")])
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert result.output == "books/test-000.jsonl.gz: as listed\nbooks/test-001.jsonl.gz: as listed\n"

    (tmp_path / "books/test-000.jsonl.gz").write_bytes(b"no archive")
    (tmp_path / "books/test-001.jsonl.gz").rename(tmp_path / "books/test-002.jsonl.gz")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert re.fullmatch(
        "books/test-000.jsonl.gz: unreadable: .*\n"
        "books/test-001.jsonl.gz: missing: a file of 1 documents\n"
        "books/test-002.jsonl.gz: extra: a file that is not listed\n",
        result.output,
    )


def test_manifests_list_every_document_once_with_all_that_identifies_it() -> None:
    for field in ("id", "sha256"):
        assert len({row[field] for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row["file"].startswith(f"{row['set']}/{row['split']}") and re.fullmatch("[0-9a-f]{64}", row["sha256"])
        assert "title" in row and row["licence"] and 0 < row["characters"] <= row["bytes"]
        assert re.fullmatch(r"github:[\w.-]+/[\w.-]+@[0-9a-f]{12}:.+", row["source"], re.DOTALL)
        assert row["set"] == "proofs" or row["id"] == f"pg{row['gutenberg']}"
    for path in TEXTS.glob("*.jsonl"):
        files = check.read_manifest(path)
        assert list(files) == sorted(files)
        assert {f"{row['set']}-{row['split']}" for rows in files.values() for row in rows} == {path.stem}


def test_shipped_books_are_listed_text_for_text() -> None:
    listed = {row["sha256"]: row for row in ROWS}
    for path in sorted((ROOT / "assets/books").rglob("*.txt.gz")):
        book = gzip.decompress(path.read_bytes())
        row = listed[sha256(book).hexdigest()]
        assert (row["characters"], row["bytes"]) == (len(book.decode("utf-8")), len(book))
        assert row["split"] == {"distill": "validation", "evaluate": "test"}[path.parent.name]


def test_the_reference_model_was_trained_on_the_documents_that_the_page_names() -> None:
    recorded = json.loads((ROOT / "assets/reference-model/training.jsonl").read_text().splitlines()[0])
    train = [row for row in ROWS if row["split"] == "train"]
    proofs = [row for row in train if row["set"] == "proofs"]
    books = [row for row in train if row["set"] == "books"][: recorded["documents"] - len(proofs)]
    assert len(books) == 357 and books[-1]["file"] == "books/train_more-003.jsonl.gz"
    assert sum(row["file"] == books[-1]["file"] for row in books) == 20
    assert sum(row["bytes"] for row in books + proofs) == recorded["text_bytes"]


def test_commands_name_texts_as_the_manifests_do() -> None:
    pages = ["*.md", "docs/*.md", "assets/**/*.md", "research/**/*.md", "research/**/*.py", "research/**/*.yaml"]
    files = {row["file"] for row in ROWS}
    named = set()
    for path in (path for page in pages for path in ROOT.glob(page) if path.is_file()):
        lines = path.read_text(encoding="utf-8").splitlines()
        for line in lines:
            if re.search(r"--(data|train|held-out|[a-z]+-test) |haystack:|data:|long\.py ", line):
                found = set(re.findall(r"(?:books|proofs)/(?:test|train|validation)[\w.-]*", line))
                assert found <= files, (path, line)
                named |= found
    assert {"books/test-000.jsonl.gz", "books/test-001.jsonl.gz", "proofs/test-000.jsonl.gz"} <= named


def test_long_documents_are_the_first_24_of_at_least_49152_characters(tmp_path: Path) -> None:
    lengths = [49_151, 49_152, 10] + [50_000 + i for i in range(30)]
    texts = ["é" * length for length in lengths]
    write(tmp_path / "test.jsonl.gz", texts)
    long.main(str(tmp_path / "test.jsonl.gz"), tmp_path / "long" / "books-test.jsonl")
    written = (tmp_path / "long" / "books-test.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in written] == [texts[1], *texts[3:26]]
