"""Brings packed records of an earlier version to this one, as they are read anyway; no value is changed.

    python research/records/migrate.py          # all that lie here

Lines that are no results, such as those of kernels' launches, stay as they are.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path

from pack import pack

from seerattn.results.migration import is_earlier
from seerattn.results.record import parse_line, to_line

HERE = Path(__file__).parent


def migrated(lines: list[str]) -> list[str]:
    """The lines of a file, those of earlier versions as this one writes them."""
    return [to_line(parse_line(line)) if is_earlier(json.loads(line)) else line for line in lines]


def main() -> None:
    """Writes what changes, and tells which files did."""
    for path in sorted(HERE.glob("*.jsonl.xz")):
        before = lzma.decompress(path.read_bytes()).decode().splitlines(keepends=True)
        after = migrated(before)
        if after != before:
            plain = path.with_suffix("")
            plain.write_text("".join(after), encoding="utf-8")
            pack(plain)
            print(f"{path.name}: {sum(one != other for one, other in zip(before, after))} of {len(after)} lines")


if __name__ == "__main__":
    main()
