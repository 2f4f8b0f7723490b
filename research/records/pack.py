"""Packs records: each NAME.jsonl becomes NAME.jsonl.xz, of the same bytes whenever it is done.

    python research/records/pack.py                                     # all that lie here unpacked
    python research/records/pack.py outputs/compare/results.jsonl       # others, where they lie

Commands read packed records as they are, and write plain ones. To write on, unpack first: xz --decompress NAME.jsonl.xz
"""

from __future__ import annotations

import argparse
import lzma
from collections.abc import Sequence
from pathlib import Path

from seerattn.saving import staged


def pack(path: Path) -> Path:
    """Puts the packed file in the place of a plain one."""
    packed = path.with_name(f"{path.name}.xz")
    with staged(packed.parent, packed.name) as staging:
        (staging / packed.name).write_bytes(lzma.compress(path.read_bytes(), preset=9 | lzma.PRESET_EXTREME))
    path.unlink()
    return packed


def main(args: Sequence[str] | None = None) -> None:
    """Packs the files that are named, or those beside this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="plain .jsonl files")
    files = parser.parse_args(args).files or sorted(Path(__file__).parent.glob("*.jsonl"))
    for path in files:
        if path.suffix != ".jsonl" or not path.is_file():
            parser.error(f"files must be .jsonl files, got {path}")
    for path in files:
        print(pack(path))


if __name__ == "__main__":
    main()
