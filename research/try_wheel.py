"""Installs a built wheel where nothing else is, and runs the first example of the README there.

    make wheel                                                   # builds, then this; installing torch takes minutes
    python research/try_wheel.py outputs/dist/seerattn-0.2.0-py3-none-any.whl

The example runs in a folder of its own that sees the assets and the models of this one, with the model of
`make models`, as the README says for machines without a network. It must find its fact, and compute a fifth of the
blocks.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

ROOT = Path(__file__).parents[1]
MODEL = "outputs/models/smollm2"


def example() -> str:
    """The first block of Python of the README, with the model that needs no network."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1]
    told = re.search(r'^name = "([^"]+)"  # .*"(outputs/[^"]+)"$', code, re.MULTILINE)
    assert told[2] == MODEL
    return code.replace(f'"{told[1]}"', f'"{MODEL}"')


def check_files(wheel: Path) -> None:
    """Refuses a wheel that holds anything but the package and what pip must know of it.

    Raises:
        ValueError: names a file.
    """
    with ZipFile(wheel) as files:
        names = files.namelist()
    strange = [name for name in names if not re.match(r"seerattn(-[\w.]+\.dist-info)?/", name)]
    if strange:
        raise ValueError(f"a wheel must hold seerattn alone, got {strange[0]}; see tool.hatch in pyproject.toml")
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "seerattn").rglob("*") if path.is_file()}
    package = {name for name in package if "__pycache__" not in name}
    missing = package - set(names)
    if missing:
        raise ValueError(f"a wheel must hold the whole package, got none of {sorted(missing)[0]}; build it again")


def run(python: Path, folder: Path) -> str:
    """What the example prints in a folder beside links to the assets and models of this project."""
    for name in ("assets", "outputs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "example.py").write_text(example(), encoding="utf-8")
    command = [python, "-I", "example.py"]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def main(args: Sequence[str] | None = None) -> None:
    """Tries a wheel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="the wheel")
    parser.add_argument("--packages", type=Path, help="folder of installed packages to take all others from")
    options = parser.parse_args(args)
    if not (ROOT / MODEL).is_dir():
        parser.error(f"{MODEL} must be there, got none; make models")
    check_files(options.wheel)
    with TemporaryDirectory() as made:
        folder = Path(made)
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        dependencies = [] if options.packages is None else ["--no-deps"]
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *dependencies, options.wheel.resolve()], check=True, cwd=folder
        )
        if options.packages is not None:
            (site,) = (folder / "venv").glob("lib/python*/site-packages")
            (site / "others.pth").write_text(f"{options.packages.resolve()}\n", encoding="utf-8")
        (folder / "elsewhere").mkdir()
        printed = run(python, folder / "elsewhere")
    print(printed, end="")
    if "71432" not in printed or "density 0.2" not in printed:
        sys.exit("the example must print its fact and a density of a fifth")


if __name__ == "__main__":
    main()
