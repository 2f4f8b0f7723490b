"""Links of the pages that leave docs/: rewritten for the site by the hook, and each to something that is there.

Links inside of docs/ are checked by `make docs`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from docs_scripts import DOCS, docs_script

PAGES = sorted(path.relative_to(DOCS) for path in DOCS.glob("**/*.md"))
CONFIG = {"docs_dir": str(DOCS), "extra": {"repo_url": "https://example.org/repo/"}}


@pytest.fixture(scope="module")
def rewritten() -> Callable[[str, str], str]:
    """What the hook makes of the text of a page at a place."""
    hooks = docs_script("hooks")

    def rewrite(text: str, place: str) -> str:
        page = SimpleNamespace(file=SimpleNamespace(src_uri=place))
        return hooks.on_page_markdown(text, page=page, config=CONFIG, files=None)

    return rewrite


def anchors(page: Path) -> set[str]:
    """Those of the headings of a file, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_that_leave_docs_go_to_the_repository(rewritten: Callable[[str, str], str]) -> None:
    assert (
        rewritten("[d](../DESIGN.md#the-flow)", "a.md") == "[d](https://example.org/repo/blob/main/DESIGN.md#the-flow)"
    )
    assert rewritten("[d](../../research)", "howto/a.md") == "[d](https://example.org/repo/tree/main/research)"


@pytest.mark.parametrize("link", ["results.md", "figures/maps.png", "#here", "https://a.org/b", "../no/such/file.md"])
def test_other_links_stay_as_they_are(link: str, rewritten: Callable[[str, str], str]) -> None:
    assert rewritten(f"[x]({link})", "targets.md") == f"[x]({link})"


@pytest.mark.parametrize("place", PAGES, ids=str)
def test_files_and_headings_outside_of_docs_that_a_page_links_to_are_there(place: Path) -> None:
    page = DOCS / place
    for target, anchor in re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)(?:#([^)\s]*))?\)", page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve()
        assert path.exists(), target
        if anchor and DOCS not in path.parents:
            assert anchor in anchors(path), f"{target}#{anchor}"


def test_laws_of_the_design_name_tests_that_are_there() -> None:
    named = re.findall(
        r"`(?:tests/)?((?:\w+/)?test_\w+\*?\.py)`", (DOCS.parent / "DESIGN.md").read_text(encoding="utf-8")
    )
    assert len(named) > 30
    assert not [name for name in named if not list((DOCS.parent / "tests").glob(name))]
