"""What the tests of reports share."""

import pytest
from written_tables import records

from seerattn.report.select import latest
from seerattn.results.record import Result


@pytest.fixture(scope="session")
def compared() -> list[Result]:
    """The comparison that is published."""
    return latest(records("compare-perplexity", "compare-retrieval"))
