"""Every command that the README and the pages show is one that can be typed."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from docs_scripts import docs_script
from typer.core import TyperCommand, TyperGroup, TyperOption

ROOT = Path(__file__).parents[2]
# The log tells of commands as they were.
PAGES = [ROOT / "README.md", *sorted(path for path in ROOT.glob("docs/**/*.md") if path.name != "LOG.md")]
_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
# Up to where a shell would begin another command or a comment.
_COMMAND = re.compile(r"(?:^|[\s;|&])seerattn((?: (?![;|&#])[^\n;|&#]*)?)", re.MULTILINE)
_SCRIPT = re.compile(r"python ((?:examples|research|docs)/\S+\.py)([^\n;|&#]*)")


@cache
def commands() -> dict[str, TyperCommand | TyperGroup]:
    """Every top command by its name, with all that is below it."""
    return docs_script("cli_reference").commands()


def shown(text: str) -> list[str]:
    """Lines of shell in the fenced blocks of a page, continued lines joined."""
    blocks = [body for _, language, body in _FENCE.findall(text) if language not in ("python", "json", "yaml", "text")]
    return [line for body in blocks for line in re.sub(r"\\\n\s*", "", body).splitlines()]


def fault(words: list[str], *, whole: bool) -> str | None:
    """What is wrong with the words after `seerattn`; None if nothing is.

    With ``whole`` every option that the command needs must be there, unless an ellipsis or a file stands for it.
    """
    if not words or words[0].startswith(("-", "[", "COMMAND", ".")):
        return None
    if words[0] not in commands():
        return f"no command {words[0]}"
    found, rest = commands()[words[0]], words[1:]
    while isinstance(found, TyperGroup) and rest and not rest[0].startswith(("-", "[", "COMMAND", ".")):
        if rest[0] not in found.commands:
            return f"no command {words[0]} {rest[0]}"
        found, rest = found.commands[rest[0]], rest[1:]
    parameters = [p for p in found.params if isinstance(p, TyperOption)]
    known = {name for p in parameters for name in (*p.opts, *p.secondary_opts)} | {"--help"}
    given = {word.partition("=")[0] for word in rest if re.match(r"--\w", word)}
    if given - known:
        return f"no option {sorted(given - known)}"
    open_ended = given & {"--help", "--config"} or any(re.search(r"\.\.\.|\$|\[OPTIONS\]", word) for word in rest)
    # An option that a file may give instead is known by its help.
    needed = [p for p in parameters if p.required or (p.help or "").endswith("Must be given.")]
    missing = [p.opts[0] for p in needed if not given & set(p.opts)]
    if whole and missing and not open_ended and not isinstance(found, TyperGroup):
        return f"needs {missing}"
    return None


def faults(text: str) -> list[str]:
    """What is wrong with the commands of a page."""
    lines = [(line, True) for line in shown(text)]
    lines += [(span, False) for span in re.findall(r"`([^`\n]*)`", _FENCE.sub("", text))]
    found = []
    for line, whole in lines:
        for match in _COMMAND.finditer(line):
            why = fault(shlex.split(match[1], posix=False), whole=whole)
            if why is not None:
                found.append(f"seerattn{match[1]}: {why}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_of_a_page_exists_with_every_option_that_it_names(page: Path) -> None:
    assert not faults(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script_of_a_page_exists_with_every_option_that_it_names(page: Path) -> None:
    for line in shown(page.read_text(encoding="utf-8")):
        for path, options in _SCRIPT.findall(line):
            source = (ROOT / path).read_text(encoding="utf-8")
            for option in re.findall(r"--[\w-]+", options):
                name = option[2:].replace("-", "_")
                assert f'"{option}"' in source or re.search(rf"^    {name}: ", source, re.MULTILINE), (path, option)


def test_wrong_commands_are_seen() -> None:
    page = "```\nseerattn distill --model M --data d --context 1 \\\n    --steps 1 --output o {}\n```\n"
    assert not faults(page.format(""))
    assert "no option" in faults(page.format("--budget"))[0]
    assert "no command" in faults("```\ntorchrun -m seerattn distil --model M\n```")[0]
    assert "no command" in faults("```\nseerattn bench attentions --output o\n```")[0]
    assert "needs ['--data'" in faults("```\nseerattn distill --model M --context 1 --steps 1 --output o\n```")[0]
    assert "no option" in faults("`seerattn bench ttft --bugets`")[0]
    assert not faults("`seerattn bench ttft --gates`") and not faults("```\nseerattn distill ... # --nonsense\n```")
