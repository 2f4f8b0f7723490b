"""Damage: arguments, values of JSON and YAML, bytes, and tensors, changed as mistakes and accidents change them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

WORDS = [
    "", " ", "-1", "0", "1", "7", "1.5", "1e999", "nan", "-inf", "9" * 25, "9" * 5000, "x", "[/]", "[red]", "\ud800",
    "\x1b[2J", "\u00e9\u202e", "a,b", ",", "0.5,0.5", "0:0", "1:2:3", "64x", "0x10", "\uff11", "true", "None", "--",
    "a=b=c", "../x", "/dev/null", "/", ".", "~", "/none/x", "notes.txt", "settings.json", "r.jsonl", "model", "gates",
    "gate,gates=gates", "name=x", "tasks=passkey,n=1",
    "plan.json", "docs.jsonl", "maps.npz", "experiment.yaml", "cpu", "cuda", "cuda:99", "meta", "mps", "hpu", "cpu:7",
    "float16", "dense", "gate", "oracle", "triton", "flash4", "new/deep/out", "x" * 300,
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 64, 1.5, -0.0, 1e308, 10**30, 10**400, "", "x", "nan", "[/]", "\x1b[2J", "a|b",
    "$x$", "<script>", "\n", "\ud800", [], [[]], [None], ["x"], {}, {"a": 1}, {"x": {"y": []}}, [1, 2], [0.5],
    "density", "time", "passkey", "gate", "dense", float("nan"), float("inf"),
]  # fmt: skip


def mutated_arguments(arguments: list[str], rng: random.Random) -> list[str]:
    """Arguments with one of them changed, dropped, doubled or added."""
    found, place = list(arguments), rng.randrange(len(arguments))
    values = [i for i in range(1, len(found)) if found[i - 1].startswith("--") and not found[i].startswith("--")]
    kind = rng.choice(["value"] * 6 + ["drop", "double", "unknown", "any"])
    if kind == "value" and values:
        found[rng.choice(values)] = rng.choice(WORDS)
    elif kind == "drop":
        del found[place]
    elif kind == "double":
        found += found[place : place + 2]
    elif kind == "unknown":
        found.append(rng.choice(["--nosuch", "--dry-run", "--help", *WORDS]))
    else:
        found[place] = rng.choice(WORDS)
    return found


def mutated_value(value: Any, rng: random.Random) -> Any:
    """A value with one place in it changed, dropped or added."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(list(value))
        if rng.random() < 0.15:
            return {key: inner for key, inner in value.items() if key != name}
        if rng.random() < 0.1:
            return value | {rng.choice(["x", "", "[/]", "\ud800"]): rng.choice(VALUES)}
        return value | {name: mutated_value(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value[:place] + value[place + 1 :]
        return value[:place] + [mutated_value(value[place], rng)] + value[place + 1 :]
    return rng.choice(VALUES)


def mutate_json(path: Path, rng: random.Random) -> None:
    path.write_text(json.dumps(mutated_value(json.loads(path.read_text()), rng)))


def mutate_lines(path: Path, rng: random.Random) -> None:
    """Changes one line of JSON, or several alike."""
    lines = path.read_text().splitlines()
    for _ in range(rng.choice([1, 1, 3])):
        place = rng.randrange(len(lines))
        lines[place] = json.dumps(mutated_value(json.loads(lines[place]), rng))
    path.write_text("\n".join(lines) + rng.choice(["\n", "\n", "", "\n\n"]))


def mutate_yaml(path: Path, rng: random.Random) -> None:
    value = mutated_value(yaml.safe_load(path.read_text()), rng)
    try:
        path.write_text(yaml.safe_dump(value))
    except (yaml.YAMLError, UnicodeEncodeError):
        path.write_text(json.dumps(value))
    if rng.random() < 0.1:
        path.write_text(
            path.read_text() + rng.choice(["a: !!bool x\n", "- &a [*a]\n", "2020-13-45: 1\n", "!!timestamp x"])
        )


def mutate_bytes(path: Path, rng: random.Random) -> None:
    """Cuts, flips, nests, replaces: what disks, editors and wrong downloads do."""
    content = path.read_bytes()
    place = rng.randrange(len(content) + 1)
    found = {
        "cut": content[:place],
        "flipped": content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :],
        "not text": content[:place] + b"\xff\xfe" + content[place:],
        "mark": b"\xef\xbb\xbf" + content,
        "empty": b"",
        "zeros": content[:place] + bytes(len(content) - place),
        "nested": rng.choice([b"[", b'{"a":']) * 100_000,
        "a page": b"<!DOCTYPE html><title>404</title>\n",
        "doubled": content + content,
        "a line more": content + b"mine\n",
        "a word more": content + b"mine",
    }
    path.write_bytes(found[rng.choice(list(found))])


def mutate_place(path: Path, rng: random.Random) -> None:
    """Puts something else in the place of a file."""
    path.unlink()
    kind = rng.choice(["nothing", "folder", "loop", "dangling"])
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(path.parent / "none")


def mutate_tensors(path: Path, rng: random.Random) -> None:
    """Changes one tensor of a safetensors file, or adds a foreign one."""
    tensors = load_file(path)
    name = rng.choice(list(tensors))
    x = tensors[name]
    kind = rng.choice(["renamed", "dropped", "shape", "kind", "nan", "inf", "huge", "foreign", "empty", "all renamed"])
    if kind == "renamed":
        tensors[name + rng.choice([".x", "_", "/../x"])] = tensors.pop(name)
    elif kind == "dropped":
        del tensors[name]
    elif kind == "shape":
        tensors[name] = rng.choice([x.flatten(), x[..., :-1].clone(), x[None], torch.zeros(0), torch.zeros(())])
    elif kind == "kind":
        tensors[name] = x.to(rng.choice([torch.float16, torch.int64, torch.bool, torch.float64, torch.complex64]))
    elif kind in ("nan", "inf", "huge"):
        x.view(-1)[rng.randrange(x.numel())] = {"nan": torch.nan, "inf": torch.inf, "huge": 1e38}[kind]
    elif kind == "foreign":
        layer = rng.choice(["mlp.down_proj", "self_attn.q_proj", "self_attn.o_proj", "input_layernorm"])
        tensors[f"base_model.model.model.layers.0.{layer}.weight"] = torch.zeros(64, 64)
    elif kind == "empty":
        tensors = {}
    else:
        tensors = {f"x.{key}": value for key, value in tensors.items()}
    save_file(tensors, path)


def mutate_arrays(path: Path, rng: random.Random) -> None:
    with np.load(path) as file:
        arrays = dict(file)
    name = rng.choice(list(arrays))
    change: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda x: x[..., :1], lambda x: x.astype(object).astype(str), lambda x: np.asarray(np.nan), lambda x: x[None],
        lambda x: np.zeros_like(x), lambda x: x.astype(np.int64, casting="unsafe") if x.dtype.kind != "U" else x,
        lambda x: np.asarray("[/]\x1b|$"),
    ]  # fmt: skip
    if rng.random() < 0.2:
        del arrays[name]
    else:
        arrays[name] = rng.choice(change)(arrays[name])
    np.savez(path, **arrays)


BY_SUFFIX: dict[str, Callable[[Path, random.Random], None]] = {
    ".json": mutate_json,
    ".jsonl": mutate_lines,
    ".yaml": mutate_yaml,
    ".safetensors": mutate_tensors,
    ".npz": mutate_arrays,
}


def mutate_file(path: Path, rng: random.Random) -> str:
    """Damages a file in one way or another, and says how."""
    kinds = [BY_SUFFIX.get(path.suffix, mutate_bytes)] * 7 + [mutate_bytes] * 2 + [mutate_place]
    mutate = rng.choice(kinds)
    try:
        mutate(path, rng)
    # The second damage of a file finds nothing to read.
    except Exception:
        mutate = mutate_bytes
        mutate(path, rng)
    return f"{mutate.__name__} {path.name}"


def copy_folder(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target, symlinks=True))
