"""The pages of the reference are what the code says now."""

from __future__ import annotations

import importlib
import re

from docs_scripts import DOCS, docs_script

import seerattn


def test_the_page_of_the_command_line_is_what_the_commands_make() -> None:
    written = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    assert written == docs_script("cli_reference").page(), "run python docs/cli_reference.py"


def test_the_page_of_the_library_has_every_public_name_where_it_is() -> None:
    told = re.findall(r"^::: (\S+)$", (DOCS / "reference" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    public = {getattr(seerattn, name) for name in seerattn.__all__}
    found = []
    for path in told:
        module, _, name = path.rpartition(".")
        found.append(getattr(importlib.import_module(module), name))
    assert len(set(told)) == len(told) and public <= set(found)
