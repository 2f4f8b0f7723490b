"""An experiment: a model, the methods that are compared on it, the tasks, and what is made equal.

It is built in Python, read from YAML, or given as flags of `seerattn eval`; `seerattn.eval.run` carries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from seerattn.eval.tasks import Task, kind_of_task, make_task
from seerattn.hf.eval_model import check_context
from seerattn.methods import kind_of_method, make_method
from seerattn.methods.method import Method
from seerattn.options import check_options, option, parse_options, read_options
from seerattn.texts import short
from seerattn.yaml_files import read_yaml

T = TypeVar("T")
# Options whose values are places: relative to the folder of the file that names them.
_DEPTH = 3
_PLACES = ("model", "data", "gates", "plan", "data_dir", "calibration", "essays", "documents")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is measured, and at what.

    A method is a `Method`, its id, a mapping of "method" and its options, or a text such as
    ``gate,gates=FOLDER,name=mine``. Tasks likewise; what is no task of this package is one of lm-evaluation-harness.

    Attributes:
        model: a folder or the name of a model on the Hub.
        methods: ways of choosing blocks. Dense need not be named: it is measured where others are compared with it.
        gates: folders of gates, a short way to name methods: "FOLDER" or "NAME=FOLDER" each; among the methods after.
        tasks: measurements.
        data: text of tasks that name none.
        text: what results call it.
        densities: shares of the causal block area that methods are tuned to.
        times: shares of the dense attention's time that they are tuned to.
        contexts: lengths in tokens, of tasks that name none.
        last_rows_dense: numbers of query-block rows at the end that keep every block, on top of the density.
        batch: sequences that run together.
        tuning_windows: sequences that a setting is tuned on.
        name: what results call the model.

    Raises:
        ValueError: something that does not exist or does not go together.
    """

    model: str = option(help="Base model: a folder or the name of one on the Hub.")
    methods: tuple[Any, ...] = option(
        (),
        help="Ways of choosing blocks, such as oracle,streaming or gate,gates=FOLDER,policy=top_p. "
        "Default: dense, the gates that are given, oracle, streaming.",
        repeat=True,
    )
    gates: tuple[str, ...] = option((), help="A folder of gates, or NAME=FOLDER; may be repeated.", repeat=True)
    tasks: tuple[Any, ...] = option(
        ("perplexity",),
        help="perplexity, recall, passkey, key_value, multi_key, variable_tracking, continuation, or any task of "
        "lm-evaluation-harness; with options, such as passkey,n=5.",
        repeat=True,
    )
    data: tuple[str, ...] = option((), help="Text: files, folders, datasets; default: the books here.", repeat=True)
    text: str = option("", help="What results call the text; default: the name of the data.")
    densities: tuple[float, ...] = option(
        (), help="Shares of the causal block area to compute; default 0.2,0.1.", above=0, high=1
    )
    times: tuple[float, ...] = option((), help="Shares of the time of dense attention to take.", above=0)
    contexts: tuple[int, ...] = option((4096,), help="Context lengths in tokens.", low=2)
    max_docs: int = option(0, help="Use the first so many documents of the text; 0 for all.", low=0)
    last_rows_dense: tuple[int, ...] = option(
        (0,), help="Query-block rows at the end that keep all blocks.", low=0, flag=False
    )
    batch: int = option(1, help="Sequences that run together.", low=1)
    tuning_windows: int = option(4, help="Sequences that a setting is tuned on.", low=1, flag=False)
    name: str = option("", help="What results call the model; default: its folder or name.", flag=False)

    def __post_init__(self) -> None:
        check_options(self)
        if not self.densities and not self.times:
            object.__setattr__(self, "densities", (0.2, 0.1))
        methods = [one for each in self.methods for one in _read(each, "method", make_method, kind_of_method)]
        if not self.methods:
            methods = [make_method(id, {}) for id in ("dense", "oracle", "streaming")]
        methods[1:1] = self._of_gates()
        names = [str(method) for method in methods]
        if len(set(names)) < len(names):
            raise ValueError(
                f"methods must have names of their own, got {', '.join(names)}; give each a name, such as name=mine"
            )
        tasks = [one for each in self.tasks for one in _read(each, "task", make_task, kind_of_task)]
        if not tasks:
            raise ValueError("tasks must be some, got none")
        common = {"data": self.data, "text": self.text, "max_docs": self.max_docs}
        tasks = [
            replace(task, **{name: of for name, of in common.items() if of and not getattr(task, name)})
            for task in tasks
        ]
        for method in methods:
            if method.kind != "dense" and not any(_fits(method, task) for task in tasks):
                raise ValueError(
                    f"methods must be measured by a task, got {method}, which chooses for "
                    f"{' or '.join(method.budgets)}; continuation, and a retrieval task with decode_tokens, measure "
                    "decoded tokens, all other tasks prompts"
                )
        # Its gates are methods from here on, so that an experiment is one however they were named, and can be changed.
        for name, values in (("methods", methods), ("gates", ()), ("tasks", tasks)):
            object.__setattr__(self, name, tuple(values))
        object.__setattr__(self, "last_rows_dense", tuple(sorted(set(self.last_rows_dense))))

    @staticmethod
    def read_file(path: Path) -> dict[str, Any]:
        """The options of an experiment that a YAML file holds; places in it are relative to its folder.

        Raises:
            ValueError: the file is none, or holds something else.
        """
        return {name: _placed(name, value, path.parent) for name, value in read_yaml(path).items()}

    @classmethod
    def from_file(cls, path: Path, **changes: Any) -> Experiment:
        """The experiment of a YAML file, with some options changed.

        Raises:
            ValueError: the file is none, or asks for what does not exist.
        """
        return read_options(cls, cls.read_file(path) | changes, where=f"an experiment in {path}")

    def _of_gates(self) -> list[Method]:
        found = []
        for one in self.gates:
            name, _, path = one.rpartition("=")
            if not Path(path).is_dir():
                raise ValueError(f"gates must be a folder, got {path}")
            found.append(make_method("gate", {"gates": Path(path), "name": name}))
        return found

    @property
    def called(self) -> str:
        """What results call the model."""
        folder = Path(self.model)
        return self.name or (folder.resolve().name if folder.is_dir() else folder.name)

    def keep(self, names: Sequence[str]) -> Experiment:
        """The same with the methods and tasks of these names alone; dense stays, and so does what none is named of.

        Raises:
            ValueError: a name that is none of them.
        """
        methods = {str(method): method for method in self.methods}
        tasks = {task.name if task.id == "harness" else task.id: task for task in self.tasks}
        unknown = [name for name in names if name not in (*methods, *tasks)]
        if unknown:
            raise ValueError(f"only must be among {', '.join((*methods, *tasks))}, got {', '.join(unknown)}")
        kept: dict[str, tuple[Any, ...]] = {}
        for what, known in (("methods", methods), ("tasks", tasks)):
            if any(name in known for name in names):
                wanted = [known[name] for name in (*names, "dense") if name in known]
                kept[what] = tuple(one for one in getattr(self, what) if one in wanted)
        return replace(self, **kept)

    def check(self, config: Any) -> None:
        """Checks contexts, texts, gates and plans before the model is loaded.

        Args:
            config: the model's transformers configuration.

        Raises:
            ValueError: a context that the model cannot take, or a file that is missing, damaged or of another model.
        """
        check_context(config, max(context for task in self.tasks for context in task.contexts or self.contexts))
        for task in self.tasks:
            task.check()
        for method in self.methods:
            method.check_model(config)


def _fits(method: Method, task: Task) -> bool:
    """Whether a task measures what a method chooses for: decoded tokens, or prompts."""
    return ("tokens" in method.budgets) if task.decode_tokens else set(method.budgets) != {"tokens"}


def _placed(name: str, value: Any, folder: Path, depth: int = 0) -> Any:
    """A value with the places in it taken from a folder, where they are there.

    Places lie at most in a list of a mapping of a list. What goes deeper is none, and YAML can make little text
    endlessly deep.
    """
    if depth > _DEPTH:
        return value
    if isinstance(value, Mapping):
        return {key: _placed(key, inner, folder, depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [_placed(name, inner, folder, depth + 1) for inner in value]
    if name not in _PLACES or not isinstance(value, str):
        return value
    label, equals, place = value.rpartition("=")
    found = folder / Path(place).expanduser()
    # A name on the Hub looks like a path; what is there beside the file goes before it.
    relative = found.exists() or place.startswith((".", "/", "~")) or name not in ("model", "data", "calibration")
    return f"{label}{equals}{found}" if relative else value


def _read(
    value: Any, what: str, make: Callable[[str, Mapping[str, Any]], T], kind_of: Callable[[str], type[T]]
) -> list[T]:
    """Methods or tasks out of an object, a mapping, or a text that may hold several.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, (Method, Task)):
        return [value]
    if isinstance(value, Mapping):
        options = dict(value)
        id = options.pop(what, None)
        if not isinstance(id, str):
            raise ValueError(f"{what} must be named, as in {{{what}: NAME}}, got {short(value)}")
        return [make(id, options)]
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a name, a mapping or a text, got {short(value)}")
    found: list[tuple[str, list[str]]] = []
    for word in filter(None, (word.strip() for word in value.split(","))):
        if "=" not in word:
            found.append((word, []))
        elif not found:
            raise ValueError(f"{what} must begin with its name, got {short(value)}")
        else:
            found[-1][1].append(word)
    return [make(id, parse_options(kind_of(id), words, where=f"options of {id}")) for id, words in found]
