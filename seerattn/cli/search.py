"""`seerattn search`: what a method looks for offline, kept in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from seerattn.cli.options import from_options
from seerattn.cli.progress import progress_bars
from seerattn.cli.terminal import say
from seerattn.data.windows import token_documents
from seerattn.hf.eval_model import Loading, load_eval_model
from seerattn.methods import kind_of_method, methods
from seerattn.methods.head_rules import HeadRules, describe_model
from seerattn.options import options_of, parse_options
from seerattn.outputs import check_output
from seerattn.texts import visible


def _searching() -> list[str]:
    return [id for id, of in methods().items() if of.searches is not None]


MethodArgument = Annotated[str, typer.Argument(help=f"The method: {', '.join(_searching())}.")]
ModelOption = Annotated[str, typer.Option(help="Base model: a folder or the name of one on the Hub.")]
DataOption = Annotated[list[str], typer.Option(help="Text to search on: files, folders, datasets; may be repeated.")]
PlanOption = Annotated[Path, typer.Option(help="Where the plan is written; one that is there is never replaced.")]
MaxDocsOption = Annotated[int, typer.Option(help="Use the first so many documents; 0 for all.", min=0)]
_OPTIONS = "; ".join(f"{id}: {', '.join(options_of(methods()[id].searches))}" for id in _searching())
SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="NAME=VALUE", help=f"An option of the search, may be repeated. {_OPTIONS}."),
]


@from_options
def search(
    method: MethodArgument,
    loading: Loading,
    model: ModelOption,
    output: PlanOption,
    data: DataOption = [],  # noqa: B006
    options: SetOption = [],  # noqa: B006
    max_docs: MaxDocsOption = 0,
) -> None:
    """Search rules for every head of a model, once, for a method that needs them.

    minference: a pattern and its sizes. moa: a span, by how much each block changes the loss of what the model says.
    xattention: a threshold, by the fewest blocks that hold most of the true mass.
    """
    kind = kind_of_method(method).searches
    if kind is None:
        raise ValueError(f"method must be one that searches, {', '.join(_searching())}, got {method}")
    asked = kind(**parse_options(kind, options, where=f"options of the search of {method}"))
    if asked.needs_text != bool(data):
        raise ValueError(f"data must be {'given' if asked.needs_text else 'left out, as nothing is searched'}")
    check_output(output, "output", "a plan", HeadRules.load)
    if asked.needs_text:
        loaded = loading.load(model, context=asked.longest)
        documents = token_documents(data, loaded.tokenizer, limit=max_docs or None)
    else:
        # Nothing will run: what the model is like is enough.
        trust = loading.trust_remote_code
        loaded, documents = load_eval_model(model, device=torch.device("meta"), trust_remote_code=trust), []
    about = describe_model(loaded.model.config)
    if not is_there(output, kind.method, about, asked.made(loaded, documents)):
        with progress_bars() as progress:
            found = asked.run(loaded, documents, progress=progress)
        found.save(output)
    _print(HeadRules.load(output, method=kind.method), output)


def is_there(path: Path, method: str, model: dict[str, Any], made: dict[str, Any]) -> bool:
    """Whether a file holds the plan that is asked for already.

    Raises:
        ValueError: it holds something else.
    """
    if not path.exists() or path.stat().st_size == 0:
        return False
    rules = HeadRules.load(path, method=method, model=model)
    different = [
        f"{name} {rules.made.get(name)}, not {made.get(name)}"
        for name in {**made, **rules.made}
        if name != "found" and rules.made.get(name) != made.get(name)
    ]
    if different:
        raise ValueError(
            f"output must be a new file or a plan of the same settings, got {path} with {'; '.join(different)}; "
            "name another file"
        )
    return True


def _print(rules: HeadRules, path: Path) -> None:
    found = rules.made.get("found")
    for name, value in found.items() if isinstance(found, dict) else ():
        shown = ", ".join(f"{n} {k}" for k, n in value.items()) if isinstance(value, dict) else _number(value)
        typer.echo(visible(f"{name.replace('_', ' ')}: {shown}"))
    say(f"the plan is in {path}")


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
