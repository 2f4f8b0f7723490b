"""Recipes: what a comparison runs, read from YAML and checked before any model is loaded.

Paths in a recipe are relative to its folder. `read_recipe` checks what the file says by itself, and `check_files` that
gates and plans are there, whole, and of the model that they are to be used with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import seerattn
from seerattn.eval.families import GATE_POLICIES, SELECTORS, SOURCES, check_options, default_name, make_family
from seerattn.eval.needle import TASKS as RETRIEVAL
from seerattn.eval.needle import Needle
from seerattn.texts import fits, short

TASKS = ("perplexity", "recall", *RETRIEVAL)
BOOKS = Path(seerattn.__file__).parent.parent / "assets" / "books"


@dataclass(frozen=True)
class ModelEntry:
    """A model of a recipe.

    Attributes:
        name: what results call it.
        source: a folder or the name of a model on the Hub.
    """

    name: str
    source: str


@dataclass(frozen=True)
class SelectorEntry:
    """A way of choosing blocks that a recipe compares.

    Attributes:
        selector: "dense", "gate" or another name of `families.SELECTORS`.
        name: what results call it.
        options: of its family.
        gates: folder of gates by name of the model; under "" for any.
        plan: file of a plan, likewise.
    """

    selector: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    gates: dict[str, Path] = field(default_factory=dict)
    plan: dict[str, Path] = field(default_factory=dict)

    def file(self, kind: str, model: str) -> Path | None:
        """The "gates" or "plan" that belong to a model, if it needs any.

        Raises:
            ValueError: the recipe names those of other models only.
        """
        files = getattr(self, kind)
        if files and model not in files and "" not in files:
            raise ValueError(f"{kind} of {self.name} must be given for {model}, got those of {', '.join(files)} alone")
        return files.get(model, files.get(""))


@dataclass(frozen=True)
class TaskEntry:
    """A measurement of a recipe.

    Attributes:
        task: "perplexity", "recall" or a retrieval task.
        text: what results call the text.
        data: files, folders or datasets: the text, or the haystack of a retrieval task.
        contexts: context lengths in tokens.
        max_docs: the first so many documents of the data; 0 for all.
        windows: windows of each document, from its start; 0 for all.
        n: documents of a retrieval task, at each depth.
        depths: shares of the text before a pass key.
        seed: draws facts, places and text.
        options: further ones of `Needle`.
    """

    task: str
    text: str
    data: tuple[str, ...]
    contexts: tuple[int, ...]
    max_docs: int = 0
    windows: int = 1
    n: int = 20
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    seed: int = 0
    options: dict[str, int] = field(default_factory=dict)

    def needles(self, context: int, limit: int = 0) -> list[Needle]:
        """The cells of a retrieval task at a context, with at most ``limit`` documents each if that is not 0."""
        n, options = self.n, dict(self.options)
        if self.task == "passkey":
            return [
                Needle("passkey", context, depth, min(n, limit or n), self.seed, **options) for depth in self.depths
            ]
        n *= len(self.depths)
        return [Needle(self.task, context, None, min(n, limit or n), self.seed, **options)]


@dataclass(frozen=True)
class Recipe:
    """What a comparison runs.

    Attributes:
        models: models, one after the other.
        selectors: ways of choosing blocks.
        tasks: measurements.
        densities: densities that knobs are tuned to.
        times: shares of the dense attention's time that knobs are tuned to.
        last_rows_dense: numbers of query-block rows at the end that keep every block, on top of the density.
        calibration: text that thresholds by head are calibrated on.
        batch: sequences that run together.
        tuning_windows: sequences that a knob is tuned on.
    """

    models: tuple[ModelEntry, ...]
    selectors: tuple[SelectorEntry, ...]
    tasks: tuple[TaskEntry, ...]
    densities: tuple[float, ...] = ()
    times: tuple[float, ...] = ()
    last_rows_dense: tuple[int, ...] = (0,)
    calibration: tuple[str, ...] = ()
    batch: int = 1
    tuning_windows: int = 4


def read_recipe(
    path: Path, *, only_selectors: Sequence[str] = (), only_tasks: Sequence[str] = (), batch: int | None = None
) -> Recipe:
    """Reads a recipe and checks all that it says.

    Args:
        path: a YAML file.
        only_selectors: names of the selectors to keep; all if there is none. Dense stays, as the baseline.
        only_tasks: tasks to keep; all if there is none.
        batch: in place of that of the recipe.

    Raises:
        ValueError: the file is no recipe, or asks for what does not exist.
    """
    import yaml

    if not path.is_file():
        raise ValueError(f"recipe must be a YAML file, got {path}, which is none")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    # PyYAML raises the last ones of values that do not fit their tags, and of dates that there are not.
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"recipe must be YAML, got {path}: {error}") from error
    reader = _Reader(path.parent)
    keys = ("models", "selectors", "tasks", "densities", "budgets", "contexts", "last_rows_dense", "calibration")
    values = _mapping(values, "the recipe", (*keys, "batch", "tuning_windows"), ("models", "selectors", "tasks"))
    budgets = _mapping(values.get("budgets", {}), "budgets", ("time",))
    contexts = _numbers(values.get("contexts", 4096), "contexts", int, 2)
    models = _distinct([reader.model(entry) for entry in _list(values["models"])], "models")
    selectors = _distinct([reader.selector(entry) for entry in _list(values["selectors"])], "selectors")
    tasks = [reader.task(entry, contexts) for entry in _list(values["tasks"])]
    calibrated = any(selector.options.get("policy") == "head_thresholds" for selector in selectors)
    shares = {"low": 0, "high": 1, "above": True}
    recipe = Recipe(
        models=models,
        selectors=_keep(selectors, only_selectors, "selectors", lambda s: s.name, always="dense"),
        tasks=_keep(tasks, only_tasks, "tasks", lambda t: t.task),
        densities=_numbers(values.get("densities", []), "densities", float, **shares),
        times=_numbers(budgets.get("time", []), "times", float, 0, above=True),
        last_rows_dense=tuple(sorted(_numbers(values.get("last_rows_dense", 0), "last_rows_dense", int, 0))),
        calibration=reader.sources(values.get("calibration"), "distill", "calibration") if calibrated else (),
        batch=batch or _number(values.get("batch", 1), "batch", int, 1),
        tuning_windows=_number(values.get("tuning_windows", 4), "tuning_windows", int, 1),
    )
    if not recipe.densities and not recipe.times and any(s.selector != "dense" for s in recipe.selectors):
        raise ValueError("the recipe must have densities or budgets: {time: [...]}, got neither")
    return recipe


def check_files(recipe: Recipe, model: ModelEntry, config: Any) -> None:
    """Checks the contexts, gates and plans of a recipe against the configuration of a model.

    Args:
        recipe: the recipe.
        model: one of its models.
        config: the model's transformers configuration.

    Raises:
        ValueError: a context that the model cannot take, or a file that is missing, damaged or of another model.
    """
    from seerattn.hf.config import check_gate_folder
    from seerattn.methods.head_rules import describe_model
    from seerattn.results.environment import fingerprint

    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", math.inf)
    context = max(context for task in recipe.tasks for context in task.contexts)
    if context > longest:
        raise ValueError(f"contexts must be at most the {longest} tokens of {model.name}, got {context}")
    about = describe_model(text, fingerprint(model.source) if Path(model.source).is_dir() else None)
    for entry in recipe.selectors:
        if entry.selector in SOURCES:
            plan = entry.file("plan", model.name)
            make_family(entry.selector, name=entry.name, options=entry.options, plan=plan, model=about)
        elif entry.selector == "gate":
            folder = entry.file("gates", model.name)
            of = check_gate_folder(folder).get("base_model") or {}
            other = [f"{name} {of[name]}" for name in of if getattr(text, name, of[name]) not in (of[name], None)]
            if other:
                raise ValueError(
                    f"gates must belong to the model, got {folder} of a model with {', '.join(other)}; "
                    f"distil gates for {model.name} with seerattn distill"
                )


class _Reader:
    """Reads the entries of a recipe in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, text: str) -> Path:
        return self._folder / Path(text).expanduser()

    def model(self, entry: Any) -> ModelEntry:
        values = _mapping(
            entry if isinstance(entry, dict) else {"model": entry}, "a model", ("model", "name"), ("model",)
        )
        source = _text(values["model"], "model")
        folder = self.path(source)
        if not folder.is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
            raise ValueError(f"model must be a folder or the name of a model on the Hub, got {folder}")
        return ModelEntry(
            _text(values.get("name", folder.resolve().name), "name"), str(folder) if folder.is_dir() else source
        )

    def selector(self, entry: Any) -> SelectorEntry:
        values = dict(entry) if isinstance(entry, dict) else {"selector": entry}
        kind = values.pop("selector", None)
        if kind not in SELECTORS:
            raise ValueError(f"selector must be one of {', '.join(SELECTORS)}, got {short(kind)}")
        files = {name: self._by_model(values.pop(name, None), f"{name} of {kind}") for name in ("gates", "plan")}
        name = _text(values.pop("name"), "name") if "name" in values else None
        check_options(kind, values)
        name = name or default_name(kind, values)
        if (kind == "gate") != bool(files["gates"]):
            raise ValueError(f"gates must be a folder for the selector gate, and only there, got {kind} {name}")
        needs_plan = kind in SOURCES and SOURCES[kind].plan
        if needs_plan != bool(files["plan"]):
            make = f"; make one with seerattn plan {kind} and name it under plan" if needs_plan else "; take it out"
            raise ValueError(f"{kind} must have {'a plan, got none' if needs_plan else 'no plan, got one'}{make}")
        if kind == "gate" and values.get("policy", "top_k") not in GATE_POLICIES:
            raise ValueError(f"policy must be one of {', '.join(GATE_POLICIES)}, got {short(values['policy'])}")
        for folder in files["gates"].values():
            if not folder.is_dir():
                raise ValueError(f"gates must be a folder, got {folder}")
        return SelectorEntry(kind, name, values, files["gates"], files["plan"])

    def task(self, entry: Any, contexts: tuple[int, ...]) -> TaskEntry:
        values = dict(entry) if isinstance(entry, dict) else {"task": entry}
        kind = values.get("task")
        if kind not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {short(kind)}")
        own = {
            "perplexity": ("data", "windows"),
            "recall": ("data", "windows"),
            "key_value": ("haystack", "n", "depths", "seed", "pairs"),
            "multi_key": ("haystack", "n", "depths", "seed", "pairs"),
            "variable_tracking": ("haystack", "n", "depths", "seed", "chains", "hops"),
            "passkey": ("haystack", "n", "depths", "seed"),
        }[kind]
        _mapping(values, f"the task {kind}", ("task", "text", "contexts", "max_docs", *own))
        data = self.sources(values.get("data", values.get("haystack")), "evaluate", own[0])
        names = dict.fromkeys(Path(source).name.split(".")[0] for source in data)
        shipped = data == (str(BOOKS / "evaluate"),)
        depths = _numbers(values.get("depths", list(TaskEntry.depths)), "depths", float, 0, high=1)
        numbers = {"max_docs": 0, "windows": 0, "n": 1, "seed": 0, "pairs": 1, "chains": 1, "hops": 1}
        found = {name: _number(values[name], name, int, low) for name, low in numbers.items() if name in values}
        return TaskEntry(
            task=kind,
            text=_text(values.get("text", "books" if shipped else "+".join(names)), "text"),
            data=data,
            contexts=_numbers(values["contexts"], "contexts", int, 2) if "contexts" in values else contexts,
            depths=depths,
            options={name: found.pop(name) for name in ("pairs", "chains", "hops") if name in found},
            **found,
        )

    def sources(self, value: Any, shipped: str, what: str) -> tuple[str, ...]:
        """Sources of text; by default the books that come with the project."""
        if value is None:
            if not (BOOKS / shipped).is_dir():
                raise ValueError(
                    f"{what} must be given, got none and no books at {BOOKS}; name a file, folder or dataset"
                )
            return (str(BOOKS / shipped),)
        found = []
        for source in (_text(each, what) for each in _list(value)):
            path = self.path(source)
            # As `read_documents` takes it: what has no suffix and two parts at most may be a dataset.
            dataset = not Path(source).suffix and not source.startswith((".", "/", "~")) and source.count("/") < 2
            if not path.exists() and not dataset:
                raise ValueError(f"{what} must exist, got {path}")
            found.append(str(path) if path.exists() else source)
        if not found:
            raise ValueError(f"{what} must name a file, folder or dataset, got none")
        return tuple(found)

    def _by_model(self, value: Any, what: str) -> dict[str, Path]:
        if value is None:
            return {}
        by_model = value if isinstance(value, dict) else {"": value}
        return {
            model if model == "" else _text(model, f"model of {what}"): self.path(_text(path, what))
            for model, path in by_model.items()
        }


def _mapping(value: Any, what: str, known: Sequence[str], required: Sequence[str] = ()) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a mapping with {', '.join(known)}, got {short(value)}")
    unknown, missing = [short(key) for key in value if key not in known], [key for key in required if key not in value]
    if unknown or missing:
        got = f"{', '.join(unknown)}" if unknown else f"none of {', '.join(missing)}"
        raise ValueError(f"{what} must have keys among {', '.join(known)}, got {got}")
    return value


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip() or not _encodes(value):
        raise ValueError(f"{what} must be text, got {short(value)}")
    return value


def _encodes(text: str) -> bool:
    """Whether a text has no half of a character, which no file can hold, and no end in its middle."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _number(
    value: Any, what: str, kind: Callable[[Any], Any], low: float, high: float = math.inf, above: bool = False
) -> Any:
    number = fits(value, float) and (kind is float or value == int(value))
    if not number or not low <= value <= high or (above and value == low):
        whole = "a whole number" if kind is int else "a number"
        bound = f"{'above' if above else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
        raise ValueError(f"{what} must be {whole} {bound}, got {short(value)}")
    return kind(value)


def _numbers(
    value: Any, what: str, kind: Callable[[Any], Any], low: float, high: float = math.inf, above: bool = False
) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(_number(each, what, kind, low, high, above) for each in _list(value)))


def _distinct(entries: list[Any], what: str) -> tuple[Any, ...]:
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names) or not names:
        raise ValueError(
            f"{what} must be some with names of their own, got {', '.join(names) or 'none'}; give each a name"
        )
    return tuple(entries)


def _keep(
    entries: Sequence[Any], only: Sequence[str], what: str, name: Callable[[Any], str], always: str | None = None
) -> tuple[Any, ...]:
    names = list(dict.fromkeys(map(name, entries)))
    unknown = [one for one in only if one not in names]
    if unknown:
        raise ValueError(f"only-{what} must be among {', '.join(names)}, got {', '.join(unknown)}")
    return tuple(entry for entry in entries if not only or name(entry) in (*only, always))
