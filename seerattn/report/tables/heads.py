"""Realised density of every head, at the longest context."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from seerattn.report.names import name_of
from seerattn.report.parts import Table, plain
from seerattn.report.select import budget, by_line, density_label, group, last_rows_dense
from seerattn.results.record import Result

ID, TITLE = "heads", "Density of the heads"
READ = (
    "Realised density of every head, at the longest context. Policies that give each head the same number of blocks "
    "are even by design and not drawn. Others spend more on some heads. Layers are numbered among those with gates."
)
# Heads that differ by less get the same; rounding of counts is below it.
UNIFORM = 1e-6


def tables(results: Sequence[Result]) -> list[Table]:
    """A table for each model and text, of methods whose heads differ."""
    found = []
    for rows in head_densities(results):
        uneven = differing(rows)
        body = []
        for r in uneven:
            values = by_head(r)
            places = [divmod(int(place), values.shape[1]) for place in (np.nanargmin(values), np.nanargmax(values))]
            low, high = (f"{values[place]:.3f} (layer {place[0]}, head {place[1]})" for place in places)
            body.append([name_of(r), density_label(r.density), low, f"{np.nanmean(values):.3f}", high])
        names = {r.line for r in uneven}
        even = [name_of(of[0]) for line, of in by_line(rows).items() if line not in names]
        notes = [f"Every head alike: {', '.join(even)}."] if even else []
        title = f"Density of the heads: {rows[0].text}, {rows[0].context:,} tokens, {rows[0].model}"
        found.append(plain(title, ["method", "asked", "sparsest head", "mean", "densest head"], body, notes))
    return found


def head_densities(results: Sequence[Result]) -> list[list[Result]]:
    """For each model and text the perplexities that counted every head, in their setting with the fewest dense rows."""
    found = []
    rows = [r for r in results if r.what == "perplexity" and r.samples.get("head_density")]
    rows = [r for r in rows if r.kind != "dense" and budget(r) == "density"]
    for of_text in group(rows, lambda r: (r.model, r.text)).values():
        longest = max(r.context for r in of_text)
        fewest = min(last_rows_dense(r) for r in of_text if r.context == longest)
        of_text = [r for r in of_text if (r.context, last_rows_dense(r)) == (longest, fewest)]
        of_text = [r for r in of_text if by_head(r).shape == by_head(of_text[0]).shape]
        ordered = by_line(of_text).values()
        found.append([r for line in ordered for r in sorted(line, key=lambda r: -(r.density or 0.0))])
    return found


def by_head(result: Result) -> np.ndarray:
    """Realised density ``[layers, heads]``, NaN beyond the last head of a layer."""
    layers = result.samples["head_density"]
    values = np.full((len(layers), max(map(len, layers))), np.nan)
    for line, heads in zip(values, layers):
        line[: len(heads)] = heads
    return values


def differing(results: Sequence[Result]) -> list[Result]:
    """The results of methods whose heads differ at some density."""
    found = {r.line for r in results if float(np.nanmax(by_head(r)) - np.nanmin(by_head(r))) > UNIFORM}
    return [r for r in results if r.line in found]
