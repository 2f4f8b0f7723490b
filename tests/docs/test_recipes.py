"""The recipe that a page shows is one that `seerattn compare` takes."""

from __future__ import annotations

import re
from pathlib import Path

from seerattn.eval.recipe import read_recipe

ROOT = Path(__file__).parents[2]


def test_the_recipe_of_the_page_is_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "howto" / "compare-systems.md").read_text(encoding="utf-8")
    found = re.search(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert found is not None
    # Its names stand for those of the reader.
    own = {
        "[MODEL]": f"[{ROOT / 'assets/reference-model'}]",
        "gates: gates}": f"gates: {ROOT / 'assets/reference-gates/best'}}}",
        "held-out/": str(ROOT / "assets/books/evaluate"),
    }
    text = found[1]
    for name, path in own.items():
        assert name in text
        text = text.replace(name, path)
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert recipe.densities == (0.2, 0.1) and [task.task for task in recipe.tasks] == ["perplexity", "passkey"]
    assert "mine" in [selector.name for selector in recipe.selectors]
