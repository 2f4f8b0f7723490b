"""Write the long documents of a split, on which the contexts of the reference model were compared.

    python research/texts/long.py books/test-000.jsonl.gz long/books-test.jsonl

They are its first 24 documents of at least 49,152 characters.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from seerattn.data.text import read_documents
from seerattn.saving import write_whole

DOCUMENTS = 24
# What was used is not recorded; every bound from 47,569 to 49,810 keeps the documents that were measured.
CHARACTERS = 49_152


def main(
    source: Annotated[str, typer.Argument(help="File of documents.")],
    output: Annotated[Path, typer.Argument(help="JSON lines to write.")],
) -> None:
    """Write the long documents of a file."""
    long = islice((text for text in read_documents([source]) if len(text) >= CHARACTERS), DOCUMENTS)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, "".join(json.dumps({"text": text}) + "\n" for text in long))


if __name__ == "__main__":
    typer.run(main)
