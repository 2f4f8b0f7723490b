"""Section of the page on the learned masks: what they look like, and which known pattern each head follows."""

from __future__ import annotations

from collections.abc import Sequence

from seerattn.eval.patterns import CLEAR, EQUAL, Pattern, find_patterns
from seerattn.report.parts import Figure, Letters, Section, Table
from seerattn.results.maps import BlockMaps

LETTERS = {
    "a_shape": ("A", "A-shape"),
    "vertical": ("V", "vertical"),
    "slash": ("S", "slash"),
    "mixed": ("M", "mixed"),
    "none": ("-", "nothing to choose"),
}


def pattern_section(maps: BlockMaps, figures: Sequence[Figure]) -> Section:
    """Masks of the gate, and the pattern of every head in them and in the true map."""
    found = find_patterns(maps)
    mine, true = ([pair[side] for pair in found] for side in (0, 1))
    body = [
        [
            LETTERS[label][1],
            str(sum(p.label == label for p in mine)),
            str(sum(p.label == label for p in true)),
            str(sum(a.label == b.label == label for a, b in found)),
        ]
        for label in LETTERS
        if any(label in (a.label, b.label) for a, b in found)
    ]
    head = ["pattern", f"heads of the gate {maps.gates}", "heads of the true map", "the same head in both"]
    notes = [
        f"Of the causal blocks that are not kept in any case, at density {maps.density:g}; the true map's choice has "
        "as many blocks in every row. A-shape: the first columns and the newest diagonals (the sink column is kept "
        "in any case, so a window of recent blocks counts as one). Vertical: whole columns. Slash: whole diagonals. "
        "Each head is compared with the best mask of each shape that has as many blocks; the score is 0 where that "
        "holds no more of them than of random blocks, fitted likewise, and 1 where it holds all.",
        f"A head is named by its best score, the first shape of those within {EQUAL:g} of it, and mixed below "
        f"{CLEAR:g}.",
    ]
    parts = [
        *figures,
        Table("Patterns of the heads", head, body, notes),
        Letters(f"The gate {maps.gates}: pattern and its score", *_places(maps, mine)),
        Letters("The true map: pattern and its score", *_places(maps, true)),
    ]
    read = (
        "Does the gate find A-shape, vertical and slash, which other systems are given? One document; the dark "
        "blocks of the true map are those to be chosen. The letters say which shape a head's choice is nearest to."
    )
    return Section("masks", "Masks of the learned gate", read, parts)


def _places(maps: BlockMaps, patterns: Sequence[Pattern]) -> tuple[list[int], list[tuple[int, list]]]:
    """Columns and lines of a map of letters."""
    heads = sorted({head for _, head in maps.heads})
    cells = {}
    for place, pattern in zip(maps.heads, patterns):
        score = f"{max(pattern.score.values()):.2f}" if pattern.score else ""
        cells[place] = (*LETTERS[pattern.label], score)
    layers = sorted({layer for layer, _ in maps.heads})
    return heads, [(layer, [cells.get((layer, head)) for head in heads]) for layer in layers]
