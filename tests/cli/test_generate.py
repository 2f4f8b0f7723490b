"""`seerattn generate`: what it prints is what the model with its gates says."""

import gzip
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_corpus import topical_text, write_models_and_gates
from transformers import AutoModelForCausalLM, AutoTokenizer

import seerattn
from seerattn.cli import main

TEXT = topical_text(300, 0)
ASKED = ("--device", "cpu", "--impl", "sparse", "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    write_models_and_gates(folder)
    return folder


def run(folder: Path, *args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--model", f"{folder}/model", *ASKED, *args])
    return stop.value.code


def expected(folder: Path, text: str, density: float | None) -> tuple[str, float]:
    """What the model says, by transformers, and the density that was counted."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    if density is not None:
        policy = seerattn.TopK(density=density)
        model = seerattn.attach(model, folder / "gates-of-model", policy, impl="sparse")
    ids = tokenizer(text, return_tensors="pt").input_ids
    with seerattn.record_density(model) as meter:
        found = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    answer = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    return answer, meter.mean() if density is not None else 1.0


@pytest.mark.parametrize("prompt", ["--density=0.5", "--dense"])
def test_tokens_of_an_answer_read_as_many_as_they_may(folder, capsys, prompt: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    policies = {"policy": seerattn.TopK(density=0.5) if "density" in prompt else None}
    policies["decode_policy"] = seerattn.TokenBudget(tokens=128)
    model = seerattn.attach(model, folder / "gates-of-model", impl="sparse")
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with seerattn.policy(model, **policies), seerattn.record_density(model) as meter:
        found = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    assert meter.decode.mean() == pytest.approx(2 / 5)
    gates = ("--gates", f"{folder}/gates-of-model", prompt, "--decode-tokens", "128")
    assert run(folder, *gates, "--prompt", TEXT) == 0
    out, told = capsys.readouterr()
    assert out == tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True) + "\n"
    assert "s (density 0.400)" in told and ("(dense)" in told) == (prompt == "--dense")
    assert run(folder, "--dense", "--decode-tokens", "128", "--prompt", TEXT) == 2
    assert "gates must be given to choose what decode_tokens bounds, got 128 alone" in " ".join(
        capsys.readouterr().err.split()
    )


def test_answer_is_that_of_generate_wherever_the_text_comes_from(
    folder, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, density = expected(folder, TEXT, 0.5)
    packed = tmp_path / "text.txt.gz"
    packed.write_bytes(gzip.compress(TEXT.encode()))
    gates = ("--gates", f"{folder}/gates-of-model", "--density", "0.5")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(TEXT.encode()), isatty=lambda: False))
    for way in (("--prompt", TEXT), ("--file", str(packed)), ()):
        assert run(folder, *gates, *way) == 0
        out, told = capsys.readouterr()
        assert out == f"{answer}\n" and f"density {density:.3f}" in told and "300 tokens read in" in told


def test_a_model_whose_layers_are_dealt_out_says_the_same(
    folder, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one device here. The second one, on which accelerate would put a layer, is the disk."""
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"), "cpu")
    places |= dict.fromkeys(("model.layers.1", "lm_head"), "disk")
    read = AutoModelForCausalLM.from_pretrained
    seen = []

    def deal_out(name: str, **options):
        assert options.pop("device_map") == "auto"
        seen.append(read(name, device_map=places, offload_folder=tmp_path / "disk", **options))
        return seen[-1]

    answer, density = expected(folder, TEXT, 0.5)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", deal_out)
    gates = ("--gates", f"{folder}/gates-of-model", "--density", "0.5")
    assert run(folder, *gates, "--spread", "--prompt", TEXT) == 0
    ((model, _),) = seen
    assert model.model.layers[1].mlp.up_proj.weight.is_meta and not model.model.layers[0].mlp.up_proj.weight.is_meta
    out, told = capsys.readouterr()
    assert out == f"{answer}\n" and f"density {density:.3f}" in told


@pytest.mark.parametrize("gates", [(), ("--gates", "@gates-of-model")], ids=["without gates", "with gates"])
def test_dense_is_the_model_itself(folder, capsys, gates) -> None:
    answer, _ = expected(folder, TEXT, None)
    assert run(folder, "--dense", "--prompt", TEXT, *(one.replace("@", f"{folder}/") for one in gates)) == 0
    out, told = capsys.readouterr()
    assert out == f"{answer}\n" and "(dense)" in told


def test_chat_goes_by_the_template_of_the_model(folder, tmp_path, capsys) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = "{% for m in messages %}w1 w2 {{ m['content'] }} w3{% endfor %}"
    chats = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(folder / "model").save_pretrained(chats)
    tokenizer.save_pretrained(chats)
    answer, _ = expected(folder, f"w1 w2 {TEXT} w3", None)
    with pytest.raises(SystemExit):
        main(["generate", "--model", str(chats), *ASKED, "--dense", "--chat", "--prompt", TEXT])
    assert capsys.readouterr().out == f"{answer}\n"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--prompt", "w1", "--file", "x", "--dense"), "one of prompt and file must be given"),
        (("--prompt", "w1"), "gates must be given"),
        (("--prompt", "w1", "--dense", "--density", "0.5"), "density must be left out with dense"),
        (("--prompt", "w1", "--gates", "@gates-of-model"), "density must be given for gates without a policy"),
        (("--prompt", "w1", "--dense", "--chat"), "must have a chat template"),
        (("--prompt", "w1 " * 1020, "--dense"), "at most the model's 1024 tokens together"),
        (("--prompt", " ", "--dense"), "at least one token"),
        (("--file", "@bytes", "--dense"), "must hold UTF-8 text"),
        (("--file", "@none", "--dense"), "No such file"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_a_sentence(folder, capsys, args, sentence: str) -> None:
    (folder / "bytes").write_bytes(b"\xff\xfe")
    assert run(folder, *(one.replace("@", f"{folder}/") for one in args)) == 2
    told = capsys.readouterr().err
    assert sentence in told and "Traceback" not in told
