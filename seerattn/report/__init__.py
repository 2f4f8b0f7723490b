"""A page, tables and figures; they read results files and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from seerattn.outputs import check_folder, check_output
from seerattn.report.attention_map import draw_pooled
from seerattn.report.breakdown import draw_breakdown
from seerattn.report.curves import Curve, draw_curves, is_curves, read_curves
from seerattn.report.finetuned import is_finetuned
from seerattn.report.head_density import draw_head_density
from seerattn.report.maps import draw_maps, draw_masks
from seerattn.report.page import render_page
from seerattn.report.pareto import draw_pareto
from seerattn.report.perplexity import draw_perplexity
from seerattn.report.select import latest
from seerattn.report.speedup import draw_speedup
from seerattn.report.style import MARK
from seerattn.report.summary_figure import draw_summary
from seerattn.report.table import render_tables
from seerattn.report.teachers_figure import draw_teachers
from seerattn.report.ttft import draw_ttft
from seerattn.results.file import read_results
from seerattn.results.maps import BlockMaps
from seerattn.results.record import Result, with_texts
from seerattn.saving import staged
from seerattn.texts import in_figure, visible

# Bytes of a file that hold the mark.
_HEAD = 4096

FIGURES = (
    draw_summary,
    draw_teachers,
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
        ValueError: a file is missing, is something else, or there is no result; or the folder holds a file that would
            be replaced and is not of a report.
        OSError: the report could not be written; the folder is as it was.
    """
    check_folder(output, "output")
    map_files = [path for path in paths if path.suffix == ".npz"]
    if len(map_files) > 1:
        raise ValueError(f"results may hold one .npz of maps, got {len(map_files)}; draw each into a folder of its own")
    curve_files = [path for path in paths if is_curves(path)]
    read = read_results([path for path in paths if path not in (*map_files, *curve_files)])
    results = latest(with_texts(result, visible) for result in read)
    maps = BlockMaps.load(map_files[0]) if map_files else None
    curves = read_curves(curve_files)
    if not results and not curves and maps is None:
        raise ValueError(f"results must hold at least one line, got none in {', '.join(map(str, paths))}")
    with TemporaryDirectory() as made:
        names = [path.name for path in _write(results, curves, maps, Path(made))]
        for name in names:
            check_output(output / name, "output", "a report", _check_mark)
        output.mkdir(parents=True, exist_ok=True)
        with staged(output, "the report") as staging:
            for name in names:
                shutil.copyfile(Path(made) / name, staging / name)
    return [output / name for name in names]


def _write(results: Sequence[Result], curves: Sequence[Curve], maps: BlockMaps | None, folder: Path) -> list[Path]:
    """Writes all files into a folder, the page first among those returned."""
    written = []
    if results:
        table = folder / "table.md"
        table.write_text(f"<!-- {MARK} -->\n\n{render_tables(results)}", encoding="utf-8")
        # Models that were trained further are compared in tables of their own.
        others = [with_texts(r, in_figure) for r in results if not is_finetuned(r)]
        written = [table, *(path for draw in FIGURES for path in draw(others, folder))]
    written += draw_curves([replace(curve, name=in_figure(curve.name)) for curve in curves], folder)
    if maps is not None:
        drawn = replace(maps, gates=in_figure(maps.gates))
        written += [*draw_maps(drawn, folder), *draw_masks(drawn, folder)]
    page = folder / "report.html"
    page.write_text(render_page(results, maps, written), encoding="utf-8")
    return [page, *written]


def _check_mark(path: Path) -> None:
    with path.open("rb") as file:
        if MARK.encode() not in file.read(_HEAD):
            raise ValueError("it was not made by seerattn report")
