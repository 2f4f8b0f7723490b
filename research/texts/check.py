"""Check texts against the manifests beside this file: which documents are missing, changed, moved or extra.

    python research/texts/check.py FOLDER                                      # everything that is listed
    python research/texts/check.py FOLDER research/texts/books-test.jsonl    # one set

FOLDER holds `books/` and `proofs/`. A document is what the SHA-256 of its text in UTF-8 says, and its place in its file
counts: results rest on "the first so many". The exit code is 1 if anything differs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from hashlib import sha256
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer

from seerattn.data.text import read_documents

MANIFESTS = sorted(Path(__file__).parent.glob("*.jsonl"))


def read_manifest(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of a manifest by the file that they are about, in their order."""
    rows = map(json.loads, path.read_bytes().splitlines())
    return {file: list(group) for file, group in groupby(rows, lambda row: row["file"])}


def differences(rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> Iterator[str]:
    """Sentences on what sets texts apart from the documents that a manifest lists for their file; none if nothing does.

    A text of another hash is a changed document if it stands where a listed one is not found, else an extra one.
    """
    listed = [row["sha256"] for row in rows]
    found = [sha256(text.encode()).hexdigest() for text in texts]
    count = Counter(found)
    for kind, first, last, begin, end in SequenceMatcher(None, listed, found, autojunk=False).get_opcodes():
        if kind == "equal":
            continue
        absent = [row for row in rows[first:last] if row["sha256"] not in count]
        unknown = [i for i in range(begin, end) if found[i] not in listed or count[found[i]] > 1]
        yield from (f"moved: {_name(row)}" for row in rows[first:last] if row["sha256"] in count)
        for row, i in zip_longest(absent, unknown):
            if i is None:
                yield f"missing: {_name(row)}"
            elif row is None:
                yield f"extra: document {i + 1}, {len(texts[i])} characters"
            else:
                yield f"changed: {_name(row)}: {row['characters']} characters listed, {len(texts[i])} found"


def _name(row: dict[str, Any]) -> str:
    return f"{row['id']} ({row['title'] or 'no title recorded'})"


def check(folder: Path, manifest: Path) -> Iterator[tuple[str, list[str]]]:
    """Each file that a manifest lists, or that its commands would read beside those, and what is wrong with it."""
    files = read_manifest(manifest)
    for file, rows in files.items():
        if not (folder / file).is_file():
            yield file, [f"missing: a file of {len(rows)} documents"]
            continue
        try:
            yield file, list(differences(rows, read_documents([folder / file])))
        except ValueError as error:
            yield file, [f"unreadable: {error}"]
    some = next(iter(files.values()))[0]
    beside = folder.glob(f"{some['set']}/{some['split']}*.jsonl*")
    unlisted = {path.relative_to(folder).as_posix() for path in beside} - set(files)
    yield from ((file, ["extra: a file that is not listed"]) for file in sorted(unlisted))


def main(
    folder: Annotated[Path, typer.Argument(help="Folder with books/ and proofs/.", exists=True, file_okay=False)],
    manifests: Annotated[list[Path], typer.Argument(help="All by default.", exists=True)] = MANIFESTS,
) -> None:
    """Compare the texts in a folder with manifests."""
    right = True
    for manifest in manifests:
        for file, found in check(folder, manifest):
            print(f"{file}: {'; '.join(found) or 'as listed'}", flush=True)
            right &= not found
    raise typer.Exit(0 if right else 1)


if __name__ == "__main__":
    typer.run(main)
