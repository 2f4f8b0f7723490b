"""A page, tables and figures; they read results files and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from seerattn.extras import check_extra
from seerattn.outputs import check_folder, check_output
from seerattn.report.curves import is_curves, read_curves
from seerattn.report.parts import MARK
from seerattn.report.render.markdown import render_sections
from seerattn.report.select import latest
from seerattn.report.tables import sections
from seerattn.results.file import read_results
from seerattn.results.maps import BlockMaps
from seerattn.results.record import with_texts
from seerattn.saving import staged
from seerattn.texts import visible

# Bytes of a file that hold the mark.
_HEAD = 4096


def write_report(paths: Sequence[Path], output: Path) -> list[Path]:
    """Writes ``report.html``, ``table.md`` and the figures that the files hold data for, each as .png and .svg.

    Args:
        paths: results (.jsonl), records of training runs (.jsonl), and at most one file of block maps (.npz).
        output: folder, made if it is missing.

    Returns:
        The files written.

    Raises:
        ValueError: a file is missing, is something else, or there is no result; or the folder holds a file that would
            be replaced and is not of a report.
        OSError: the report could not be written; the folder is as it was.
    """
    check_folder(output, "output")
    with TemporaryDirectory() as made:
        names = [path.name for path in _write(paths, Path(made))]
        for name in names:
            check_output(output / name, "output", "a report", _check_mark)
        output.mkdir(parents=True, exist_ok=True)
        with staged(output, "the report") as staging:
            for name in names:
                shutil.copyfile(Path(made) / name, staging / name)
    return [output / name for name in names]


def _write(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Writes all files into a folder, the page first among those returned."""
    # Tables in a terminal need neither of its packages.
    check_extra("report", "a report")
    from seerattn.report.figures import draw_figures
    from seerattn.report.render.page import render_page

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
    found = sections(results, maps)
    figures = draw_figures(results, curves, maps, folder)
    page, table = folder / "report.html", folder / "table.md"
    page.write_text(render_page(results, found, figures), encoding="utf-8")
    if results:
        table.write_text(f"<!-- {MARK} -->\n\n{render_sections(found)}", encoding="utf-8")
    return [page, *([table] if results else []), *figures]


def _check_mark(path: Path) -> None:
    with path.open("rb") as file:
        if MARK.encode() not in file.read(_HEAD):
            raise ValueError("it was not made by seerattn report")
