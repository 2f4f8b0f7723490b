import json
import math

import pytest
import torch
from tiny_corpus import tiny_tokenizer
from tiny_models import tiny_model, tokens

from seerattn.data.windows import Window, cut_windows
from seerattn.eval.choice import DENSE, Choice, at_density
from seerattn.eval.tasks import perplexity
from seerattn.eval.tasks.perplexity import PerplexityJob
from seerattn.gate import AttnGateConfig
from seerattn.hf.attach import attach
from seerattn.hf.eval_model import EvalModel
from seerattn.hf.state import layer_states
from seerattn.methods.blasst import Blasst
from seerattn.methods.gate import Gate
from seerattn.methods.oracle import Oracle
from seerattn.methods.streaming import Streaming
from seerattn.methods.xattention import XAttention
from seerattn.results import statistics
from seerattn.results.appending import Appended
from seerattn.results.file import ResultsFile, read_results
from seerattn.results.record import Result


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


def job_of(windows: list[Window], *, timed: bool = False) -> PerplexityJob:
    ids = [window.input_ids for window in windows]
    return PerplexityJob("perplexity", "t", max(map(len, ids)), ids, windows=windows, timed=timed)


@pytest.fixture(scope="module")
def windows(documents) -> list[Window]:
    return cut_windows(documents, context=400, count=1, bos_token_id=1)


def measured(model, windows, *choices: Choice, batch: int = 1) -> list[Result]:
    return job_of(windows).measure(model, choices, ResultsFile(None), batch=batch)


def test_dense_perplexity_matches_the_models_own_loss_weighted_by_tokens(model, documents) -> None:
    cut = cut_windows(documents, context=450, count=None, min_tokens=20, bos_token_id=1)
    assert {len(w.input_ids) for w in cut} > {450}
    (row,) = measured(model, cut, DENSE, batch=3)
    losses, counts = [0.0] * 4, [0] * 4
    for window in cut:
        ids = torch.tensor([window.input_ids])
        with torch.no_grad():
            loss = model.model(input_ids=ids, labels=ids).loss.item()
        losses[window.document] += loss * (ids.shape[1] - 1)
        counts[window.document] += ids.shape[1] - 1
    assert row.value == pytest.approx(math.exp(sum(losses) / sum(counts)), rel=1e-5)
    assert row.stderr == pytest.approx(statistics.perplexity(losses, counts).stderr, rel=1e-4)
    assert row.n == sum(counts) and row.samples["tokens"] == counts and row.realised_density == 1
    assert (row.method, row.kind, row.name, row.settings) == ("dense", "dense", "dense", {})


def test_keeping_all_blocks_matches_dense_and_keeping_few_does_not(model, gate_folders, windows) -> None:
    for folder in gate_folders:
        methods = Gate(gates=folder), Oracle(), Streaming()
        choices = [at_density(model, method, density) for method in methods for density in (1.0, 0.1)]
        rows = measured(model, windows, DENSE, *choices)
        dense = rows[0].value
        found = {(r.line, r.density): r for r in rows if r.what == "perplexity"}
        for name in (folder.name, "oracle", "streaming"):
            assert found[name, 1.0].value == pytest.approx(dense, rel=1e-5)
            assert found[name, 1.0].realised_density == 1
            assert abs(found[name, 0.1].value / dense - 1) > 1e-3
            assert found[name, 0.1].realised_density < 0.5


def test_realised_density_counts_sinks_diagonal_and_recent_blocks(model, windows) -> None:
    plain, dense_rows = (at_density(model, Streaming(), 0.3, last_rows_dense=rows) for rows in (0, 2))
    # 400 tokens are 7 blocks, 28 causal ones; two a row keep 13 of them, three keep 18.
    assert measured(model, windows, plain)[0].realised_density == pytest.approx(13 / 28)
    assert measured(model, windows, dense_rows)[0].realised_density == pytest.approx((1 + 4 * 2 + 6 + 7) / 28)


def test_what_attention_skips_is_told_beside_the_density_of_the_lists(model, windows) -> None:
    rows = {}
    for kernel in (False, True):
        method = Blasst(block_q=16, block_k=16, kernel=kernel)
        rows[kernel] = measured(model, windows, Choice(method, method.selectors(), 1.0, budget="time"))[0]
    assert rows[True].value == pytest.approx(rows[False].value, rel=1e-5)
    assert rows[True].realised_density == 1 and "skipped" not in rows[False].samples
    # Windows are equally long.
    assert rows[True].samples["skipped"] == [pytest.approx(1 - rows[False].realised_density)]
    assert 0 < rows[True].samples["skipped"][0] < 1


def test_layers_without_a_gate_count_as_dense(windows, tmp_path) -> None:
    gated = attach(tiny_model("llama"), AttnGateConfig(), layers=[1])
    gated.save_pretrained(tmp_path)
    model = EvalModel(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    row = measured(model, windows, at_density(model, Gate(gates=tmp_path), 0.5))[0]
    assert row.realised_density == pytest.approx((1 + 13 / 28) / 2)


def test_batches_change_nothing(model, gate_folders, windows) -> None:
    choice = at_density(model, Gate(gates=gate_folders[0]), 0.4)
    for batch in (3, 4):
        rows = [measured(model, windows, choice, batch=size)[0] for size in (1, batch)]
        assert rows[0].samples["losses"] == pytest.approx(rows[1].samples["losses"], rel=1e-5)
        assert rows[0].realised_density == rows[1].realised_density


def test_differences_are_paired_by_document(model, windows) -> None:
    dense, sparse, difference = measured(model, windows, DENSE, at_density(model, Oracle(), 0.3))
    losses, base, counts = sparse.samples["losses"], dense.samples["losses"], dense.samples["tokens"]
    assert difference.what == "perplexity_difference" and difference.value == pytest.approx(sparse.value - dense.value)
    assert difference.stderr == pytest.approx(statistics.perplexity_difference(losses, base, counts).stderr)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(model, windows, tmp_path, monkeypatch) -> None:
    path, job = tmp_path / "r.jsonl", job_of(windows)
    choices = [DENSE, *(at_density(model, method, d) for method in (Oracle(), Streaming()) for d in (0.5, 0.3))]
    calls, measure = [], perplexity.document_losses

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(perplexity, "document_losses", counted)
    with pytest.raises(KeyboardInterrupt):
        job.measure(model, choices, ResultsFile(path))
    assert not layer_states(model.model)
    kept = path.read_bytes()
    path.write_bytes(kept[:-20])
    rows = job.measure(model, choices, ResultsFile(path))
    # Dense and two choices before the kill; the cut took a part of the second one's results, and so all of them.
    assert len(calls) == 4 + 3
    assert [row.key for row in rows] == [row.key for row in read_results([path])]
    fresh = job.measure(model, choices, ResultsFile(None))
    assert [row.value for row in rows] == pytest.approx([row.value for row in fresh], rel=1e-6)


def test_the_dense_model_is_untouched_by_what_was_attached_before(model, windows) -> None:
    before = measured(model, windows, DENSE)[0]
    with at_density(model, Streaming(), 0.1).on(model):
        assert layer_states(model.model)
    after = measured(model, windows, DENSE)[0]
    assert after.samples == before.samples


def test_dense_is_measured_for_others_and_given_back_only_where_it_was_asked_for(model, windows) -> None:
    output, oracle = ResultsFile(None), at_density(model, Oracle(), 0.5)
    rows = job_of(windows).measure(model, [oracle], output)
    assert [(r.what, r.name) for r in rows] == [("perplexity", "oracle"), ("perplexity_difference", "oracle")]
    dense = job_of(windows).measure(model, [DENSE], output)
    assert [(r.what, r.name) for r in dense] == [("perplexity", "dense")]
    assert job_of(windows).measure(model, [oracle, DENSE], output) == [*dense, *rows]


def test_choices_at_a_density_reject_methods_of_another_setting_and_densities_that_are_none(model) -> None:
    with pytest.raises(ValueError, match="method"):
        at_density(model, XAttention(), 0.1)
    for density in (0.0, 1.5):
        with pytest.raises(ValueError, match="density"):
            at_density(model, Oracle(), density).selector_at(0)


def test_times_that_an_old_file_lacks_are_measured_again(model, windows, tmp_path, monkeypatch) -> None:
    path, job = tmp_path / "r.jsonl", job_of(windows, timed=True)
    choices = [DENSE, at_density(model, Oracle(), 0.5)]
    whole = job.measure(model, choices, ResultsFile(path))
    lines = path.read_text().splitlines(True)
    # As files were written before groups: lines alone, the last one missing.
    old = [json.loads(line) | {"part": None} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in old[:-1]))
    found = job.measure(model, choices, ResultsFile(path))
    assert [row.key for row in found] == [row.key for row in whole]
    assert [row.key for row in read_results([path])] == [row.key for row in whole]
    # What was there stays; only the missing row is new.
    assert path.read_text().splitlines()[:-1] == [json.dumps(line) for line in old[:-1]]
    monkeypatch.setattr(perplexity, "document_losses", None)
    job.measure(model, choices, ResultsFile(path))


def test_rows_of_one_choice_are_written_as_one(model, windows, tmp_path, monkeypatch) -> None:
    pieces = []
    monkeypatch.setattr(Appended, "append", lambda self, piece: pieces.append(piece))
    job_of(windows, timed=True).measure(model, [at_density(model, Oracle(), 0.5)], ResultsFile(tmp_path / "r.jsonl"))
    found = [[json.loads(line)["what"] for line in piece.splitlines()] for piece in pieces]
    assert found == [["perplexity", "attention_ms"], ["perplexity", "perplexity_difference", "attention_ms"]]
