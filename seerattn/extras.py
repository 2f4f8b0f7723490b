"""Packages that some commands and functions need beside those that are always there, and the extra that brings them."""

from __future__ import annotations

from importlib.util import find_spec

# As in pyproject.toml, by the names under which they are imported.
PACKAGES = {
    "train": ("datasets",),
    "eval": ("scipy",),
    "report": ("matplotlib", "jinja2"),
    "tasks": ("lm_eval",),
    "serve": ("fastapi", "uvicorn"),
}


def check_extra(extra: str, what: str) -> None:
    """Refuses what cannot be done for want of a package, before any of it is done.

    Args:
        extra: name of the extra that brings the packages.
        what: needs them, as the beginning of a sentence.

    Raises:
        ValueError: a package is not installed; says what to install.
    """
    missing = [package for package in PACKAGES[extra] if find_spec(package) is None]
    if missing:
        raise ValueError(f"{what} needs {' and '.join(missing)}, got none; pip install 'seerattn[{extra}]'")
