"""Requests of a load on a server, and the clients that send them: some wait, some leave, some make no sense."""

from __future__ import annotations

import http.client
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

NAME = "reference"  # what clients call the model
SECONDS = 600.0  # after which an answer is lost
LONGEST_ANSWER = 48
Kind = Literal["whole", "stream", "left", "senseless"]


@dataclass(frozen=True)
class Asked:
    """One request of the load.

    Attributes:
        number: its place.
        kind: what its client does.
        tokens: its prompt.
        new: tokens of its answer.
        density: that it asks for, None for that of the server.
        leave: events or tenths of a second after which a client that leaves goes away.
        path: where it goes.
        body: what is sent, None to make it of the other fields.
        status: that a senseless one gets.
    """

    number: int
    kind: Kind
    tokens: list[int] = field(default_factory=list, repr=False)
    new: int = 0
    density: float | None = None
    leave: int | None = None
    path: str = "/v1/completions"
    body: bytes | None = None
    status: int = 200

    @property
    def sent(self) -> bytes:
        """The body."""
        if self.body is not None:
            return self.body
        fields = {"model": NAME, "prompt": self.tokens, "max_tokens": self.new, "temperature": 0}
        fields |= {} if self.density is None else {"density": self.density}
        fields |= {"stream": True, "stream_options": {"include_usage": True}} if self.is_stream else {}
        return json.dumps(fields).encode()

    @property
    def is_stream(self) -> bool:
        """Whether its answer comes in events."""
        return self.kind == "stream" or (self.kind == "left" and self.number % 2 == 0)


class Outcome(NamedTuple):
    """What came of a request: `status` 0 is a connection that broke, and -1 a client that left."""

    status: int
    text: str = ""
    density: float | None = None
    whole: bool = False
    seconds: float = 0.0


def senseless() -> list[tuple[str, bytes, int]]:
    """Requests that must be refused: where they go, what they hold, and how."""

    def body(**fields: Any) -> bytes:
        return json.dumps({"model": NAME, "prompt": "Once", "max_tokens": 8, "temperature": 0} | fields).encode()

    completions = [
        (b"no json", 400),
        (body()[:-9], 400),
        (b"[]", 400),
        (b"", 400),
        (b"\xff\xfe\x00", 400),
        (body(density=0), 400),
        (body(density="much"), 400),
        (body(temperature=-1), 400),
        (body(max_tokens=0), 400),
        (body(n=2), 400),
        (body(answer="quickly"), 400),
        (body(prompt=[]), 400),
        (body(prompt=[7168]), 400),
        (body(prompt=[-1]), 400),
        (body(prompt=[5] * 9000), 400),
        (body(max_tokens=8192), 400),
        (body(model="another"), 404),
    ]
    others = [("/v1/chat/completions", body(), 400), ("/v1/answers", body(), 404)]
    return [("/v1/completions", *one) for one in completions] + others


def make_load(book: list[int], requests: int, *, shortest: int, longest: int, seed: int) -> list[Asked]:
    """Requests in a random order: of twenty, four stream, three are left, two make no sense, and some begin alike."""
    draw, bad = random.Random(seed), senseless()
    kinds: list[Kind] = ["stream"] * 4 + ["left"] * 3 + ["senseless"] * 2 + ["whole"] * 11
    load = []
    for number in range(requests):
        kind = kinds[number % len(kinds)]
        if kind == "senseless":
            path, body, status = bad[len([one for one in load if one.kind == kind]) % len(bad)]
            load.append(Asked(number, kind, path=path, body=body, status=status))
            continue
        length = draw.randint(shortest, longest)
        begin = 0 if draw.random() < 0.2 else draw.randrange(len(book) - length)
        density = draw.choice([None, None, 0.1, 0.4, 1.0])
        leave = draw.choice([0, 1, 2, 5, 15, 40]) if kind == "left" else None
        new = draw.randint(1, LONGEST_ANSWER) if kind != "left" else 400
        load.append(Asked(number, kind, book[begin : begin + length], new, density, leave))
    draw.shuffle(load)
    return load


def ask(port: int, asked: Asked) -> Outcome:
    """Sends a request and does with its answer what its client does."""
    begin = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request("POST", asked.path, asked.sent, {"content-type": "application/json"})
        if asked.kind == "left" and not asked.is_stream:
            time.sleep(asked.leave / 10)
            return Outcome(-1)
        reply = connection.getresponse()
        if not asked.is_stream:
            text = reply.read().decode()
            return _outcome(reply.status, json.loads(text), time.perf_counter() - begin)
        return _stream(asked, reply, begin)
    except (OSError, http.client.HTTPException):
        return Outcome(0)
    finally:
        connection.close()


def _outcome(status: int, body: dict[str, Any], seconds: float) -> Outcome:
    if status != 200:
        told = isinstance(body.get("error"), dict) and set(body["error"]) == {"message", "type", "param", "code"}
        return Outcome(status, json.dumps(body), None, told, seconds)
    (choice,) = body["choices"]
    return Outcome(status, choice["text"], body["usage"]["density"], choice["finish_reason"] is not None, seconds)


def _stream(asked: Asked, reply: http.client.HTTPResponse, begin: float) -> Outcome:
    texts, density, finish = [], None, None
    for number, line in enumerate(row for row in reply if row.startswith(b"data: ")):
        if asked.kind == "left" and number >= asked.leave:
            return Outcome(-1)
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            return Outcome(200, "".join(texts), density, finish is not None, time.perf_counter() - begin)
        event = json.loads(data)
        if "error" in event:
            return Outcome(500, json.dumps(event))
        for choice in event["choices"]:
            texts.append(choice["text"])
            finish = choice["finish_reason"]
        if event["usage"] is not None:
            density = event["usage"]["density"]
    return Outcome(0, "".join(texts))
