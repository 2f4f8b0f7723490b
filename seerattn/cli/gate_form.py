"""The options that give the form of fresh gates, shared by the commands that train some."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from seerattn.cli.values import words

if TYPE_CHECKING:
    from seerattn.gate import AttnGateConfig

_FORM = "Form of the gates (default: 4 x 8 sub-blocks, all else as in AttnGateConfig)"


def _options(
    paper: Annotated[
        bool, typer.Option("--paper", help="Start from the published form.", rich_help_panel=_FORM)
    ] = False,
    layers: Annotated[
        str | None, typer.Option(help="Layers with a gate, such as 0-3,7; default all.", rich_help_panel=_FORM)
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Tokens of query and key blocks: 32, 64 or 128.", rich_help_panel=_FORM)
    ] = None,
    block_q: Annotated[int | None, typer.Option(help="Tokens of query blocks.", rich_help_panel=_FORM)] = None,
    block_k: Annotated[int | None, typer.Option(help="Tokens of key blocks.", rich_help_panel=_FORM)] = None,
    q_pooling: Annotated[
        str | None, typer.Option(help="Any of avg,max,min,salient, with commas.", rich_help_panel=_FORM)
    ] = None,
    k_pooling: Annotated[
        str | None, typer.Option(help="Any of avg,max,min,salient, with commas.", rich_help_panel=_FORM)
    ] = None,
    q_linear: Annotated[
        bool | None, typer.Option(help="A linear after the query pooling.", rich_help_panel=_FORM)
    ] = None,
    gate_dim: Annotated[
        int | None, typer.Option(help="Width of the gate; default the head dim.", rich_help_panel=_FORM)
    ] = None,
    rope: Annotated[bool | None, typer.Option(help="Rotate gate queries and keys.", rich_help_panel=_FORM)] = None,
    qk_norm: Annotated[bool | None, typer.Option(help="RMSNorm on both sides.", rich_help_panel=_FORM)] = None,
    target_keys: Annotated[
        str | None,
        typer.Option(
            help="What a query row gives to a key block: max or sum of its probabilities.", rich_help_panel=_FORM
        ),
    ] = None,
    target_power: Annotated[
        float | None,
        typer.Option(
            help="Power mean of that over query rows to learn, from 1; inf is the largest.", rich_help_panel=_FORM
        ),
    ] = None,
    query_subblocks: Annotated[
        int | None, typer.Option(help="Pieces a query block is pooled in.", rich_help_panel=_FORM)
    ] = None,
    key_subblocks: Annotated[
        int | None, typer.Option(help="Pieces a key block is pooled in.", rich_help_panel=_FORM)
    ] = None,
    normalize_subblocks: Annotated[
        bool | None,
        typer.Option(help="Softmax within each query piece before they are reduced.", rich_help_panel=_FORM),
    ] = None,
    distance_bias: Annotated[
        int | None, typer.Option(help="Learned bias by block distance, up to so many blocks.", rich_help_panel=_FORM)
    ] = None,
    share: Annotated[
        str | None, typer.Option(help="query_head, or kv_group: one gate a group.", rich_help_panel=_FORM)
    ] = None,
    init: Annotated[str | None, typer.Option(help="identity or normal.", rich_help_panel=_FORM)] = None,
    exclude_forced: Annotated[
        bool | None,
        typer.Option(help="Train without the blocks that selection keeps anyway.", rich_help_panel=_FORM),
    ] = None,
) -> None:
    """Never called: the options, as typer reads them."""


def with_gate_form(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options to a command, which takes them as ``form``, a dict of those that were given."""
    names = list(inspect.signature(_options).parameters)

    @functools.wraps(command)
    def wrapped(**arguments: Any) -> None:
        form = {name: arguments.pop(name) for name in names}
        form["paper"] = form["paper"] or None
        command(**arguments, form={name: value for name, value in form.items() if value is not None})

    parameters = []
    for function in (command, _options):
        hints = get_type_hints(function, include_extras=True)
        own = (p for p in inspect.signature(function).parameters.values() if p.name != "form")
        parameters += [p.replace(annotation=hints[p.name]) for p in own]
    wrapped.__signature__ = inspect.Signature(parameters)
    return wrapped


def gate_config(form: dict[str, Any]) -> AttnGateConfig | None:
    """The published or the default form with the options that were given, layers aside; None if none was.

    Raises:
        ValueError: options that exclude each other, or a form that is none.
    """
    from seerattn.gate import AttnGateConfig

    given = {name: value for name, value in form.items() if name not in ("paper", "layers", "block_size")}
    if "block_size" in form:
        if "block_q" in given or "block_k" in given:
            raise ValueError("block_size must be given alone, got it beside block_q or block_k; leave one of them out")
        given |= {"block_q": form["block_size"], "block_k": form["block_size"]}
    for name in ("q_pooling", "k_pooling"):
        if name in given:
            given[name] = tuple(words(given[name]))
    if "paper" in form:
        return AttnGateConfig.paper(**given)
    return AttnGateConfig(**given) if given else None


def parse_layers(text: str | None) -> list[int] | None:
    """Indices out of a list such as "0-3,7".

    Raises:
        ValueError: it is something else.
    """
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"layers must be numbers and ranges such as 0-3,7, got {text!r}")
        layers += range(int(first), int(last or first) + 1)
    return sorted(set(layers))
