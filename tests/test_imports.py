"""The architecture as import rules, and the cost of `import seerattn`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from seerattn.ops.resolve import IMPLS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "seerattn"
FILES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Absolute names of all modules and names that a file imports anywhere, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} must import by absolute names"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def importers(part: str) -> list[Path]:
    return [path for path in FILES if path.parts[1] == part]


def starts(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def offences(paths: list[Path], forbidden) -> list[str]:
    return [f"{path}: {name}" for path in paths for name in sorted(imported(path)) if forbidden(name)]


def test_ops_import_of_ours_only_their_two_contracts_and_ops() -> None:
    allowed = ("seerattn.selection.block_indices", "seerattn.selection.map_form", "seerattn.ops")
    assert not offences(importers("ops"), lambda n: starts(n, "seerattn") and not starts(n, *allowed))


@pytest.mark.parametrize("part", ["gate", "selection"])
def test_gate_and_selection_import_no_kernel(part: str) -> None:
    allowed = ("seerattn.gate", "seerattn.selection")
    assert not offences(importers(part), lambda n: starts(n, "seerattn") and not starts(n, *allowed))


def test_implementations_of_an_op_do_not_import_each_other() -> None:
    modules = {name.replace(".", "/") + ".py" for names in IMPLS.values() for name in names.values()}
    implementations = [p for p in FILES if str(p) in modules]
    assert len(implementations) == len(modules)
    for path in implementations:
        siblings = {p.stem for p in implementations if p.parent == path.parent} - {path.stem}
        folder = ".".join(path.parent.parts)
        assert not offences([path], lambda n, f=folder, s=siblings: starts(n, *(f"{f}.{x}" for x in s)))


def test_only_integration_layers_import_transformers_or_peft() -> None:
    core = [p for p in FILES if p.parts[1] in ("gate", "selection", "ops", "results", "report")]
    assert not offences(core, lambda n: starts(n, "transformers", "peft"))


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
