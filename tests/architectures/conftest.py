"""Which families a process tries, so that several may share them, and which laws are for which."""

from __future__ import annotations

import pytest
from verdicts import EXPECTED, LEFT_OUT, REFUSED

# Verdicts by the fixture that a law asks for.
WITHOUT = {"served": (REFUSED, LEFT_OUT), "refused": tuple({v for v in EXPECTED.values() if not v.startswith(REFUSED)})}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        part, parts = map(int, metafunc.config.getoption("--shard").split("/"))
        metafunc.parametrize("name", sorted(EXPECTED)[part - 1 :: parts], scope="module")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Parametrizing each law with its own families would undo the grouping by family.
    other = {item for item in items for law in WITHOUT if law in item.fixturenames and _is(item, WITHOUT[law])}
    config.hook.pytest_deselected(items=list(other))
    items[:] = [item for item in items if item not in other]


def _is(item: pytest.Item, verdicts: tuple[str, ...]) -> bool:
    return EXPECTED[item.callspec.params["name"]].startswith(verdicts)
