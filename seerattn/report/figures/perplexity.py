"""Figure: perplexity against realised density, one line for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from seerattn.report import style
from seerattn.report.select import at_density, by_line, paired, panels, perplexity_key
from seerattn.results.record import Result

# Perplexities, and their errors as `paired` gives them.
Rows = tuple[Sequence[Result], Mapping[str, float]]


def groups(results: Sequence[Result]) -> list[Rows]:
    """All perplexities at equal density."""
    rows = perplexities(results)
    return [(rows, paired(results))] if rows else []


def perplexities(results: Sequence[Result]) -> list[Result]:
    """What these figures draw."""
    return [r for r in at_density(results, "perplexity") if r.realised_density]


def draw(group: Rows) -> Figure:
    """A panel for each kind of text and context.

    Error bars are the standard error of the paired difference from the dense model: what two lines have in common, the
    difficulty of the documents, is not in them.
    """
    rows, errors = group
    found = {(text, context, model, rest): of for (model, text, context, rest), of in panels(rows).items()}
    looks = style.looks(rows)
    figure, places = style.grid(list(found), 4.8, 3.6)
    for key, axes in places.items():
        by_name = by_line(found[key])
        for line in by_name.keys() - looks.keys():
            style.dense_line(axes, by_name[line][0].value, "dense")
        points = {
            line: sorted((-r.realised_density, r.value, errors.get(perplexity_key(r), 0.0)) for r in by_name[line])
            for line in by_name
            if line in looks
        }
        style.lines(axes, {line: [(-x, *rest) for x, *rest in of] for line, of in points.items()}, looks)
        style.cut_static(axes, found[key])
        style.density_axis(axes)
        axes.set_ylabel("perplexity")
        axes.set_title(f"{key[0]}, {key[1]:,} tokens")
    if len(looks) > style.MANY_LINES:
        style.legend(figure, ["dense", *(look["label"] for look in looks.values())], loc="outside right center")
    else:
        style.label_lines(figure)
    return figure
