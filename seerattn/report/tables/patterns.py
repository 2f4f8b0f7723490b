"""Masks of the learned gate: which known pattern each head follows, in them and in the true map."""

from __future__ import annotations

from collections.abc import Sequence

from seerattn.report.parts import Cell, Column, Line, Table, plain
from seerattn.results.maps import BlockMaps
from seerattn.results.patterns import CLEAR, EQUAL, Pattern, find_patterns

ID, TITLE = "masks", "Masks of the learned gate"
READ = (
    "Does the gate find A-shape, vertical and slash, which other methods are given? One document; the dark blocks of "
    "the true map are those to be chosen. The letters say which shape a head's choice is nearest to."
)
LETTERS = {
    "a_shape": ("A", "A-shape"),
    "vertical": ("V", "vertical"),
    "slash": ("S", "slash"),
    "mixed": ("M", "mixed"),
    "none": ("-", "nothing to choose"),
}


def tables(maps: BlockMaps | None) -> list[Table]:
    """How many heads have each pattern, and a letter for each head."""
    if maps is None:
        return []
    found = find_patterns(maps)
    mine, true = ([pair[side].label for pair in found] for side in (0, 1))
    body = []
    for label, (_, name) in LETTERS.items():
        counts = mine.count(label), true.count(label), sum(a == b == label for a, b in zip(mine, true))
        body += [[name, *map(str, counts)]] if any(counts) else []
    head = ["pattern", f"heads of the gate {maps.gates}", "heads of the true map", "the same head in both"]
    notes = [
        f"Of the causal blocks that are not kept in any case, at density {maps.density:g}; the true map's choice has "
        "as many blocks in every row. A-shape: the first columns and the newest diagonals (the sink column is kept in "
        "any case, so a window of recent blocks counts as one). Vertical: whole columns. Slash: whole diagonals. Each "
        "head is compared with the best mask of each shape that has as many blocks; the score is 0 where that holds no "
        "more of them than of random blocks, fitted likewise, and 1 where it holds all.",
        f"A head is named by its best score, the first shape of those within {EQUAL:g} of it, and mixed below "
        f"{CLEAR:g}.",
    ]
    return [
        plain("Patterns of the heads", head, body, notes),
        _letters(f"The gate {maps.gates}: pattern and its score", maps, [pair[0] for pair in found]),
        _letters("The true map: pattern and its score", maps, [pair[1] for pair in found]),
    ]


def _letters(title: str, maps: BlockMaps, patterns: Sequence[Pattern]) -> Table:
    """A map of layers by heads."""
    cells = {}
    for place, pattern in zip(maps.heads, patterns):
        score = f"{max(pattern.score.values()):.2f}" if pattern.score else ""
        cells[place] = Cell(LETTERS[pattern.label][0], more=score)
    layers, heads = (sorted(set(numbers)) for numbers in zip(*maps.heads))
    lines = [Line(str(layer), [cells.get((layer, head)) for head in heads]) for layer in layers]
    notes = ["Columns are heads. A: A-shape, V: vertical, S: slash, M: mixed."]
    return Table(title, "layer", [Column(str(head)) for head in heads], lines, notes, letters=True)
