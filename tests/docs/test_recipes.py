"""The experiment that a page shows is one that `seerattn eval` takes."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import AutoConfig

from seerattn.eval.experiment import Experiment

ROOT = Path(__file__).parents[2]


def test_the_experiment_of_the_page_is_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "howto" / "compare-methods.md").read_text(encoding="utf-8")
    found = re.search(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert found is not None
    # Its names stand for those of the reader.
    own = {
        "model: MODEL": f"model: {ROOT / 'assets/reference-model'}",
        "gates: gates}": f"gates: {ROOT / 'assets/reference-gates/best'}}}",
        "held-out/": str(ROOT / "assets/books/evaluate"),
    }
    text = found[1]
    for name, path in own.items():
        assert name in text
        text = text.replace(name, path)
    (tmp_path / "experiment.yaml").write_text(text, encoding="utf-8")
    experiment = Experiment.from_file(tmp_path / "experiment.yaml")
    experiment.check(AutoConfig.from_pretrained(experiment.model))
    assert experiment.densities == (0.2, 0.1)
    assert [task.id for task in experiment.tasks] == ["perplexity", "passkey", "harness"]
    assert "mine" in map(str, experiment.methods)
