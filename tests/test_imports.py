"""The architecture as import rules, and the cost of `import seerattn`."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from seerattn.ops.resolve import IMPLS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "seerattn"
FILES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))

# What every room may import of the others. A room is a folder of the package or a module beside them.
GROUND = {"texts", "outputs", "saving", "locking", "options", "yaml_files", "extras"}
CORE = GROUND | {"selection", "gate", "ops", "gate_memory", "gate_selector", "gate_decode", "gate_files"}
LAW: dict[str, set[str]] = {
    "texts": set(),
    "saving": set(),
    "locking": set(),
    "extras": set(),
    "outputs": set(),
    "options": {"texts"},
    "yaml_files": {"texts", "extras"},
    "selection": GROUND,
    "gate": GROUND | {"selection"},
    "ops": GROUND | {"selection"},  # two modules of it, see below
    "gate_memory": GROUND | {"selection", "gate", "ops"},
    "gate_files": GROUND | {"selection", "gate"},
    "gate_selector": GROUND | {"selection", "gate", "ops", "gate_memory"},
    "gate_decode": GROUND | {"selection", "gate", "ops", "gate_memory", "gate_selector"},
    "data": GROUND,
    "results": GROUND | {"selection"},
    "hf": CORE | {"data", "results"},
    "training": CORE | {"data", "results", "hf"},
    "methods": CORE | {"data", "results", "hf"},
    "serve": CORE | {"hf"},
    "vllm": CORE,
    "bench": CORE | {"data", "results", "hf", "training", "serve"},
    "eval": CORE | {"data", "results", "hf", "methods"},
    "report": GROUND | {"selection", "results", "methods"},  # the registry of methods, see below
    "cli": CORE | {"data", "results", "hf", "training", "methods", "serve", "bench", "eval", "report"},
    # Roots: what is found by name from outside.
    "_peft_hook": {"hf"},
    "__main__": {"cli"},
}


def imported(path: Path) -> set[str]:
    """Absolute names of all modules and names that a file imports anywhere: in functions, and by strings."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} must import by absolute names"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= set(named(node.value))
        elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            # As in import_module(f"seerattn.methods.{name}"); what is left open counts as the folder.
            names |= set(named(str(node.values[0].value).rpartition(".")[0]))
    return names


def named(text: str) -> Iterator[str]:
    """The module of ours that a string names, with or without a name in it."""
    if re.fullmatch(r"seerattn(\.\w+)+(:\w+)?", text):
        text = text.partition(":")[0]
        for name in (text, text.rpartition(".")[0]):
            place = ROOT / name.replace(".", "/")
            if place != PACKAGE and (place.is_dir() or place.with_suffix(".py").is_file()):
                yield name
                return


def room(path: Path) -> str:
    return path.parts[1].removesuffix(".py")


def rooms_of(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("seerattn.")}


def importers(part: str) -> list[Path]:
    return [path for path in FILES if room(path) == part]


def starts(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def offences(paths: list[Path], forbidden: Callable[[str], bool]) -> list[str]:
    return [f"{path}: {name}" for path in paths for name in sorted(imported(path)) if forbidden(name)]


@pytest.mark.parametrize("part", sorted(LAW))
def test_a_room_imports_what_the_law_lets_it(part: str) -> None:
    allowed = [f"seerattn.{name}" for name in (part, *LAW[part])]
    assert not offences(importers(part), lambda name: starts(name, "seerattn") and not starts(name, *allowed))


def test_the_law_knows_every_room_and_has_no_circle() -> None:
    assert {room(path) for path in FILES} - {"__init__"} == set(LAW)
    list(TopologicalSorter(LAW).static_order())


def test_imports_that_are_made_by_strings_are_seen() -> None:
    assert set(named("seerattn.ops.resolve")) == set(named("seerattn.ops.resolve:IMPLS")) == {"seerattn.ops.resolve"}
    assert set(named("seerattn.ops.resolve.IMPLS")) == {"seerattn.ops.resolve"}
    assert not set(named("seerattn")) | set(named("see seerattn.ops.resolve")) | set(named("seerattn.mplstyle"))
    assert "hf" in rooms_of(imported(Path("seerattn/__init__.py")))  # a table of names
    assert "seerattn.cli.bench" in imported(Path("seerattn/cli/__init__.py"))  # commands, imported when called


def test_ops_import_of_selection_only_its_contracts() -> None:
    contracts = ("block_indices", "decode_blocks", "map_form")
    allowed = [f"seerattn.selection.{name}" for name in contracts]
    assert not offences(
        importers("ops"), lambda name: starts(name, "seerattn.selection") and not starts(name, *allowed)
    )


def test_report_imports_of_methods_only_their_registry() -> None:
    assert not offences(importers("report"), lambda name: re.match(r"seerattn\.methods\.[a-z_]+\.", name) is not None)


def test_implementations_of_an_op_do_not_import_each_other() -> None:
    modules = {name.replace(".", "/") + ".py" for names in IMPLS.values() for name in names.values()}
    implementations = [p for p in FILES if str(p) in modules]
    assert len(implementations) == len(modules)
    for path in implementations:
        siblings = {p.stem for p in implementations if p.parent == path.parent} - {path.stem}
        folder = ".".join(path.parent.parts)
        assert not offences([path], lambda n, f=folder, s=siblings: starts(n, *(f"{f}.{x}" for x in s)))


def test_only_integration_layers_import_transformers_or_peft() -> None:
    core = [p for p in FILES if room(p) in ("gate", "gate_files", "selection", "ops", "results", "report", "vllm")]
    assert not offences(core, lambda n: starts(n, "transformers", "peft"))


def test_only_the_plug_in_imports_vllm() -> None:
    assert not offences([p for p in FILES if room(p) != "vllm"], lambda n: starts(n, "vllm"))
    # All but the two backends can be imported where vLLM is not installed, or is not ready yet.
    for path in importers("vllm"):
        top = [node for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.ImportFrom)]
        assert path.name in ("cpu.py", "cuda.py") or not [node for node in top if starts(node.module, "vllm")]


def test_only_report_imports_matplotlib() -> None:
    others = [p for p in FILES if p.parts[1] != "report"]
    assert not offences(others, lambda n: starts(n, "matplotlib"))


def test_import_works_without_optional_packages_and_reads_almost_nothing_beside_torch() -> None:
    code = """
import sys
for name in ("triton", "matplotlib", "datasets"):
    sys.modules[name] = None
import torch
before = set(sys.modules)
import seerattn
assert not torch.cuda.is_initialized()
print(*sorted(set(sys.modules) - before - sys.stdlib_module_names))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    # What a user waits for is the number of modules; a clock would tell how busy the machine is.
    assert out.stdout.split() == ["seerattn", "seerattn._peft_hook"]
