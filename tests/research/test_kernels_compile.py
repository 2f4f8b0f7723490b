"""Kernels compile for Hopper: the interpreter, in which the tests of the ops run, takes more than the compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "research" / "kernels" / "compiled.py"


@pytest.mark.parametrize(
    ("call", "kernels"),
    [
        ("attention", {"gluon_fwd._forward", "triton_kernel._forward", "_query_gradients", "_key_gradients"}),
        ("pages", {"triton_kernel._forward"}),
        ("decode", {"triton_split._decode", "triton_split._combine"}),
        (
            "choose",
            {"halve_kernel", "vectors_kernel", "score_and_choose_kernel", "expand_kernel", "triton_one._select"}
            | {"gate_query.triton_one._gate_query"},
        ),
        ("map", {"attention_map_fwd"}),
    ],
)
def test_kernels_compile_for_hopper(call: str, kernels: set[str], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, SCRIPT, "--only", call], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()[1:]]
    found = {name: [line for line in lines if line[-5].endswith(name)] for name in kernels}
    assert all(found.values()), done.stdout
    # Of a thread 255 registers at most, of a program what an H200 lets it have.
    assert all(16 <= int(line[-3]) <= 255 and int(line[-1]) <= 227 for line in lines)
    if call in ("attention", "decode"):
        assert all(line[-2] == "0" for line in lines), done.stdout
