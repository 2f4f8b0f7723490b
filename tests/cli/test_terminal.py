"""Errors end as one sentence, and a terminal that is closed, full or gone harms nothing."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
import yaml
from safetensors import SafetensorError

from seerattn import cli
from seerattn.cli import main
from seerattn.cli.terminal import print_table, say
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result

ROW = Result(
    what="perplexity", value=2.0, n=9, unit="tokens", model="m", method="dense", kind="dense", name="dense", context=64,
    text="t",
    samples={"documents": [0], "losses": [1.0], "tokens": [9]},
)  # fmt: skip


def failing(monkeypatch, error: BaseException) -> None:
    """Makes a command raise."""

    def command() -> None:
        raise error

    module = type(sys)("seerattn.cli.failing")
    module.command = command
    monkeypatch.setitem(sys.modules, "seerattn.cli.failing", module)
    monkeypatch.setitem(cli.COMMANDS, "fail", cli._Command("seerattn.cli.failing", "command", "Fails."))


ENDS = [
    (ValueError("a\nb"), 2, "seerattn: a b"),
    (OSError(28, "No space left on device"), 2, "seerattn: [Errno 28] No space left on device"),
    (SafetensorError("header too large"), 2, "seerattn: header too large"),
    (yaml.YAMLError("bad"), 2, "seerattn: bad"),
    (MemoryError(), 2, "seerattn: memory must hold what is asked for"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "seerattn: CUDA out of memory"),
    (
        RuntimeError("CUDA error: no kernel\nCompile with"),
        2,
        "seerattn: the device could not do what was asked of it: ",
    ),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), 2, "seerattn: the device could not"),
    (BrokenPipeError(32, "Broken pipe"), 2, "seerattn: what read the output went away"),
    (KeyboardInterrupt(), 130, "seerattn: interrupted"),
    (ValueError("\x1b[2J\ud800"), 2, "seerattn: \\x1b[2J\\ud800"),
]


@pytest.mark.parametrize(("error", "code", "sentence"), ENDS, ids=lambda value: ascii(value)[:40])
def test_what_a_user_or_a_device_can_get_wrong_is_one_line(monkeypatch, capsys, error, code: int, sentence) -> None:
    failing(monkeypatch, error)
    with pytest.raises(SystemExit) as stop:
        main(["fail"])
    shown = capsys.readouterr().err
    assert (stop.value.code, shown.count("\n")) == (code, 1) and shown.startswith(sentence)


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), RuntimeError("x"), RecursionError("x")], ids=repr)
def test_mistakes_of_ours_show_where_they_are(monkeypatch, error: Exception) -> None:
    failing(monkeypatch, error)
    with pytest.raises(type(error)):
        main(["fail"])


def test_exit_codes_of_commands_stay_theirs(monkeypatch) -> None:
    failing(monkeypatch, typer.Exit(1))
    with pytest.raises(SystemExit) as stop:
        main(["fail"])
    assert stop.value.code == 1


def test_tables_and_sentences_show_names_as_they_are(capsys) -> None:
    names = ["[/]", "[red]x[/red]", ":smile:", "\x1b[31m", "a\nb", "\ud800"]
    print_table(["[/]", "n"], [[name, "1"] for name in names], texts=["[/]"], title="[/b]")
    say("[/] \x07")
    shown = capsys.readouterr()
    lines = [line.rsplit("1", 1)[0].strip() for line in shown.out.splitlines()[2:]]
    assert lines[0].split() == ["[/]", "n"]
    assert lines[1:] == ["[/]", "[red]x[/red]", ":smile:", "\\x1b[31m", "a\\nb", "\\ud800"]
    assert "[/b]" in shown.out and shown.err == "[/] \\x07\n"


def seerattn(*args: str, shell: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs the command with redirections of a shell."""
    command = f'exec "$@" {shell}'
    return subprocess.run(
        ["bash", "-c", command, "bash", sys.executable, "-m", "seerattn", *args],
        capture_output=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_streams_cost_nothing_but_what_is_shown(tmp_path: Path, closed: str) -> None:
    """A file that is opened next would take their numbers, and what is printed would go into it."""
    ResultsFile(tmp_path / "r.jsonl").append(ROW)
    before = (tmp_path / "r.jsonl").read_bytes()
    done = seerattn("report", str(tmp_path / "r.jsonl"), "--output", str(tmp_path / "out"), shell=closed)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"report.html", "table.md"} <= written and (tmp_path / "r.jsonl").read_bytes() == before
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")


def test_a_full_output_is_one_sentence() -> None:
    done = seerattn("--version", shell="> /dev/full")
    assert done.returncode == 2
    assert done.stderr.decode() == "seerattn: [Errno 28] No space left on device\n"


def test_a_reader_that_went_away_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "seerattn", "--version"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode != 0 and b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr


def test_an_ascii_terminal_is_enough(tmp_path: Path) -> None:
    ResultsFile(tmp_path / "r.jsonl").append(replace(ROW, model="\xb1"))
    folder = tmp_path / "\xfcber"
    done = seerattn(
        "report", str(tmp_path / "r.jsonl"), "--output", str(folder), shell="", PYTHONIOENCODING="ascii", LC_ALL="C"
    )
    assert done.returncode == 0, done.stderr
    assert b"table.md" in done.stdout and (folder / "table.md").exists()
