"""What the tests of reports share."""

from pathlib import Path

import pytest
from rows import written
from whole import benchmarks, block_maps, everything
from written_tables import records

from seerattn.report.select import latest
from seerattn.results.record import Result


@pytest.fixture(scope="session")
def compared() -> list[Result]:
    """The comparison that is published."""
    return latest(records("compare-perplexity", "compare-retrieval"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a report with every kind of section."""
    from seerattn.report import write_report

    folder = tmp_path_factory.mktemp("whole")
    block_maps([(layer, head) for layer in range(4) for head in range(4)]).save(folder / "maps.npz")
    rows = written(folder / "r.jsonl", everything() + benchmarks())
    write_report([rows, folder / "maps.npz"], folder / "out")
    return folder / "out" / "report.html"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Figures by name, which are not written."""
    from seerattn.report import style

    figures: dict = {}
    monkeypatch.setattr(style, "save", lambda figure, folder, name: figures.update({name: figure}) or [])
    return figures
