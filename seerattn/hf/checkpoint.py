"""Whether a folder holds whole gates, checked before anything is built from it."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_gate_folder(folder: Path) -> dict:
    """Checks the files of a gate folder and returns its config.

    Raises:
        ValueError: a file is missing, unreadable, truncated or a pickle, or the adapter is of another kind.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"gates must be a folder with {CONFIG}, got {folder}, which has none") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / CONFIG} must be JSON, got {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "SEER":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{folder / CONFIG} must describe gates (peft_type 'SEER'), got {kind!r}")
    if not (folder / WEIGHTS).is_file():
        pickles = sorted(p.name for p in folder.glob("adapter_model.*"))
        raise ValueError(f"{folder} must hold {WEIGHTS}, got {pickles or 'no weights'}; pickled gates are not read")
    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} must be a whole safetensors file, got a broken one: {error}") from None
    if not any("seer_gate" in name for name in names):
        raise ValueError(f"{folder / WEIGHTS} must hold gates, got tensors {names[:3]}")
    return config
