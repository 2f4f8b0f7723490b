import json
from dataclasses import replace

import pytest
import torch

from seerattn.eval.results import Result, ResultsFile, fingerprint, package_version, read_results

BLANK = Result(
    what="perplexity", value=None, n=0, unit="tokens", model="m", selector="gate", context=64, text="t", gates="g"
)


def test_a_written_result_reads_back_equal(tmp_path) -> None:
    path = tmp_path / "sub" / "r.jsonl"
    written = ResultsFile(path).append(replace(BLANK, value=1.5, n=3, samples={"losses": [0.1, 0.2]}), seconds=2.0)
    assert read_results([path]) == [written]
    assert written.seconds == 2.0 and written.timestamp and written.versions["torch"] == torch.__version__


def test_a_file_is_not_made_before_the_first_result(tmp_path) -> None:
    ResultsFile(tmp_path / "sub" / "r.jsonl")
    assert not list(tmp_path.iterdir())


def test_a_half_written_last_line_is_ignored_and_cut_off_when_writing_goes_on(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    file = ResultsFile(path)
    rows = [file.append(replace(BLANK, value=float(c), context=c)) for c in (1, 2, 3)]
    whole = path.read_bytes()
    for cut in (1, 10, len(whole) - whole[:-1].rfind(b"\n") - 1):
        path.write_bytes(whole[:-cut])
        assert read_results([path]) == rows[:2]
        resumed = ResultsFile(path)
        assert resumed.find(rows[2]) is None and resumed.find(rows[1]) == rows[1]
        again = resumed.append(replace(BLANK, value=3.0, context=3))
        assert read_results([path]) == [*rows[:2], again]
        assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_cell_is_found_by_what_was_asked_for_alone(tmp_path) -> None:
    file = ResultsFile(None)
    done = file.append(replace(BLANK, value=2.0, policy={"policy": "TopK", "density": 0.2}))
    asked = replace(BLANK, policy={"policy": "TopK", "density": 0.2})
    assert file.find(asked) == done
    others = [
        replace(asked, policy={"policy": "TopK", "density": 0.1}),
        replace(asked, weights={"gates": "new"}),
        replace(asked, cell={"data": "other"}),
        replace(asked, seed=1),
        replace(asked, text="u"),
        replace(asked, what="perplexity_difference"),
    ]
    assert [file.find(other) for other in others] == [None] * len(others)
    assert file.setdefault(replace(asked, value=9.0)) == done


def test_infinite_values_are_valid_json(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    ResultsFile(path).append(replace(BLANK, value=float("inf"), samples={"losses": [float("nan"), 1.0]}))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line["value"] is None and line["samples"]["losses"] == [None, 1.0]


@pytest.mark.parametrize("text", ["nonsense\n", "[]\n", '{"what": "x"}\n', '{"surprise": 1}\n'])
def test_reader_rejects_other_files(tmp_path, text: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="line 1"):
        read_results([path])


def test_output_rejects_a_path_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output"):
        ResultsFile(tmp_path / "file" / "r.jsonl")


def test_fingerprint_follows_the_weights(tmp_path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(3_000_000))
    before = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("changed")
    assert fingerprint(tmp_path) == before
    for place in (0, 2_999_999):
        changed = bytearray(3_000_000)
        changed[place] = 1
        weights.write_bytes(changed)
        assert fingerprint(tmp_path) != before
    assert fingerprint("org/name") == "org/name"


def test_a_draft_finds_what_is_there_and_is_adopted_whole(tmp_path) -> None:
    file = ResultsFile(tmp_path / "r.jsonl")
    done = file.append(replace(BLANK, value=1.0))
    draft = file.draft()
    new = draft.append(replace(BLANK, value=2.0, context=128), seconds=3.0)
    assert draft.find(done) == done and draft.find(new) == new and file.find(new) is None
    assert read_results([tmp_path / "r.jsonl"]) == [done]
    file.adopt(draft, "as near as it gets")
    assert [(r.value, r.seconds, r.cell) for r in read_results([tmp_path / "r.jsonl"])] == [
        (1.0, None, {}),
        (2.0, 3.0, {"note": "as near as it gets"}),
    ]
    # A note sets nothing apart.
    assert file.find(new).cell["note"] and file.find(new).value == 2.0


def test_each_file_has_the_command_of_its_own_time(tmp_path, monkeypatch) -> None:
    commands = []
    for word in ("first", "second"):
        monkeypatch.setattr("sys.argv", ["/usr/bin/seerattn", word, "a b"])
        commands.append(ResultsFile(None).append(BLANK).command)
    assert commands == ["seerattn first 'a b'", "seerattn second 'a b'"]


def test_a_package_that_runs_from_its_checkout_has_the_version_source() -> None:
    assert package_version("torch") == torch.__version__
    assert package_version("no-such-package") == "source"
