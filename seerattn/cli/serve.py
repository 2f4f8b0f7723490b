"""`seerattn serve`: a model with gates behind OpenAI's HTTP interface."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass
from ipaddress import ip_address

import typer

from seerattn.cli.options import from_options
from seerattn.cli.terminal import say
from seerattn.extras import check_extra
from seerattn.hf.eval_model import Loading
from seerattn.options import check_options, option
from seerattn.serve.engine import Engine, Limits
from seerattn.serve.model import Answering, Rule

_KEY = "SEERATTN_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a server listens, and to whom.

    Attributes:
        host: address; the default is heard on this machine alone.
        port: 0 takes a free one.
        name: of the model for clients, "" the one that was loaded.
        api_key: that clients must send.
        rule: of `TopK`; "row_share" lets requests share what they begin with.
        drain_seconds: how long requests that run may go on once the server is told to end.
    """

    host: str = option("127.0.0.1", help="Address to listen at; the default is heard on this machine alone.")
    port: int = option(8000, help="Port; 0 takes a free one.", low=0, high=65535)
    name: str = option("", help="What clients call the model; default: what --model says.")
    api_key: str = option("", help=f"Key that clients must send; better in the variable {_KEY}.")
    rule: Rule = option("same_k", help="Of TopK; row_share lets requests share the pages of equal beginnings.")
    drain_seconds: int = option(60, help="How long requests go on after SIGTERM.", low=0)

    def __post_init__(self) -> None:
        check_options(self)


@from_options
def serve(answering: Answering, place: Place, limits: Limits, loading: Loading) -> None:
    """Answer requests over HTTP: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics.

    Prompts are read sparsely, and a request may say its density in the field "density". SIGTERM ends the server once
    the requests that run are answered. A failure that is not the fault of one request ends it with exit code 1.
    """
    check_extra("serve", "seerattn serve")
    import uvicorn

    from seerattn.serve.app import make_app

    key = place.api_key or os.environ.get(_KEY) or None
    # Before the model is loaded: a port that is taken is told at once.
    listening = socket.create_server((place.host, place.port), family=_family(place.host))
    if key is None and not _is_local(place.host):
        say(f"anybody who reaches {place.host} may ask, as there is no key; set {_KEY}")
    engine = Engine(answering.load(loading, rule=place.rule), limits)
    address = f"http://{listening.getsockname()[0]}:{listening.getsockname()[1]}"
    name = place.name or answering.model
    failed = False

    def end() -> None:
        nonlocal failed
        server.should_exit = failed = True

    app = make_app(engine, name=name, api_key=key, ready=lambda: say(f"{name} answers at {address}"), failed=end)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=place.drain_seconds))
    # uvicorn raises the signal again once it has ended; an end that was asked for is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    server.run(sockets=[listening])
    if failed:
        # A model on a device that has failed cannot be trusted in this process: who started it may start it again.
        say("the model failed in a way that is not the fault of one request; the reason is above")
        raise typer.Exit(1)


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
