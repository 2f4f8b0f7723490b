"""A server over HTTP: each answer is that of the model alone, whoever asks beside it."""

import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny_corpus import topical_text, write_models_and_gates
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor

import seerattn
from seerattn.cli import main
from seerattn.hf import paged
from seerattn.hf.eval_model import Loading
from seerattn.serve.model import Answering

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from seerattn.serve.app import make_app  # noqa: E402
from seerattn.serve.engine import Engine, Limits  # noqa: E402

ROOT = Path(__file__).parents[2]
DENSITY, NEW, SECONDS = 0.5, 6, 60
TEMPLATE = "{% for m in messages %}{{ m['content'] }} w3 {% endfor %}"
LIMITS = {"batch_tokens": 256, "cache_tokens": 8192, "slots": 8}


class Reply(NamedTuple):
    status: int
    body: Any


class Served(NamedTuple):
    """A server that runs."""

    port: int
    engine: Engine

    def ask(self, path: str, body: Any = None, *, key: str | None = None) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        sent = body if isinstance(body, str) or body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, sent, headers)
        reply = connection.getresponse()
        text = reply.read().decode()
        connection.close()
        is_json = "json" in (reply.getheader("content-type") or "")
        return Reply(reply.status, json.loads(text) if is_json else text)

    def complete(self, prompt: str, **fields: Any) -> Reply:
        return self.ask("/v1/completions", asked(prompt, **fields))


def asked(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": NEW, "temperature": 0} | fields


def events(text: str) -> list[Any]:
    """The values of server-sent events, which must end with the mark that says so."""
    *lines, last = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert last == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    write_models_and_gates(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    return folder


@contextmanager
def serving(
    folder: Path, *, gates: bool = True, key: str | None = None, rule: str = "same_k", **limits: Any
) -> Iterator[Served]:
    answering = {"gates": str(folder / "gates-of-model"), "density": DENSITY} if gates else {"dense": True}
    loaded = Answering(model=str(folder / "model"), **answering).load(Loading(device="cpu", impl="sparse"), rule=rule)
    engine, ready = Engine(loaded, Limits(**LIMITS | limits)), threading.Event()
    listening = socket.create_server(("127.0.0.1", 0))
    app = make_app(engine, name="tiny", api_key=key, ready=ready.set)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    assert ready.wait(SECONDS)
    try:
        yield Served(listening.getsockname()[1], engine)
    finally:
        server.should_exit = True
        thread.join(SECONDS)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Served]:
    with serving(folder) as found:
        yield found


class Alone:
    """What the model says to one prompt, by transformers and `attach` alone."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        self._model = seerattn.attach(model, folder / "gates-of-model", None, impl="sparse")

    def __call__(self, text: str, density: float = DENSITY, new: int = NEW, **options: Any) -> tuple[str, float]:
        policy = None if density == 1 else seerattn.TopK(density=density, **options)
        ids = self._tokenizer(text, return_tensors="pt").input_ids
        with seerattn.policy(self._model, policy), seerattn.record_density(self._model) as meter:
            found = self._model.generate(input_ids=ids, max_new_tokens=new, do_sample=False)
        answer = self._tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        return answer, meter.mean() if meter.layers else 1.0


@pytest.fixture(scope="module")
def alone(folder) -> Alone:
    return Alone(folder)


def test_answer_and_its_density_are_those_of_the_model_alone(server, alone) -> None:
    text = topical_text(300, 1)
    answer, density = alone(text)
    status, body = server.complete(text)
    assert status == 200 and body["object"] == "text_completion" and body["model"] == "tiny"
    assert body["choices"] == [{"text": answer, "index": 0, "finish_reason": "length", "logprobs": None}]
    usage = {"prompt_tokens": 300, "completion_tokens": NEW, "total_tokens": 300 + NEW, "density": density}
    assert body["usage"] == usage and density < 0.8
    ids = AutoTokenizer.from_pretrained(Path(server.engine.loaded.name))(text)["input_ids"]
    assert server.complete(ids).body["choices"] == body["choices"]


@pytest.mark.parametrize("rule", ["same_k", "row_share"])
def test_many_requests_at_once_with_densities_of_their_own_get_what_each_gets_alone(folder, alone, rule: str) -> None:
    draw = random.Random(0)
    start = topical_text(280, 9)
    asks = []
    for number in range(14):
        text = topical_text(draw.randint(2, 700), number)
        # Some begin alike, so that they could share pages.
        text = f"{start} {text}" if number % 3 == 0 else text
        asks.append((text, draw.choice([None, 0.3, 1.0]), bool(number % 2)))
    expected = [alone(text, density or DENSITY, rule=rule) for text, density, _ in asks]

    def ask(text: str, density: float | None, stream: bool) -> tuple[str, float]:
        fields = {} if density is None else {"density": density}
        if not stream:
            body = served.complete(text, **fields).body
            return body["choices"][0]["text"], body["usage"]["density"]
        parts = events(served.complete(text, stream=True, stream_options={"include_usage": True}, **fields).body)
        assert all(part["usage"] is None for part in parts[:-1]) and parts[-1]["choices"] == []
        assert [part["choices"][0]["finish_reason"] for part in parts[:-1]][-1] == "length"
        return "".join(part["choices"][0]["text"] for part in parts[:-1]), parts[-1]["usage"]["density"]

    with serving(folder, rule=rule) as served, ThreadPoolExecutor(len(asks)) as pool:
        found = list(pool.map(lambda one: ask(*one), asks))
        again = [ask(*one) for one in asks[:4]]
    assert [text for text, _ in found + again] == [text for text, _ in expected] + [text for text, _ in expected[:4]]
    if rule == "same_k":  # of pages that are shared nothing is counted again
        assert [density for _, density in found] == pytest.approx([density for _, density in expected])


def test_chat_goes_by_the_template_streamed_or_not(server, alone) -> None:
    text = topical_text(200, 2)
    answer, density = alone(f"{text} w3")
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": NEW, "temperature": 0}
    status, whole = server.ask("/v1/chat/completions", body)
    assert status == 200 and whole["usage"]["density"] == density
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": answer}
    parts = events(server.ask("/v1/chat/completions", body | {"stream": True}).body)
    assert "".join(part["choices"][0]["delta"]["content"] for part in parts) == answer
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}


def test_answer_ends_before_a_text_that_stops_it(server, alone) -> None:
    text = topical_text(100, 3)
    answer, _ = alone(text, new=12)
    stop = answer.split()[3]
    expected = answer[: answer.index(stop)]
    for stream in (False, True):
        reply = server.complete(text, max_tokens=12, stop=["nothing", stop], stream=stream).body
        choices = [part["choices"][0] for part in events(reply)] if stream else reply["choices"]
        assert "".join(choice["text"] for choice in choices) == expected and choices[-1]["finish_reason"] == "stop"


def test_drawing_from_the_likeliest_token_alone_is_greedy_and_others_are_drawn_too(server, alone) -> None:
    text = topical_text(100, 4)
    answer, _ = alone(text)
    assert server.complete(text, temperature=1.5, top_k=1).body["choices"][0]["text"] == answer
    drawn = {server.complete(text, temperature=2).body["choices"][0]["text"] for _ in range(6)}
    assert len(drawn) > 1


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "sentence"),
    [
        ("/v1/completions", asked("w1", best=1), 400, "best", "Extra inputs"),
        ("/v1/completions", asked("w1", density=0), 400, "density", "greater than 0"),
        ("/v1/completions", asked("w1", n=2), 400, "n", "1"),
        ("/v1/completions", asked("w1", model="other"), 404, "model", "model must be tiny"),
        ("/v1/completions", asked("w1 " * 1020), 400, None, "at most the model's 1024 tokens"),
        ("/v1/completions", asked("w1", max_tokens=1024), 400, None, "at most the model's 1024 tokens"),
        ("/v1/completions", asked(" "), 400, "prompt", "at least one token"),
        ("/v1/completions", asked([1, 97]), 400, "prompt", "tokens of the model"),
        ("/v1/completions", "no json", 400, None, "JSON"),
        ("/v1/completions", {"prompt": "w1"}, 400, "model", "required"),
        ("/v1/chat/completions", {"model": "tiny", "messages": []}, 400, "messages", "at least 1"),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user"}]}, 400, None, ""),
        ("/v1/nothing", asked("w1"), 404, None, "Not Found"),
        ("/v1/models", asked("w1"), 405, None, "Not Allowed"),
    ],
)
def test_bad_request_is_refused_in_the_form_of_openai(server, path, body, status, param, sentence) -> None:
    if sentence == "":
        body = body | {"temperature": -1}  # what a template does without a content is for it to say
        param, sentence = "temperature", "greater than or equal to 0"
    found, reply = server.ask(path, body)
    assert found == status and set(reply["error"]) == {"message", "type", "param", "code"}
    assert sentence in reply["error"]["message"] and reply["error"]["type"] == "invalid_request_error"
    assert param is None or reply["error"]["param"] == param
    assert server.complete("w1 w2").status == 200


def test_models_health_and_metrics_tell_of_the_server(server) -> None:
    (listed,) = server.ask("/v1/models").body["data"]
    assert listed["id"] == "tiny" and listed["max_model_len"] == 1024
    assert server.ask("/health") == (200, {"status": "ok"})

    def counts() -> dict[str, float]:
        lines = server.ask("/metrics").body.splitlines()
        told = {line.split()[2] for line in lines if line.startswith("# TYPE")}
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert {re.sub(r"(_bucket|_sum|_count)?(\{.*)?$", "", name) for name in values} == told
        return {name: float(value) for name, value in values.items()}

    before = counts()
    density = server.complete(topical_text(300, 5)).body["usage"]["density"]
    server.complete("w1", n=3)
    after = counts()
    change = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert change['seerattn_requests_total{outcome="answered"}'] == 1
    assert change['seerattn_requests_total{outcome="refused"}'] == 1
    assert change['seerattn_tokens_total{of="prompt"}'] == 300 and change['seerattn_tokens_total{of="answer"}'] == NEW
    assert change["seerattn_prompt_density_sum"] == pytest.approx(density, abs=1e-4)
    assert after["seerattn_requests_active"] == 0


def test_key_is_asked_for_everywhere_but_of_health(folder) -> None:
    with serving(folder, key="secret") as served:
        assert served.ask("/health").status == 200
        for path, body in (("/v1/models", None), ("/metrics", None), ("/v1/completions", asked("w1"))):
            for key in (None, "other"):
                status, reply = served.ask(path, body, key=key)
                assert status == 401 and reply["error"]["type"] == "authentication_error"
            assert served.ask(path, body, key="secret").status == 200


def open_stream(port: int, **fields: Any) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """A streaming request of which the first event has come."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    body = json.dumps(asked(topical_text(50, 6), stream=True, **fields))
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    reply = connection.getresponse()
    assert reply.status == 200 and reply.readline().startswith(b"data: ")
    return connection, reply


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_goes_away_frees_its_place(folder, stream: bool) -> None:
    with serving(folder, slots=1, waiting=0) as served:
        if stream:
            connection, reply = open_stream(served.port, max_tokens=950)
        else:
            connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=SECONDS)
            body = json.dumps(asked("w1 w2 w3", max_tokens=1000))
            connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
            while not served.engine.active:
                served.ask("/health")
        status, refused = served.complete("w1 w2")
        assert status == 503 and refused["error"]["type"] == "overloaded_error"
        if stream:
            reply.close()
        connection.close()
        while (status := served.complete("w1 w2").status) == 503:
            pass
        assert status == 200
        # Each forward gives one token: the answer that nobody waits for was not written to its end.
        assert served.engine._manager.current_batch < 900
        metrics = served.ask("/metrics").body
        assert 'outcome="left"} 1' in metrics and 'outcome="answered"} 1' in metrics


def test_model_without_gates_is_served_dense(folder, alone) -> None:
    text = topical_text(300, 7)
    with serving(folder, gates=False) as served:
        body = served.complete(text).body
        assert (body["choices"][0]["text"], body["usage"]["density"]) == alone(text, 1)
        assert "density must be 1" in served.complete(text, density=0.5).body["error"]["message"]


def test_request_whose_forward_fails_is_told_and_nobody_else_notices(folder, alone, monkeypatch) -> None:
    choose, text = paged._select, topical_text(150, 8)
    expected = [alone(topical_text(100 + seed, seed))[0] for seed in range(4)]

    def choose_or_fail(selector, request, *others: Any) -> Any:
        if request.prompt == 150:
            raise ValueError("no blocks today")
        return choose(selector, request, *others)

    monkeypatch.setattr(paged, "_select", choose_or_fail)
    with serving(folder) as served, ThreadPoolExecutor(6) as pool:
        bad = [pool.submit(served.complete, text, stream=stream) for stream in (False, True)]
        good = list(pool.map(lambda seed: served.complete(topical_text(100 + seed, seed)), range(4)))
        assert [reply.body["choices"][0]["text"] for reply in good] == expected
        status, reply = bad[0].result()
        assert status == 500 and "no blocks today" in reply["error"]["message"]
        assert reply["error"]["type"] == "server_error"
        (event,) = [line for line in bad[1].result().body.split("\n\n") if line]
        assert "no blocks today" in json.loads(event.removeprefix("data: "))["error"]["message"]
        assert served.ask("/health").status == 200 and 'outcome="failed"} 2' in served.ask("/metrics").body


def test_temperature_next_to_nothing_is_greedy_and_harms_no_neighbour(folder, alone) -> None:
    """Scores over 1e-40 are infinite, and drawing from those fails."""
    texts = [topical_text(60 + seed, seed) for seed in range(4)]
    with serving(folder) as served, ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda text: served.complete(text, temperature=1e-40), texts))
    assert [reply.body["choices"][0]["text"] for reply in replies] == [alone(text)[0] for text in texts]


def fail_from(monkeypatch: pytest.MonkeyPatch, error: BaseException, batch: int) -> None:
    """Has what is done between forwards raise from some forward on, which nobody can be blamed for."""
    update = ContinuousBatchProcessor.update_batch

    def failing(self: ContinuousBatchProcessor) -> None:
        update(self)
        failing.batches += 1
        if failing.batches >= batch:
            raise error

    failing.batches = 0
    monkeypatch.setattr(ContinuousBatchProcessor, "update_batch", failing)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [RuntimeError("nothing works"), SystemExit("nothing works")], ids=["told", "silent"])
def test_failure_of_all_is_told_to_each_and_to_whoever_asks_for_health(folder, monkeypatch, error) -> None:
    fail_from(monkeypatch, error, batch=20)
    with serving(folder) as served, ThreadPoolExecutor(6) as pool:
        asks = [{"max_tokens": 500, "stream": bool(number % 2)} for number in range(6)]
        replies = list(pool.map(lambda fields: served.complete(topical_text(50, 6), **fields), asks))
        for reply, fields in zip(replies, asks):
            text = reply.body if fields["stream"] else json.dumps(reply.body)
            assert '"server_error"' in text and "[DONE]" not in text
        assert served.ask("/health") == (503, {"status": "failed"})
        status, reply = served.complete("w1 w2")
        assert status == 503 and "takes no more requests" in reply["error"]["message"]


def test_command_whose_model_fails_tells_so_and_ends_with_an_error(folder) -> None:
    code = """
import sys
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor

def failing(self):
    raise RuntimeError("nothing works")

ContinuousBatchProcessor.update_batch = failing
from seerattn.cli import main
main(sys.argv[1:])
"""
    with command(folder, "-c", code) as (process, port):
        status, reply = Served(port, None).complete("w1 w2")
        assert status == 500 and "nothing works" in reply["error"]["message"]
        told = process.stderr.read()
        assert process.wait(SECONDS) == 1 and "not the fault of one request" in told


@contextmanager
def command(folder: Path, *python: str, port: int = 0) -> Iterator[tuple[subprocess.Popen, int]]:
    """`seerattn serve` in a process of its own, once it takes requests, and its port."""
    arguments = ["--model", folder / "model", "--gates", folder / "gates-of-model", "--density", DENSITY]
    arguments += ["--name", "tiny", "--device", "cpu", "--port", port, "--cache-tokens", 8192]
    line = [sys.executable, *(python or ("-m", "seerattn")), "serve", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    try:
        yield process, next(int(found[1]) for row in process.stderr if (found := re.search(r"at http.*:(\d+)", row)))
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


def test_server_that_is_told_to_end_answers_first(folder) -> None:
    with command(folder) as (process, port):
        connection, reply = open_stream(port, max_tokens=300)
        process.send_signal(signal.SIGTERM)
        assert reply.read().decode().rstrip().endswith("data: [DONE]")
        connection.close()
        assert process.wait(SECONDS) == 0
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1)


def test_port_that_is_taken_is_told_before_the_model_is_loaded(folder, capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as stop:
        main(["serve", "--model", "nothing", "--dense", "--port", str(taken.getsockname()[1])])
    assert stop.value.code == 2 and "in use" in capsys.readouterr().err
