"""Makes the pictures of docs/figures a third of their size, in 256 colours; to be run when they were drawn anew.

.venv/bin/python docs/pack_figures.py
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from PIL import Image

FIGURES = Path(__file__).parent / "figures"
_COLOURS = 256  # a plot has few, and shades of their edges


def main() -> None:
    """Packs all pictures that have more colours, and tells their size."""
    for path in sorted(FIGURES.glob("*.png")):
        with Image.open(path) as image:
            if image.mode == "P":
                continue
            packed = BytesIO()
            image.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE).save(packed, "PNG", optimize=True)
        before = path.stat().st_size
        if packed.tell() < before:
            path.write_bytes(packed.getvalue())
            print(f"{path.name}: {before} to {packed.tell()} bytes")


if __name__ == "__main__":
    main()
