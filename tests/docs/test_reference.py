"""The pages of the reference are what the code says now."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import seerattn

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_of_the_command_line_is_what_the_commands_make() -> None:
    spec = importlib.util.spec_from_file_location("cli_reference", DOCS / "cli_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    assert written == module.page(), "run python docs/cli_reference.py"


def test_the_page_of_the_library_has_every_public_name_where_it_is() -> None:
    told = re.findall(r"^::: (\S+)$", (DOCS / "reference" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    public = {getattr(seerattn, name) for name in seerattn.__all__}
    found = []
    for path in told:
        module, _, name = path.rpartition(".")
        found.append(getattr(importlib.import_module(module), name))
    assert len(set(told)) == len(told) and public <= set(found)
