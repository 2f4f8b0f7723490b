"""The HTTP side: OpenAI's routes over an `Engine`, its form of errors, health and metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from seerattn.serve.bodies import Chat, Common, Completion
from seerattn.serve.engine import Ask, Busy, Engine, Failed, Part
from seerattn.serve.metrics import Metrics, Outcome

# Tokens of a completion where a client does not say, as OpenAI has it. A chat goes on to the end of the context.
_COMPLETION_TOKENS = 16
_LEFT = 499  # status of a request whose client went away; nobody reads it


class _Refused(Exception):
    """An answer in OpenAI's form of errors."""

    def __init__(self, status: int, message: str, kind: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def make_app(
    engine: Engine,
    *,
    name: str,
    api_key: str | None = None,
    ready: Callable[[], None] = lambda: None,
    failed: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The application.

    Args:
        engine: answers; it is started and stopped with the application.
        name: of the model, as clients are to call it.
        api_key: that clients must send, None for none.
        ready: called once requests are taken.
        failed: called once none is answered any more, though nobody asked for it.
    """
    metrics, born, tokenizing = Metrics(), int(time.time()), asyncio.Lock()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start(failed)
        ready()
        yield
        await asyncio.to_thread(engine.stop)

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise _Refused(
                401, "the API key must be sent as a bearer token, got none or another", "authentication_error"
            )

    app = FastAPI(title="seerattn", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    keyed = [Depends(check_key)]

    @app.exception_handler(_Refused)
    async def refused(_: Request, error: _Refused) -> JSONResponse:
        metrics.ended("failed" if error.status >= 500 and error.status != 503 else "refused")
        return JSONResponse(error.body, error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"] if part != "body") or None
        return await refused(
            request, _Refused(400, f"{param or 'body'}: {first['msg']}", "invalid_request_error", param)
        )

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        return await refused(request, _Refused(error.status_code, str(error.detail), "invalid_request_error"))

    @app.get("/health")
    async def health() -> JSONResponse:
        status = "ok" if engine.runs else "failed"
        return JSONResponse({"status": status}, 200 if engine.runs else 503)

    @app.get("/metrics", dependencies=keyed)
    async def told() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(engine.active), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", dependencies=keyed)
    async def models() -> dict[str, Any]:
        one = {"id": name, "object": "model", "created": born, "owned_by": "seerattn", "max_model_len": engine.room}
        return {"object": "list", "data": [one]}

    @app.post("/v1/completions", dependencies=keyed)
    async def completions(body: Completion, request: Request) -> Response:
        tokens = body.prompt
        if isinstance(tokens, str):
            tokens = await tokenize(engine.loaded.tokens_of, tokens, "prompt")
        elif not tokens or not all(0 <= one < engine.vocabulary for one in tokens):
            raise _Refused(400, "prompt must hold tokens of the model", "invalid_request_error", "prompt")
        ask = _ask(body, tokens, body.max_tokens or _COMPLETION_TOKENS)
        return await respond(request, body, ask, _Form("cmpl", "text_completion", "text_completion", _plain, _plain))

    @app.post("/v1/chat/completions", dependencies=keyed)
    async def chat(body: Chat, request: Request) -> Response:
        tokens = await tokenize(engine.loaded.tokens_of_chat, body.messages, "messages")
        rest = max(1, engine.room - len(tokens)) if engine.room is not None else 4096
        ask = _ask(body, tokens, body.max_completion_tokens or body.max_tokens or rest)
        form = _Form("chatcmpl", "chat.completion", "chat.completion.chunk", _message, _delta)
        return await respond(request, body, ask, form)

    async def tokenize(make: Callable[[Any], list[int]], given: Any, param: str) -> list[int]:
        # A long text takes a while, and a tokenizer takes one at a time.
        async with tokenizing:
            try:
                return await asyncio.to_thread(make, given)
            except ValueError as error:
                raise _Refused(400, str(error), "invalid_request_error", param) from error

    async def respond(request: Request, body: Common, ask: Ask, form: _Form) -> Response:
        if body.model != name:
            message = f"model must be {name}, got {body.model}"
            raise _Refused(404, message, "invalid_request_error", "model", "model_not_found")
        try:
            engine.check(ask)
        except ValueError as error:
            code = "context_length_exceeded" if "tokens" in str(error) else None
            raise _Refused(400, str(error), "invalid_request_error", None, code) from error
        except Busy as error:
            raise _Refused(503, str(error), "overloaded_error") from error
        begin, head = time.perf_counter(), form.head(name)

        def answered(part: Part) -> dict[str, Any]:
            whole = time.perf_counter() - begin
            counts = {"prompt": len(ask.tokens), "new": part.tokens, "density": part.density}
            metrics.answered(**counts, first=part.first_after, whole=whole)
            return _usage(ask, part)

        if body.stream:
            told = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(
                _events(engine, ask, form, head, answered, metrics.ended, told), media_type="text/event-stream"
            )
        part = await _unless_left(request, engine.whole(ask))
        if part is None:
            metrics.ended("left")
            return Response(status_code=_LEFT)
        choice = form.whole(part.text) | {"index": 0, "finish_reason": part.finish, "logprobs": None}
        return JSONResponse(head | {"object": form.object, "choices": [choice], "usage": answered(part)})

    return app


class _Form:
    """How the answers of one route look."""

    def __init__(
        self, prefix: str, object: str, chunk: str, whole: Callable[[str], dict], part: Callable[[str], dict]
    ) -> None:
        self.prefix, self.object, self.chunk, self.whole, self.part = prefix, object, chunk, whole, part

    def head(self, name: str) -> dict[str, Any]:
        return {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}


def _plain(text: str) -> dict[str, Any]:
    return {"text": text}


def _message(text: str) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}}


def _delta(text: str) -> dict[str, Any]:
    return {"delta": {"role": "assistant", "content": text}}


def _ask(body: Common, tokens: list[int], new: int) -> Ask:
    return Ask(
        tokens=tokens,
        new=new,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=body.stops,
        density=body.density,
    )


def _usage(ask: Ask, part: Part) -> dict[str, Any]:
    prompt = len(ask.tokens)
    counts = {"prompt_tokens": prompt, "completion_tokens": part.tokens, "total_tokens": prompt + part.tokens}
    return counts | {"density": part.density}


async def _events(
    engine: Engine,
    ask: Ask,
    form: _Form,
    head: dict[str, Any],
    answered: Callable[[Part], dict[str, Any]],
    ended: Callable[[Outcome], None],
    told: bool,
) -> AsyncIterator[str]:
    """An answer as server-sent events."""
    outcome: Outcome | None = "left"
    try:
        async with aclosing(engine.answer(ask)) as parts:
            async for part in parts:
                choice = form.part(part.text) | {"index": 0, "finish_reason": part.finish, "logprobs": None}
                chunk = head | {"object": form.chunk, "choices": [choice]}
                if part.finish is not None:
                    usage, outcome = answered(part), None
                yield _event(chunk | ({"usage": None} if told else {}))
        if told:
            yield _event(head | {"object": form.chunk, "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"
    except Failed as error:
        outcome = "failed"
        yield _event(_Refused(500, str(error), "server_error").body)
    finally:
        # A client that goes away ends the generator where it stands.
        if outcome is not None:
            ended(outcome)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _unless_left(request: Request, answer: Any) -> Part | None:
    """The answer, or None, and an end to it, once the client has gone away."""
    working, watching = asyncio.ensure_future(answer), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return None
        return working.result()
    except Failed as error:
        raise _Refused(500, str(error), "server_error") from error
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
