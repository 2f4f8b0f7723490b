"""YAML files of options by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seerattn.texts import short


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, names with underscores.

    Raises:
        ValueError: the file is none, or holds something else.
    """
    import yaml

    if not path.is_file():
        raise ValueError(f"config must be a YAML file, got {path}, which is none")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    # PyYAML raises the last ones of values that do not fit their tags, and of dates that there are not.
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"config must be YAML, got {path}: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"config must be a mapping of options by name, got {short(values)} in {path}")
    return {name.replace("-", "_"): value for name, value in values.items()}
