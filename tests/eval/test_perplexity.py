import json
import math

import pytest
import torch
from tiny_corpus import tiny_tokenizer
from tiny_models import tiny_model, tokens

from seerattn.data.windows import cut_windows
from seerattn.eval import perplexity
from seerattn.eval.arms import DENSE, Arm, EvalModel, Gates, make_arms
from seerattn.gate import AttnGateConfig
from seerattn.hf.attach import attach
from seerattn.hf.state import layer_states
from seerattn.results import statistics
from seerattn.results.appending import Appended
from seerattn.results.file import ResultsFile, read_results
from seerattn.selection import TopK


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("pieces", [1, 5])
def test_token_losses_match_the_models_own_loss(monkeypatch, name: str, pieces: int) -> None:
    """Gemma 2 caps its logits and Cohere scales them after the head."""
    model, ids = tiny_model(name), tokens(2, 131)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].double()
        own = model(input_ids=ids, labels=ids).loss.item()
    expected = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    monkeypatch.setattr(perplexity, "LOGITS_ELEMENTS", 2 * 97 * (131 // pieces))
    losses = perplexity.token_losses(model, ids)
    assert losses.shape == (2, 130)
    # fp32 logits of order 10 carry errors of order 10 x 2^-24 x sqrt(hidden); fp64 logs of them carry no more.
    assert (losses - expected).abs().max() < 2e-5
    assert losses.mean().item() == pytest.approx(own, abs=1e-5)
    assert "forward" not in vars(model.base_model)


def test_token_losses_over_a_large_vocabulary_have_no_bias() -> None:
    model, ids = tiny_model("llama", vocab_size=8192), tokens(1, 300)
    with torch.no_grad():
        # Spread as a trained model's: among equal logits every order of summation is exact.
        model.lm_head.weight *= 6 / model(input_ids=ids).logits.std()
        logits = model(input_ids=ids).logits[:, :-1].double()
    expected = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    # A loss of 16 to 32 is rounded by 2^-20 at most, to either side; the mean of the errors is no larger.
    assert (perplexity.token_losses(model, ids) - expected).mean().abs() < 2**-20


def windows_of(documents, context: int = 400):
    return {context: cut_windows(documents, context=context, count=1, bos_token_id=1)}


def test_dense_perplexity_matches_the_models_own_loss_weighted_by_tokens(subject, documents) -> None:
    cut = {450: cut_windows(documents, context=450, count=None, min_tokens=20, bos_token_id=1)}
    assert {len(w.input_ids) for w in cut[450]} > {450}
    (row,) = perplexity.evaluate_perplexity(subject, [], cut, ResultsFile(None), text="t", settings={}, batch=3)
    losses, counts = [0.0] * 4, [0] * 4
    for window in cut[450]:
        ids = torch.tensor([window.input_ids])
        with torch.no_grad():
            loss = subject.model(input_ids=ids, labels=ids).loss.item()
        losses[window.document] += loss * (ids.shape[1] - 1)
        counts[window.document] += ids.shape[1] - 1
    assert row.value == pytest.approx(math.exp(sum(losses) / sum(counts)), rel=1e-5)
    assert row.stderr == pytest.approx(statistics.perplexity(losses, counts).stderr, rel=1e-4)
    assert row.n == sum(counts) and row.samples["tokens"] == counts and row.realised_density == 1


def test_keeping_all_blocks_matches_dense_and_keeping_few_does_not(subject, documents) -> None:
    for folder in subject._gates:
        arms = make_arms(["gate", "oracle", "streaming"], [1.0, 0.1], gates=[folder])
        rows = perplexity.evaluate_perplexity(
            subject, arms, windows_of(documents), ResultsFile(None), text="t", settings={}
        )
        dense = rows[0].value
        found = {(r.arm, r.density): r for r in rows if r.what == "perplexity"}
        for name in (folder.name, "oracle", "streaming"):
            assert found[name, 1.0].value == pytest.approx(dense, rel=1e-5)
            assert found[name, 1.0].realised_density == 1
            assert abs(found[name, 0.1].value / dense - 1) > 1e-3
            assert found[name, 0.1].realised_density < 0.5


def test_realised_density_counts_sinks_diagonal_and_recent_blocks(subject, documents) -> None:
    arm = Arm("streaming", TopK(density=0.3))
    rows = perplexity.evaluate_perplexity(
        subject, [arm], windows_of(documents), ResultsFile(None), text="t", settings={}
    )
    # 400 tokens are 7 blocks, 28 causal ones; two a row keep 13 of them, three keep 18.
    assert rows[1].realised_density == pytest.approx(13 / 28)
    dense_rows = Arm("streaming", TopK(density=0.3, last_rows_dense=2))
    rows = perplexity.evaluate_perplexity(
        subject, [dense_rows], windows_of(documents), ResultsFile(None), text="t", settings={}
    )
    assert rows[1].realised_density == pytest.approx((1 + 4 * 2 + 6 + 7) / 28)


def test_layers_without_a_gate_count_as_dense(documents, tmp_path) -> None:
    gated = attach(tiny_model("llama"), AttnGateConfig(), layers=[1])
    gated.save_pretrained(tmp_path)
    folder = Gates("half", tmp_path)
    subject = EvalModel(tiny_model("llama"), tiny_tokenizer(), name="tiny", gates=[folder])
    arm = Arm("gate", TopK(density=0.5), folder)
    row = perplexity.evaluate_perplexity(
        subject, [arm], windows_of(documents), ResultsFile(None), text="t", settings={}
    )[1]
    assert row.realised_density == pytest.approx((1 + 13 / 28) / 2)


def test_batches_change_nothing(subject, documents) -> None:
    arm = Arm("gate", TopK(density=0.4), next(iter(subject._gates)))
    for batch in (3, 4):
        rows = [
            perplexity.evaluate_perplexity(
                subject, [arm], windows_of(documents), ResultsFile(None), text="t", settings={}, batch=size
            )[1]
            for size in (1, batch)
        ]
        assert rows[0].samples["losses"] == pytest.approx(rows[1].samples["losses"], rel=1e-5)
        assert rows[0].realised_density == rows[1].realised_density


def test_differences_are_paired_by_document(subject, documents) -> None:
    arm = Arm("oracle", TopK(density=0.3))
    dense, sparse, difference = perplexity.evaluate_perplexity(
        subject, [arm], windows_of(documents), ResultsFile(None), text="t", settings={}
    )
    losses, base, counts = sparse.samples["losses"], dense.samples["losses"], dense.samples["tokens"]
    assert difference.what == "perplexity_difference" and difference.value == pytest.approx(sparse.value - dense.value)
    assert difference.stderr == pytest.approx(statistics.perplexity_difference(losses, base, counts).stderr)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(subject, documents, tmp_path, monkeypatch) -> None:
    path, cut = tmp_path / "r.jsonl", windows_of(documents)
    arms = make_arms(["oracle", "streaming"], [0.5, 0.3])
    measured, measure = [], perplexity.document_losses

    def counted(*args, **kwargs):
        measured.append(args)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(perplexity, "document_losses", counted)
    with pytest.raises(KeyboardInterrupt):
        perplexity.evaluate_perplexity(subject, arms, cut, ResultsFile(path), text="t", settings={})
    assert not layer_states(subject.model)
    kept = path.read_bytes()
    path.write_bytes(kept[:-20])
    rows = perplexity.evaluate_perplexity(subject, arms, cut, ResultsFile(path), text="t", settings={})
    # Dense and two arms before the kill; the cut took a part of the second one's results, and so all of them.
    assert len(measured) == 4 + 3
    assert [row.key for row in rows] == [row.key for row in read_results([path])]
    fresh = perplexity.evaluate_perplexity(subject, arms, cut, ResultsFile(None), text="t", settings={})
    assert [row.value for row in rows] == pytest.approx([row.value for row in fresh], rel=1e-6)


def test_the_dense_model_is_untouched_by_what_was_attached_before(subject, documents) -> None:
    cut = windows_of(documents)
    before = perplexity.evaluate_perplexity(subject, [DENSE], cut, ResultsFile(None), text="t", settings={})[0]
    with subject.attached(Arm("streaming", TopK(density=0.1))):
        assert layer_states(subject.model)
    after = perplexity.evaluate_perplexity(subject, [DENSE], cut, ResultsFile(None), text="t", settings={})[0]
    assert after.samples == before.samples


def test_arms_reject_unknown_selectors_and_densities(gate_folders) -> None:
    with pytest.raises(ValueError, match="selectors must be among"):
        make_arms(["dense", "magic"], [0.1])
    with pytest.raises(ValueError, match="density must be in"):
        make_arms(["oracle"], [1.5])
    with pytest.raises(ValueError, match="selectors must name gate"):
        make_arms(["gate"], [0.1])
    with pytest.raises(ValueError, match="selectors must name gate"):
        make_arms(["oracle"], [0.1], gates=gate_folders)


def test_times_that_an_old_file_lacks_are_measured_again(subject, documents, tmp_path, monkeypatch) -> None:
    path, cut, arms = tmp_path / "r.jsonl", windows_of(documents), make_arms(["oracle"], [0.5])
    whole = perplexity.evaluate_perplexity(subject, arms, cut, ResultsFile(path), text="t", settings={}, timed=True)
    lines = path.read_text().splitlines(True)
    # As files were written before groups: lines alone, the last one missing.
    old = [json.loads(line) | {"part": None} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in old[:-1]))
    found = perplexity.evaluate_perplexity(subject, arms, cut, ResultsFile(path), text="t", settings={}, timed=True)
    assert [row.key for row in found] == [row.key for row in whole]
    assert [row.key for row in read_results([path])] == [row.key for row in whole]
    # What was there stays; only the missing row is new.
    assert path.read_text().splitlines()[:-1] == [json.dumps(line) for line in old[:-1]]
    monkeypatch.setattr(perplexity, "document_losses", None)
    perplexity.evaluate_perplexity(subject, arms, cut, ResultsFile(path), text="t", settings={}, timed=True)


def test_rows_of_one_arm_are_written_as_one(subject, documents, tmp_path, monkeypatch) -> None:
    pieces = []
    monkeypatch.setattr(Appended, "append", lambda self, piece: pieces.append(piece))
    options = {"text": "t", "settings": {}, "timed": True}
    perplexity.evaluate_perplexity(
        subject, make_arms(["oracle"], [0.5]), windows_of(documents), ResultsFile(tmp_path / "r.jsonl"), **options
    )
    found = [[json.loads(line)["what"] for line in piece.splitlines()] for piece in pieces]
    assert found == [["perplexity", "attention_ms"], ["perplexity", "perplexity_difference", "attention_ms"]]
