"""A page, tables and figures; they read results files and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from seerattn.eval.maps import BlockMaps
from seerattn.eval.results import read_results
from seerattn.report.breakdown import draw_breakdown
from seerattn.report.curves import draw_curves, is_curves, read_curves
from seerattn.report.finetuned import is_finetuned
from seerattn.report.head_density import draw_head_density
from seerattn.report.maps import draw_maps, draw_masks
from seerattn.report.page import render_page
from seerattn.report.pareto import draw_pareto
from seerattn.report.perplexity import draw_perplexity
from seerattn.report.pooled import draw_pooled
from seerattn.report.select import latest
from seerattn.report.speedup import draw_speedup
from seerattn.report.summary_figure import draw_summary
from seerattn.report.table import render_tables
from seerattn.report.ttft import draw_ttft
from seerattn.saving import write_whole

FIGURES = (
    draw_summary,
    draw_perplexity,
    draw_pareto,
    draw_head_density,
    draw_speedup,
    draw_breakdown,
    draw_pooled,
    draw_ttft,
)


def write_report(paths: Sequence[Path], output: Path) -> list[Path]:
    """Writes ``report.html``, ``table.md`` and the figures that the files hold data for, each as .png and .svg.

    Args:
        paths: results (.jsonl), records of fine-tuning runs (.jsonl), and at most one file of block maps (.npz).
        output: folder, made if it is missing.

    Returns:
        The files written.

    Raises:
        ValueError: a file is missing, is something else, or there is no result.
    """
    map_files = [path for path in paths if path.suffix == ".npz"]
    if len(map_files) > 1:
        raise ValueError(f"results may hold one .npz of maps, got {len(map_files)}; draw each into a folder of its own")
    curve_files = [path for path in paths if is_curves(path)]
    results = latest(read_results([path for path in paths if path not in (*map_files, *curve_files)]))
    maps = BlockMaps.load(map_files[0]) if map_files else None
    curves = read_curves(curve_files)
    if not results and not curves and maps is None:
        raise ValueError(f"results must hold at least one line, got none in {', '.join(map(str, paths))}")
    output.mkdir(parents=True, exist_ok=True)
    written = []
    if results:
        table = output / "table.md"
        write_whole(table, render_tables(results))
        # Models that were trained further are compared in tables of their own.
        others = [r for r in results if not is_finetuned(r)]
        written = [table, *(path for draw in FIGURES for path in draw(others, output))]
    written += draw_curves(curves, output)
    if maps is not None:
        written += [*draw_maps(maps, output), *draw_masks(maps, output)]
    page = output / "report.html"
    write_whole(page, render_page(results, maps, written))
    return [page, *written]
