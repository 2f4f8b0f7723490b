"""Load on `seerattn serve`: many requests at once, some of them left, some senseless, and a server that is killed.

    make load-test                                           # 200 requests of 100 to 8,000 tokens, 15 minutes
    python research/serve_load.py --requests 20 --longest 800 --at-once 8
    python research/serve_load.py --output outputs/serve-load.json   # where its record goes

A server of the reference model, in a process of its own, gets requests in a seeded random order, as many at once as are
told. What must hold, else the exit code is 1:

- every request that waits for its answer gets one, which is that of `generate` with the same gates alone; an answer
  that turns at two next tokens whose scores differ by less than they are rounded is counted apart, as a tie;
- its density is the one that `record_density` counts of it alone;
- requests that make no sense are refused in OpenAI's form, and clients that go away free their place;
- memory does not grow: what the process holds after all of it is at most what it held after the first half, a
  twentieth more and 16 MiB; both times it is idle;
- ended by SIGKILL in the middle, all clients are told by their connection; another one on the same port answers as
  before, and ends by SIGTERM with exit code 0.
"""

from __future__ import annotations

import gzip
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Annotated, Any, Literal, NamedTuple

import torch
import typer
from load_requests import NAME, SECONDS, Asked, Outcome, ask, make_load
from transformers import AutoModelForCausalLM, AutoTokenizer

import seerattn
from seerattn.cli.terminal import print_table
from seerattn.results.environment import environment
from seerattn.saving import write_whole

ROOT = Path(__file__).parents[1]
MODEL, GATES = ROOT / "assets/reference-model", ROOT / "assets/reference-gates/best"
BOOK = ROOT / "assets/books/evaluate/harte-from-sand-hill-to-pine.txt.gz"
DENSITY, CACHE_TOKENS = 0.2, 32768
# Two scores of fp32 that another order of sums can turn around.
TIE = 1e-3


class Alone(NamedTuple):
    """What a request gets alone."""

    text: str
    tokens: list[int]
    density: float


class Server:
    """`seerattn serve` in a process of its own."""

    def __init__(self, *, port: int = 0, slots: int = 8) -> None:
        options = {"--model": MODEL, "--gates": GATES, "--density": DENSITY, "--name": NAME, "--device": "cpu"}
        options |= {"--port": port, "--slots": slots, "--batch-tokens": 2048, "--cache-tokens": CACHE_TOKENS}
        options |= {"--impl": "sparse"}
        line = [sys.executable, "-m", "seerattn", "serve", *(str(word) for pair in options.items() for word in pair)]
        self._process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        self._told: list[str] = []
        for row in self._process.stderr:
            self._told.append(row)
            if found := re.search(r"answers at http://[^:]+:(\d+)", row):
                self.port = int(found[1])
                break
        else:
            raise RuntimeError("the server did not start: " + "".join(self._told))
        # A pipe that nobody reads fills up, and then the server waits for it.
        self._reader = threading.Thread(target=lambda: self._told.extend(self._process.stderr), daemon=True)
        self._reader.start()

    @property
    def told(self) -> str:
        """What it has written."""
        return "".join(self._told)

    def memory(self, name: Literal["VmRSS", "VmHWM"] = "VmRSS") -> float:
        """MiB that the process holds, or held at most."""
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) / 1024

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of a route."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        connection.request("GET", path)
        reply = connection.getresponse()
        text = reply.read().decode()
        connection.close()
        return reply.status, text

    def counts(self) -> dict[str, int]:
        """Requests by how they ended, and those that are under way."""
        text = self.get("/metrics")[1]
        found = dict(re.findall(r'requests_total\{outcome="(\w+)"\} (\d+)', text))
        active = re.search(r"^seerattn_requests_active (\d+)", text, re.MULTILINE)[1]
        return {name: int(count) for name, count in (found | {"active": active}).items()}

    def wait_until_idle(self) -> None:
        """Returns once no request is under way."""
        until = time.monotonic() + SECONDS
        while self.counts()["active"]:
            if time.monotonic() > until:
                raise RuntimeError("the server must come to rest, got requests that never end")
            time.sleep(0.1)

    def end(self, sign: signal.Signals) -> int:
        """Sends a signal and returns the exit code."""
        self._process.send_signal(sign)
        code = self._process.wait(SECONDS)
        self._reader.join()
        self._process.stderr.close()
        return code


@contextmanager
def serving(**options: Any) -> Iterator[Server]:
    """A server that is gone afterwards, whatever happens."""
    server = Server(**options)
    try:
        yield server
    finally:
        if server._process.poll() is None:
            server.end(signal.SIGKILL)


class Oracle:
    """What `generate` says to a request alone."""

    def __init__(self) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(MODEL)
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        self._model = seerattn.attach(model, GATES, None, impl="sparse")

    def book(self) -> list[int]:
        """Tokens of a book."""
        return self._tokenizer(gzip.open(BOOK, "rt").read(), verbose=False)["input_ids"]

    def __call__(self, asked: Asked) -> Alone:
        density = DENSITY if asked.density is None else asked.density
        policy = None if density == 1 else seerattn.TopK(density=density)
        ids = torch.tensor([asked.tokens])
        with seerattn.policy(self._model, policy), seerattn.record_density(self._model) as meter:
            found = self._model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=asked.new, do_sample=False
            )[0, ids.shape[1] :].tolist()
        text = self._tokenizer.decode(found, skip_special_tokens=True)
        return Alone(text, found, meter.mean() if meter.layers else 1.0)

    def is_tie(self, asked: Asked, alone: Alone, text: str) -> bool:
        """Whether an answer goes another way where two tokens are as likely as one another."""
        density = DENSITY if asked.density is None else asked.density
        policy = None if density == 1 else seerattn.TopK(density=density)
        said = [self._tokenizer.decode(alone.tokens[: n + 1]).rstrip("\ufffd") for n in range(len(alone.tokens))]
        at = next((n for n, begin in enumerate(said) if not text.startswith(begin)), None)
        if at is None:
            return False
        with seerattn.policy(self._model, policy):
            ids = torch.tensor([asked.tokens])
            scores = self._model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=at + 1, do_sample=False,
                return_dict_in_generate=True, output_logits=True,
            ).logits[at]  # fmt: skip
        best = scores[0].topk(2).values
        return float(best[0] - best[1]) < TIE


def judge(asked: Asked, outcome: Outcome, oracle: Oracle) -> str:
    """In a word, what came of a request."""
    if asked.kind == "left":
        # An answer may have been there before its client left.
        return "left" if outcome.status in (-1, 200) else f"left, status {outcome.status}"
    if asked.kind == "senseless":
        is_right = outcome.status == asked.status and outcome.whole
        return "refused" if is_right else f"senseless, status {outcome.status} for {asked.status}"
    if outcome.status != 200 or not outcome.whole:
        return f"lost, status {outcome.status}"
    alone = oracle(asked)
    if outcome.text != alone.text:
        return "tie" if oracle.is_tie(asked, alone, outcome.text) else "another answer"
    return "equal" if abs(outcome.density - alone.density) < 1e-9 else "another density"


def run(
    *, requests: int = 200, shortest: int = 100, longest: int = 8000, at_once: int = 16, seed: int = 0
) -> dict[str, Any]:
    """The record of one load; ``failures`` says what did not hold."""
    torch.set_num_threads(1)
    oracle = Oracle()
    load = make_load(oracle.book(), requests, shortest=shortest, longest=longest, seed=seed)
    record: dict[str, Any] = {"what": "serve_load", "requests": requests, "shortest": shortest, "longest": longest}
    record |= {"at_once": at_once, "seed": seed, "tokens": sum(len(one.tokens) for one in load)}
    record |= environment("cpu")
    failures: list[str] = []
    with serving() as server, ThreadPoolExecutor(at_once) as pool:
        # Enough to fill the cache: from here on no page is touched for the first time.
        full = [Asked(n, "whole", oracle.book()[n : n + longest], 1) for n in range(CACHE_TOKENS // longest + 1)]
        list(pool.map(lambda one: ask(server.port, one), full[: 4 * at_once]))
        server.wait_until_idle()
        held, counts, outcomes = [server.memory()], server.counts(), []
        begin = time.perf_counter()
        for half in (load[: requests // 2], load[requests // 2 :]):
            outcomes += pool.map(lambda one: ask(server.port, one), half)
            server.wait_until_idle()
            held.append(server.memory())
        record["seconds"] = time.perf_counter() - begin
        health = server.get("/health")[0]
        names = ("with a full cache", "after the first half", "after all", "at most")
        record["mib"] = dict(zip(names, [*held, server.memory("VmHWM")]))
        record["counted"] = {name: count - counts[name] for name, count in server.counts().items()}
        failures += [] if health == 200 else [f"/health says {health}"]
        failures += _check_kill(server, load, oracle, record)
    verdicts = Counter(judge(asked, outcome, oracle) for asked, outcome in zip(load, outcomes))
    waited = [outcome.seconds for asked, outcome in zip(load, outcomes) if asked.kind in ("whole", "stream")]
    record |= {"verdicts": dict(verdicts), "answer_s": quantiles(waited, n=20)[9::9]}
    failures += [f"{name}: {count}" for name, count in verdicts.items() if name not in _RIGHT]
    bound = 1.05 * held[1] + 16
    failures += [f"{held[2]:.0f} MiB are held, {bound:.0f} were allowed"] if held[2] > bound else []
    answered = sum(asked.kind in ("whole", "stream") for asked in load)
    given = record["counted"]["answered"] + record["counted"]["left"]
    expected = answered + sum(asked.kind == "left" for asked in load)
    failures += [f"the server counts {given} of {expected} answered or left"] if given != expected else []
    return record | {"failures": failures}


_RIGHT = ("equal", "tie", "left", "refused")


def _check_kill(server: Server, load: list[Asked], oracle: Oracle, record: dict[str, Any]) -> list[str]:
    """Kills a server in the middle of its work, begins another one at its port, and ends that one."""
    some = [asked for asked in load if asked.kind in ("whole", "stream")][:8]
    failures = []
    with ThreadPoolExecutor(len(some)) as pool:
        under_way = [pool.submit(ask, server.port, asked) for asked in some]
        while not server.counts()["active"]:
            time.sleep(0.01)
        server.end(signal.SIGKILL)
        broken = Counter(one.result().status for one in under_way)
    record["killed"] = {"told": broken[0], "answered before": broken[200]}
    failures += [f"after SIGKILL: {dict(broken)}"] if set(broken) - {0, 200} else []
    begin = time.perf_counter()
    with serving(port=server.port) as again:
        record["restart_s"] = time.perf_counter() - begin
        verdicts = Counter(judge(asked, ask(again.port, asked), oracle) for asked in some[:3])
        failures += [f"after a restart: {name}" for name in verdicts if name not in _RIGHT]
        code = again.end(signal.SIGTERM)
        failures += [f"exit code {code} after SIGTERM"] if code else []
    with socket.create_server(("127.0.0.1", server.port)):
        pass
    return failures


def main(
    requests: Annotated[int, typer.Option(help="Requests of the load.", min=20)] = 200,
    shortest: Annotated[int, typer.Option(help="Tokens of the shortest prompt.", min=2)] = 100,
    longest: Annotated[int, typer.Option(help="Tokens of the longest prompt.", max=8000)] = 8000,
    at_once: Annotated[int, typer.Option(help="Clients at once.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Of the load.")] = 0,
    output: Annotated[Path | None, typer.Option(help="File of the record.")] = None,
) -> None:
    """Put load on a server of the reference model, and tell what came of every request."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    record = run(requests=requests, shortest=shortest, longest=longest, at_once=at_once, seed=seed)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, json.dumps(record, indent=1) + "\n")
    verdicts = sorted(record["verdicts"].items())
    print_table(["what came of a request", "how often"], [[name, str(count)] for name, count in verdicts])
    mib = {name: f"{value:.0f} MiB" for name, value in record["mib"].items()}
    print_table(["memory", "held"], [[name, value] for name, value in mib.items()])
    print(f"{record['tokens']:,} tokens in {record['seconds']:.0f} s; restarted in {record['restart_s']:.1f} s")
    for failure in record["failures"]:
        print(f"failed: {failure}")
    raise typer.Exit(int(bool(record["failures"])))


if __name__ == "__main__":
    typer.run(main)
