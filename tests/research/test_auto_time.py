"""Times of `impl="auto"`: every arm is measured once, and nothing is timed that is not what it should be."""

import runpy
from pathlib import Path

import pytest
import torch
import typer
from tiny_models import tiny_model
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import seerattn
from seerattn.results.file import read_results

MAIN = runpy.run_path(str(Path(__file__).parents[2] / "research" / "auto_time.py"))["main"]
RUN = {"lengths": "70,130,900", "batches": "1,2", "max_length": 200, "repeats": 2, "device": "cpu", "dtype": "auto"}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A model and gates of it."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    seerattn.attach(tiny_model("llama"), seerattn.AttnGateConfig()).save_pretrained(tmp_path / "gates")
    return {"model": tmp_path / "model", "gates": tmp_path / "gates"}


def test_every_arm_is_measured_once_up_to_the_longest_prompt(folders: dict[str, Path], tmp_path: Path, capsys) -> None:
    output = tmp_path / "auto.jsonl"
    for _ in range(2):
        MAIN(**folders, output=output, **RUN)
    rows = read_results([output])
    arms = {("sdpa", None), ("auto", 0.1), ("auto", 0.2), ("sparse", 0.1), ("sparse", 0.2)}
    expected = [("prefill_ms", arm, *call) for arm in arms for call in ((1, 70), (1, 130), (2, 70))]
    expected += [("decode_ms", arm, 1, n) for arm in (("sdpa", None), ("auto", 0.1)) for n in (70, 130)]
    expected += [("decode_ms", arm, 2, 70) for arm in (("sdpa", None), ("auto", 0.1))]
    found = [(r.what, (r.cell["impl"], r.density), r.cell["batch"], r.context) for r in rows]
    assert sorted(map(str, found)) == sorted(map(str, expected))
    assert all(r.value > 0 and r.n == 2 == len(r.samples["ms"]) for r in rows)
    assert {r.realised_density for r in rows if r.what == "prefill_ms" and r.cell["impl"] == "auto"} == {1.0}
    assert "130" in capsys.readouterr().out


def test_what_gives_other_logits_than_the_model_without_gates_is_not_timed(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(module: torch.nn.Module, *args, **kwargs):
        out, weights = sdpa_attention_forward(module, *args, **kwargs)
        return (out * 1.001 if hasattr(module, "seer_gate") else out), weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", other)
    with pytest.raises(typer.Exit):
        MAIN(**folders, output=tmp_path / "auto.jsonl", **RUN)
    assert not (tmp_path / "auto.jsonl").exists()
