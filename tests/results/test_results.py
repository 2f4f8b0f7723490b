"""Files of results: whole groups, one writer, and nothing that is none of theirs."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seerattn.results.environment import fingerprint, package_version
from seerattn.results.file import ResultsFile, read_results
from seerattn.results.record import Result
from seerattn.texts import OPENERS

BLANK = Result(
    what="perplexity",
    value=None,
    n=0,
    unit="tokens",
    model="m",
    method="gate",
    kind="learned",
    name="g",
    context=64,
    text="t",
)


def test_a_written_result_reads_back_equal(tmp_path) -> None:
    path = tmp_path / "sub" / "r.jsonl"
    written = ResultsFile(path).append(replace(BLANK, value=1.5, n=3, samples={"losses": [0.1, 0.2]}), seconds=2.0)
    assert read_results([path]) == [written]
    assert written.seconds == 2.0 and written.timestamp and written.versions["torch"] == torch.__version__


@pytest.mark.parametrize("suffix", list(OPENERS))
def test_a_compressed_file_is_read_and_never_written(tmp_path, suffix: str) -> None:
    plain, packed = tmp_path / "r.jsonl", tmp_path / f"r.jsonl{suffix}"
    rows = [ResultsFile(plain).append(replace(BLANK, value=float(c), context=c)) for c in (1, 2, 3)]
    with OPENERS[suffix](packed, "wb") as file:
        file.write(plain.read_bytes())
    assert read_results([packed]) == rows
    content = packed.read_bytes()
    with pytest.raises(ValueError):
        ResultsFile(packed)
    assert packed.read_bytes() == content
    for damaged in (content[: len(content) // 2], b"no archive"):
        packed.write_bytes(damaged)
        with pytest.raises(ValueError):
            read_results([packed])


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
    done = file.append(replace(BLANK, value=2.0, settings={"policy": "TopK", "density": 0.2}))
    asked = replace(BLANK, settings={"policy": "TopK", "density": 0.2})
    assert file.find(asked) == done
    others = [
        replace(asked, settings={"policy": "TopK", "density": 0.1}),
        replace(asked, weights={"gates": "new"}),
        replace(asked, method="oracle"),
        replace(asked, kind="oracle"),
        replace(asked, name="h"),
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


def resumed(path) -> list[float]:
    """Values that a file opened again finds, by reading what it holds after one more result."""
    ResultsFile(path).append(replace(BLANK, value=9.0, context=0))
    return [r.value for r in read_results([path])][:-1]


def test_results_that_were_written_together_are_all_there_or_none_whatever_byte_a_kill_stops_at(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    file = ResultsFile(path)
    file.append(replace(BLANK, value=1.0, context=1))
    alone = len(path.read_bytes())
    with file.together() as cell:
        for c in (2, 3, 4):
            cell.append(replace(BLANK, value=float(c), context=c))
    whole = path.read_bytes()
    assert [r.part for r in read_results([path])] == [None, [1, 3], [2, 3], [3, 3]]
    del file
    for size in range(alone, len(whole) + 1):
        path.write_bytes(whole[:size])
        expected = [1.0, 2.0, 3.0, 4.0] if size == len(whole) else [1.0]
        assert [r.value for r in read_results([path])] == expected
        assert resumed(path) == expected


def test_nothing_is_written_of_results_whose_measurement_raises(tmp_path) -> None:
    file = ResultsFile(tmp_path / "r.jsonl")
    with pytest.raises(KeyboardInterrupt), file.together() as cell:
        cell.append(BLANK)
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir()) and file.find(BLANK) is None


def test_lines_that_somebody_picked_from_groups_stand_for_themselves(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    with ResultsFile(path).together() as cell:
        for c in (1, 2, 3):
            cell.append(replace(BLANK, value=float(c), context=c))
    lines = path.read_text().splitlines(True)
    path.write_text(lines[1])
    assert resumed(path) == [2.0]


OTHERS = {
    "settings": b'{"lr": 1}',
    "notes": b"my notes",
    "text with a line end": b"my notes\n",
    "results and a note": b"@# mine",
    "results and another object": b'@{"what": "x", "mine": 1',
    "a whole object that begins alike": b'{"what": "x", "value": 1, "mine": 2}',
    "one letter": b"x",
    "empty line": b"@\n",
    "zeros": b"@\0\0",
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_that_holds_anything_else_is_refused_and_stays_as_it_is(tmp_path, name: str) -> None:
    path = tmp_path / "r.jsonl"
    ResultsFile(path).append(replace(BLANK, value=1.0))
    content = OTHERS[name].replace(b"@", path.read_bytes())
    path.write_bytes(content)
    with pytest.raises(ValueError, match="output"):
        ResultsFile(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["folder", "device", "loop"])
def test_output_rejects_what_is_no_file(tmp_path, name: str) -> None:
    path = {"folder": tmp_path, "device": Path("/dev/null"), "loop": tmp_path / "loop"}[name]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ValueError, match="output"):
        ResultsFile(path)


@pytest.mark.parametrize("count", [1, 3])
def test_a_full_disk_is_said_and_leaves_whole_results_at_every_byte(tmp_path, monkeypatch, count: int) -> None:
    path, write = tmp_path / "r.jsonl", os.write
    ResultsFile(path).append(replace(BLANK, value=1.0))
    before = path.read_bytes()
    size = len(before) * count
    for room in (0, 1, size // 2, size - 1):
        left = [room]

        def short(descriptor: int, data: bytes, left: list[int] = left) -> int:
            """As the system does: what fits is written, then nothing."""
            fits = min(left[0], len(data))
            if not fits:
                raise OSError(errno.ENOSPC, "No space left on device")
            left[0] -= fits
            return write(descriptor, data[:fits])

        file = ResultsFile(path)
        monkeypatch.setattr(os, "write", short)
        full = pytest.raises(OSError, match="No space left on device")
        with full, file.together() as cell:
            for c in range(count):
                cell.append(replace(BLANK, value=2.0, context=100 + c))
        monkeypatch.setattr(os, "write", write)
        assert path.read_bytes() == before
        # With room again, the same file goes on.
        file.append(replace(BLANK, value=3.0, context=9))
        assert [r.value for r in read_results([path])] == [1.0, 3.0]
        path.write_bytes(before)


def test_a_second_process_is_refused_until_the_first_one_is_gone_however_it_went(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    ResultsFile(path).append(replace(BLANK, value=1.0))
    code = f"""
import sys, pathlib
from seerattn.results.file import ResultsFile
file = ResultsFile(pathlib.Path({str(path)!r}))
print("ready", flush=True)
sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"ready\n"
        before = path.read_bytes()
        with pytest.raises(OSError, match="output"):
            ResultsFile(path)
        assert path.read_bytes() == before
    finally:
        other.kill()
        other.communicate()
    ResultsFile(path).append(replace(BLANK, value=2.0, context=2))
    assert [r.value for r in read_results([path])] == [1.0, 2.0]


@pytest.mark.parametrize("what", ["grown", "replaced", "removed", "made"])
def test_a_file_that_was_changed_meanwhile_is_left_as_it_is(tmp_path, what: str) -> None:
    path = tmp_path / "r.jsonl"
    file = ResultsFile(path)
    if what != "made":
        file.append(replace(BLANK, value=1.0))
    if what in ("replaced", "removed"):
        path.unlink()
    if what != "removed":
        with path.open("a") as other:
            other.write("foreign\n")
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(OSError, match="output"):
        file.append(replace(BLANK, value=2.0, context=2))
    assert (path.read_bytes() if path.exists() else None) == before


WRONG = {
    "value": "x", "n": 1.5, "unit": 1, "model": None, "method": [], "kind": "magic", "name": 1, "context": True,
    "text": {}, "stderr": "x", "weights": {"model": 1}, "settings": [], "density": "a", "realised_density": [],
    "seed": "s", "cell": 1, "samples": {"losses": 1}, "versions": {"torch": 2}, "device": 1, "git": 1, "command": [],
    "seconds": "1", "timestamp": 1, "part": [2, 1],
}  # fmt: skip
WRONG_SETTINGS = {"last_rows_dense": "two", "setting": "half", "target": 2, "budgets": 1}
WRONG_CELLS = {"task": 1, "depth": "x", "block_k": "64", "budget": "money", "note": [], "training": 1, "layers": 1.5}


@pytest.mark.parametrize(
    "name",
    [
        *WRONG,
        *(f"cell.{of}" for of in WRONG_CELLS),
        *(f"settings.{of}" for of in WRONG_SETTINGS),
        "huge",
        "nan",
        "deep",
    ],
)
def test_reader_rejects_a_field_of_a_wrong_kind_and_names_the_line(tmp_path, name: str) -> None:
    path = tmp_path / "r.jsonl"
    ResultsFile(path).append(replace(BLANK, value=1.0))
    values = json.loads(path.read_text())
    if name in WRONG:
        values[name] = WRONG[name]
    elif name.startswith("cell."):
        values["cell"] = {name[5:]: WRONG_CELLS[name[5:]]}
    elif name.startswith("settings."):
        values["settings"] = {name[9:]: WRONG_SETTINGS[name[9:]]}
    line = json.dumps(values)
    if name == "huge":
        line = line.replace('"value": 1.0', f'"value": 1{"0" * 400}')
    elif name == "nan":
        line = line.replace('"value": 1.0', '"value": NaN')
    elif name == "deep":
        line = line.replace('"cell": {}', '"cell": ' + "[" * 100_000 + "]" * 100_000)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match="line 2 is none") as error:
        read_results([path])
    assert len(str(error.value)) < 500 + len(str(path))
