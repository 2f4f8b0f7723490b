"""Every message of the page on trouble is one that the code has."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
# In the place of a value that is put into a message, by an f-string or by logging.
HOLE = "\0"


@cache
def sentences() -> list[str]:
    """All strings of the package, their values left open."""
    found = []
    for path in sorted((ROOT / "seerattn").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[.\d]*[srdfg]", HOLE, node.value))
    return [sentence for sentence in found if " " in sentence]


def is_said(message: str) -> bool:
    """Whether the code has the message, where an ellipsis of it may be any value."""
    # What is left open on the page is left open in the code, or has dots there too.
    wanted = re.compile(re.escape(message).replace(re.escape("..."), rf"(?:{HOLE}|\.\.\.)"))
    return any(wanted.search(sentence) for sentence in sentences())


def messages(page: str) -> list[str]:
    """The sentences in the blocks of text of a page."""
    blocks = re.findall(r"^ *```text\n(.*?)^ *```", page, re.MULTILINE | re.DOTALL)
    return [block.strip() for block in blocks]


def test_every_message_of_the_page_is_said_by_the_code() -> None:
    told = messages((ROOT / "docs" / "howto" / "trouble.md").read_text(encoding="utf-8"))
    assert len(told) > 30
    assert not [message for message in told if not is_said(message)]


def test_a_message_that_nothing_says_is_seen() -> None:
    assert is_said("context must be at most ..., the model's own, got ...")
    assert not is_said("context must be at most ..., the own of the model, got ...")
    assert not is_said("context must be at most 8192, the model's own, got ...")
