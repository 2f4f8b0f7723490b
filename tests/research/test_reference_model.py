"""The recipe of the reference model, end to end on a tiny corpus."""

import bz2
import copy
import gzip
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2] / "research"))
import reference_data
import reference_model

_NOUNS = ["river", "tower", "harbour", "lantern", "meadow", "orchard", "castle", "bridge"]
_VERBS = ["crossed", "guarded", "painted", "forgot", "praised", "mended"]


def _text(rng: random.Random, sentences: int) -> str:
    """Sentences of a small grammar, hard-wrapped; its entropy is a few bits a word."""
    return "\n".join(
        f"The {rng.choice(_NOUNS)} of {rng.randrange(10)} miles {rng.choice(_VERBS)} the {rng.choice(_NOUNS)}."
        for _ in range(sentences)
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    writers = {".gz": gzip.open, ".bz2": bz2.open, "": open}
    shards = [("books/train-000", ".gz", 8), ("books/train_more-000", ".bz2", 4), ("books/validation-000", "", 3)]
    shards += [("proofs/train-000", "", 4), ("proofs/validation-000", ".bz2", 1)]
    for name, suffix, count in shards:
        path = folder / f"{name}.jsonl{suffix}"
        path.parent.mkdir(exist_ok=True)
        with writers[suffix](path, "wt", encoding="utf-8") as file:
            for number in range(count):
                file.write(json.dumps({"text": _text(rng, 400 if number else 5)}) + "\n")
    return folder


def _recipe(data: Path, output: Path, **changes: object) -> "reference_model.Recipe":
    tiny = {
        "steps": 36,
        "short_share": 0.5,
        "short_context": 256,
        "context": 512,
        "tokens_per_step": 2048,
        "vocab_size": 400,
        "hidden_size": 64,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "intermediate_size": 96,
        "muon_lr": 2e-2,
        "adamw_lr": 1e-2,
        "warmup_steps": 5,
        "log_every": 12,
    }
    return reference_model.Recipe(data=data, output=output, **(tiny | changes))


def _log(folder: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory):
    output = tmp_path_factory.mktemp("run") / "model"
    return reference_model.train(_recipe(data, output)), output


def test_training_loss_falls_below_that_of_word_frequencies(trained, data):
    _, output = trained
    tokenizer = AutoTokenizer.from_pretrained(output)
    texts = [text for group in reference_data.read_texts(data, "train").values() for text in group]
    counts = np.bincount(np.concatenate(reference_data.tokenise(tokenizer, texts)))
    shares = counts[counts > 0] / counts.sum()
    unigram = -(shares * np.log(shares)).sum()
    losses = [line["loss"] for line in _log(output, "train")]
    assert losses[-1] < 0.75 * unigram
    assert _log(output, "validation")[-1]["perplexity"] < np.exp(0.75 * unigram)
    assert _log(output, "summary")[-1]["tokens"] == 36 * 2048
    assert _log(output, "summary")[-1]["tokens_by_context"] == {"256": 18 * 2048, "512": 18 * 2048}


def test_saved_folder_matches_the_trained_model(trained):
    model, output = trained
    tokenizer, loaded = AutoTokenizer.from_pretrained(output), AutoModelForCausalLM.from_pretrained(output)
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.rope_parameters["rope_theta"] == 5e5
    assert not list(output.parent.glob(".*")), "a temporary folder was left behind"
    input_ids = tokenizer("The river of 7 miles guarded the tower.", return_tensors="pt").input_ids
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], weight.to(torch.bfloat16), rtol=0, atol=0)
    with torch.no_grad():
        exact = loaded.float()(input_ids=input_ids).logits
        rounding = model(input_ids=input_ids).logits - exact
    # Weights rounded to 8 bits (2**-9 relative) and a few sums of products between input and logits.
    assert rounding.norm() < 8 * 2**-9 * exact.norm()


def test_layerwise_forward_matches_the_models_own(trained):
    model = copy.deepcopy(trained[0]).to(torch.bfloat16)
    rows = torch.randint(3, model.config.vocab_size, (2, 130), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=rows).logits
        got = model.lm_head(reference_model.hidden_states(model, rows))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_tokenizer_splits_digits_puts_bos_first_and_round_trips(trained):
    _, output = trained
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("77123", add_special_tokens=False)) == list("77123")
    text = "The river of 12 miles;\n\tnaïve \N{SNOWMAN} x_{1}"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    padded = tokenizer(["The river", "The"], padding=True).input_ids
    assert padded[1][0] == tokenizer.pad_token_id
    assert tokenizer.model_max_length == 512


def test_same_seed_gives_the_same_tokenizer_and_losses(data, tmp_path):
    for name in ("a", "b"):
        reference_model.train(_recipe(data, tmp_path / name, steps=4, log_every=1))
    a, b = tmp_path / "a", tmp_path / "b"
    assert (a / "tokenizer.json").read_bytes() == (b / "tokenizer.json").read_bytes()
    losses = [[line["loss"] for line in _log(folder, "train")] for folder in (a, b)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_epoch_windows_hold_every_token_once_up_to_one_row():
    rng = random.Random(3)
    documents, token = [], 10
    for length in (5, 33, 64, 65, 200, 333):
        documents.append(np.arange(token, token + length, dtype=np.uint16))
        token += length
    rows = list(reference_data.epoch_windows(documents, 64, 1, rng))
    assert {len(row) for row in rows} == {65} and {int(row[0]) for row in rows} == {1}
    seen = [int(t) for row in rows for t in row if t != 1]
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(10, token))
    assert token - 10 - len(seen) < 64
    again = list(reference_data.epoch_windows(documents, 64, 1, rng))
    assert not all(np.array_equal(a, b) for a, b in zip(rows, again, strict=False)), "the second epoch is cut alike"


def test_cli_rejects_a_folder_without_shards(tmp_path):
    app = reference_model.typer.Typer()
    app.command()(reference_model.main)
    result = CliRunner().invoke(app, ["--data", str(tmp_path), "--output", str(tmp_path / "model")])
    assert result.exit_code == 2 and "books/train" in result.output
    assert not (tmp_path / "model").exists()
