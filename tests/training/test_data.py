"""Reading, tokenising and cutting of documents."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_corpus import tiny_tokenizer, topical_text

from seerattn.data.corpus import tokenize
from seerattn.data.packing import SamplePlan
from seerattn.data.samples import Samples, collate
from seerattn.data.text import read_documents

TOKENIZER = tiny_tokenizer()
BOS = TOKENIZER.bos_token_id


def make_samples(*lengths: int, count: int = 12, context: int = 256, seed: int = 0, **options: Any) -> Samples:
    texts = [topical_text(length, i) for i, length in enumerate(lengths)]
    corpus = tokenize(texts, TOKENIZER, min_tokens=63, enough_tokens=10**9, seed=seed)
    sizes = {"count": count, "context": context, "block": 32}
    return Samples(corpus, TOKENIZER, **sizes, **{"retrieval_share": 0.0} | options, seed=seed)


def test_read_documents_matches_what_was_written_in_every_format(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in ("one", "two\nlines")) + "\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.jsonl.bz2").write_bytes(bz2.compress(lines.encode()))
    (tmp_path / "d.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    (tmp_path / "e.txt").write_text("a whole\nfile")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "f.txt.gz").write_bytes(gzip.compress("caf\u00e9".encode()))
    (tmp_path / "sub" / "notes.csv").write_text("not data")
    assert read_documents([tmp_path]) == ["one", "two\nlines"] * 4 + ["a whole\nfile", "caf\u00e9"]
    assert read_documents([tmp_path / "e.txt", str(tmp_path / "a.jsonl")]) == ["a whole\nfile", "one", "two\nlines"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "must exist"),
        ("some/deep/folder", None, "must exist"),
        ("empty.jsonl", b"", "must hold text"),
        ("blank.txt", b" \n ", "must hold text"),
        ("table.csv", b"a,b", "must be .jsonl or .txt"),
        ("broken.jsonl", b'{"text": "x"}\n{"text": ', "line 2"),
        ("other.jsonl", b'{"content": "x"}\n', "line 1"),
        ("number.jsonl", b'{"text": 3}\n', "must be a string"),
        ("list.jsonl", b"[1]\n", "line 1"),
        ("deep.jsonl", b'{"text": "x"}\n' + b"[" * 100_000 + b"\n", "line 2"),
        ("deep object.jsonl", b'{"text": ' * 100_000, "line 1"),
        ("surrogate.jsonl", b'{"text": "x"}\n{"text": "half \\ud83d of it"}\n', "half a surrogate in line 2"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "must be readable UTF-8"),
        ("cut.txt.gz", gzip.compress(bytes(range(256)) * 9)[:40], "must be readable UTF-8"),
        ("fake.txt.gz", b"plain text", "must be readable UTF-8"),
        ("garbled.txt.gz", gzip.compress(b"x" * 99)[:12] + b"\xff" * 30, "must be readable UTF-8"),
        ("cut.txt.xz", lzma.compress(b"x" * 999)[:30], "must be readable UTF-8"),
        ("cut.txt.bz2", bz2.compress(b"x" * 999)[:20], "must be readable UTF-8"),
    ],
)
def test_read_documents_rejects_what_holds_no_text(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents([path])


def test_local_files_need_no_datasets_and_a_name_says_that_it_is_missing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.txt").write_text("text")
    assert read_documents([tmp_path / "a.txt"]) == ["text"]
    with pytest.raises(ValueError, match=r"datasets.*install"):
        read_documents(["owner/name"])


def test_read_documents_matches_a_dataset_of_the_library(tmp_path: Path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.jsonl").write_text('{"text": "one"}\n{"text": " "}\n{"text": "two"}\n')
    loaded = datasets.Dataset.from_list([{"text": "one"}, {"text": " "}, {"text": "two"}])
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or loaded)
    assert read_documents(["owner/name:validation"]) == ["one", "two"]
    assert asked == [("owner/name", "validation")]


def test_tokenize_stops_at_enough_tokens_and_drops_short_documents() -> None:
    texts = [topical_text(length, i) for i, length in enumerate([100] * 40 + [10] * 3)]
    everything = tokenize(texts, TOKENIZER, min_tokens=63, enough_tokens=10**9, seed=1)
    assert everything.lengths == [100] * 40 and everything.dropped == 3
    ids = TOKENIZER(texts, add_special_tokens=False)["input_ids"]
    assert sorted(map(list, everything.tokens.reshape(40, 100).tolist())) == sorted(i for i in ids if len(i) == 100)
    some = tokenize(texts, TOKENIZER, min_tokens=63, enough_tokens=1000, seed=1)
    assert 1000 <= len(some.tokens) < 2000
    assert some.tokens.tolist() == everything.tokens[: len(some.tokens)].tolist()
    with pytest.raises(ValueError, match="at least two blocks, 101 tokens, got 43 shorter ones"):
        tokenize(texts, TOKENIZER, min_tokens=101, enough_tokens=1000, seed=1)


def test_tokenize_shows_a_progress_bar_where_it_takes_long(monkeypatch, capsys: pytest.CaptureFixture) -> None:
    arguments = {"min_tokens": 63, "enough_tokens": 10**9, "seed": 1}
    tokenize([topical_text(100, 0)], TOKENIZER, progress=True, **arguments)
    assert "Tokenising" not in capsys.readouterr().err
    monkeypatch.setattr("seerattn.data.corpus._BAR_CHARACTERS", 100)
    tokenize([topical_text(100, 0)], TOKENIZER, progress=False, **arguments)
    assert "Tokenising" not in capsys.readouterr().err
    tokenize([topical_text(100, 0)], TOKENIZER, progress=True, **arguments)
    shown = capsys.readouterr().err
    assert "Tokenising" in shown and "100%" in shown


def make_plan(lengths: list[int], *, count: int, retrieval_share: float = 0.0, seed: int = 0) -> SamplePlan:
    return SamplePlan(lengths, count=count, context=256, head=1, block=32, retrieval_share=retrieval_share, seed=seed)


def test_plan_covers_every_document_once_a_pass_in_whole_blocks() -> None:
    lengths = [1000, 255, 254, 200, 100, 70, 63]
    plan = make_plan(lengths, count=40, seed=3)
    assert len(plan) == len(list(plan)) == 40 and plan.short == 5
    for sample in plan:
        assert sum(segment.length + 1 for segment in sample) == 256
        assert all((segment.length + 1) % 32 == 0 for segment in sample)
        for segment in sample:
            assert segment.start >= 0 and segment.start + segment.length <= lengths[segment.document]
    # A pass: 3 windows of the first document, 1 of the second, and the other five packed into 3 samples.
    first = Counter(segment.document for sample in plan[:7] for segment in sample)
    assert first[0] == 3 and first[1] == 1 and all(first[d] >= 1 for d in range(7))
    starts = {segment.start for sample in plan for segment in sample if segment.document == 0}
    assert len(starts) > 6, "every pass cuts elsewhere"


@pytest.mark.parametrize(
    ("lengths", "options", "digest"),
    [
        ((1000, 255, 254, 200, 100, 70, 63), {"count": 60, "seed": 3}, "2ba411fc6fe4ca85"),
        ((700, 400, 90), {"count": 50, "retrieval_share": 0.5, "seed": 5}, "b75f73eed649a1a8"),
        ((100, 64, 150), {"count": 40}, "7628e9ccf273f59d"),
        ((900,), {"count": 30, "retrieval_share": 1.0}, "0b38ebf2d22bfac1"),
    ],
)
def test_samples_are_those_of_runs_that_were_begun_earlier(
    lengths: tuple[int, ...], options: dict[str, Any], digest: str
) -> None:
    # Digests of the lists that versions before made of all samples at once.
    plan = make_samples(*lengths, **options).plan
    listed = repr([None if sample is None else [tuple(segment) for segment in sample] for sample in plan])
    assert hashlib.blake2b(listed.encode(), digest_size=8).hexdigest() == digest
    # Whatever was looked at before.
    again = make_samples(*lengths, **options).plan
    order = random.Random(0).sample(range(len(plan)), len(plan))
    assert {index: again[index] for index in order} == dict(enumerate(plan))


def test_plan_of_any_length_costs_what_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    draw = SamplePlan._draw
    monkeypatch.setattr(SamplePlan, "_draw", lambda self, number: passes.append(number) or draw(self, number))
    endless = make_plan([1000, 255, 100, 90, 70], count=10**15)
    short = make_plan([1000, 255, 100, 90, 70], count=50)
    assert len(endless) == 10**15 and endless.has_packed() and passes == [0]
    assert endless[:50] == list(short)
    # A pass is at least 5 samples, and each was drawn once.
    assert passes == list(range(max(passes) + 1)) + list(range(max(passes) + 1)) and max(passes) <= 10


@pytest.mark.parametrize("retrieval_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("lengths", [[1000, 600], [1000, 100, 90], [100, 64, 150]])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_plan_knows_whether_a_sample_is_packed(lengths: list[int], count: int, retrieval_share: float) -> None:
    for seed in range(5):
        plan = make_plan(lengths, count=count, retrieval_share=retrieval_share, seed=seed)
        counted = any(sample is not None and len(sample) > 1 for sample in plan)
        assert make_plan(lengths, count=count, retrieval_share=retrieval_share, seed=seed).has_packed() == counted


def test_samples_match_the_documents_and_their_positions() -> None:
    samples = make_samples(600, 100, 64, 150)
    for index in range(len(samples)):
        sample = samples[index]
        ids, positions = sample["input_ids"], sample["position_ids"]
        assert ids.shape == positions.shape == (256,) and ids.dtype == positions.dtype == torch.int64
        assert torch.equal(ids == BOS, positions == 0)
        offset = 0
        for segment in samples.plan[index]:
            begin = samples.corpus.offsets[segment.document] + segment.start
            expected = [BOS, *samples.corpus.tokens[begin : begin + segment.length].tolist()]
            assert ids[offset : offset + len(expected)].tolist() == expected
            assert positions[offset : offset + len(expected)].tolist() == list(range(len(expected)))
            offset += len(expected)
    assert any(len(segments) > 1 for segments in samples.plan) and any(len(s) == 1 for s in samples.plan)


def test_samples_are_a_function_of_seed_and_index() -> None:
    one, two = (make_samples(700, 400, 90, retrieval_share=0.5, seed=5, count=16) for _ in range(2))
    backwards = [two[index]["input_ids"] for index in reversed(range(16))][::-1]
    assert all(torch.equal(one[index]["input_ids"], backwards[index]) for index in range(16))
    other = make_samples(700, 400, 90, retrieval_share=0.5, seed=6, count=16)
    assert not all(torch.equal(one[index]["input_ids"], other[index]["input_ids"]) for index in range(16))
    recall = sum(segments is None for segments in one.plan)
    assert 3 <= recall <= 13
    drawn = [tuple(one[i]["input_ids"].tolist()) for i in range(16) if one.plan[i] is None]
    assert len(set(drawn)) == recall and all(len(ids) == 256 and ids[0] == BOS for ids in drawn)


def test_samples_reject_recall_documents_without_a_long_enough_text() -> None:
    with pytest.raises(ValueError, match="retrieval_share needs a document of at least 256 tokens"):
        make_samples(200, 100, retrieval_share=0.5)
    with pytest.raises(ValueError, match="length must be at least 256"):
        make_samples(700, retrieval_share=0.5, context=128)


def test_sample_is_cut_into_windows_of_one_length_that_hold_its_text_in_order() -> None:
    whole, cut = make_samples(5000, 100, count=40), make_samples(5000, 100, count=40, windows=(64, 128, 256))
    seen = Counter()
    for index in range(40):
        ids, places = cut[index]["input_ids"], cut[index]["position_ids"]
        text = whole.plan[index]
        if len(text) > 1:
            assert cut.plan[index] == text  # packed documents stay as they are
            continue
        length = 1 + int(places.max())
        assert places.tolist() == list(range(length)) * (256 // length)
        assert set(ids[::length].tolist()) == {BOS} and len(ids) == 256
        begin = cut.corpus.offsets[text[0].document] + text[0].start
        rest = ids.view(-1, length)[:, 1:].flatten()
        assert rest.tolist() == cut.corpus.tokens[begin : begin + len(rest)].tolist()
        seen[length] += 1
    assert set(seen) == {64, 128, 256} and min(seen.values()) > 4


@pytest.mark.parametrize("windows", [(96,), (256, 32), (512,), (64, 80)])
def test_windows_that_do_not_divide_a_sample_into_blocks_are_refused(windows: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="window_lengths must be multiples of the block size 32 that divide"):
        make_samples(600, windows=windows)


def test_documents_of_one_length_are_rows_of_their_own() -> None:
    samples = make_samples(5000, count=20, windows=(64, 256))
    cut = next(i for i, segments in enumerate(samples.plan) if len(segments) == 4)
    whole = next(i for i, segments in enumerate(samples.plan) if len(segments) == 1)
    rows = collate([samples[cut], samples[cut]])
    assert rows.keys() == {"input_ids", "position_ids"}
    assert rows["input_ids"].shape == (8, 64) and torch.equal(rows["position_ids"], torch.arange(64).expand(8, 64))
    assert torch.equal(rows["input_ids"].flatten(), samples[cut]["input_ids"].repeat(2))
    assert collate([samples[cut], samples[whole]])["segment_ids"].tolist() == [
        [number for number in range(4) for _ in range(64)],
        [0] * 256,
    ]


def test_collate_numbers_documents_only_where_rows_are_packed() -> None:
    samples = make_samples(600, 100, 64, 150)
    whole = [i for i, segments in enumerate(samples.plan) if len(segments) == 1][:2]
    packed = next(i for i, segments in enumerate(samples.plan) if len(segments) > 1)
    assert "segment_ids" not in collate([samples[i] for i in whole])
    batch = collate([samples[packed], samples[whole[0]]])
    expected = [number for number, s in enumerate(samples.plan[packed]) for _ in range(s.length + 1)]
    assert batch["segment_ids"].tolist() == [expected, [0] * 256]
