"""``vllm serve`` with gates over HTTP: processes of its own, and the plug-in found by its entry point."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import alone
from transformers import AutoModelForCausalLM, AutoTokenizer

import seerattn
from seerattn import TokenBudget, TopK

ROOT = Path(__file__).parents[2]
REFERENCE, GATES = ROOT / "assets/reference-model", ROOT / "assets/reference-gates/best"
BOOK = ROOT / "assets/books/evaluate/harte-from-sand-hill-to-pine.txt.gz"
NEW, SECONDS = 8, 180


def ask(port: int, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as reply:
        text = reply.read()
    return json.loads(text) if text else None


@pytest.fixture(
    scope="module", params=[(1, {}), (2, {"decode_tokens": 256})], ids=["one rank", "two ranks that decode"]
)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The port of a server, the file of what it says, and what its answers are decoded by."""
    ranks, decoding = request.param
    folder = tmp_path_factory.mktemp("serve")
    # The build for CPUs has another name than the package that `vllm serve` asks for the version of.
    named = folder / "vllm-0.32.0+cpu.dist-info"
    named.mkdir()
    (named / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {"seerattn": {"gates": str(GATES), "density": 0.2, "impl": "sparse", "log": True} | decoding}
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(REFERENCE), "--port", str(port)]
    command += ["--additional-config", json.dumps(options), "--max-num-batched-tokens", "8192", "--dtype", "float32"]
    command += ["--max-model-len", "2304", "--served-model-name", "tiny", "--enforce-eager"]
    command += ["--tensor-parallel-size", str(ranks)]
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "INFO", "OMP_NUM_THREADS": "1"}
    said = folder / "said"
    with said.open("w") as file:
        own = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, env=environment, cwd=folder, **own)
    try:
        deadline = time.monotonic() + SECONDS
        while True:
            assert process.poll() is None and time.monotonic() < deadline, said.read_text()[-4000:]
            try:
                ask(port, "/health")
                break
            except OSError:
                time.sleep(0.5)
        yield port, said, None if ranks == 1 else TokenBudget(tokens=256)
    finally:
        # Its engine is a process of its own.
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_three_clients_at_once_get_the_tokens_and_the_density_of_sparse_generate(served) -> None:
    port, said, decode_policy = served
    with gzip.open(BOOK, "rt") as file:
        ids = AutoTokenizer.from_pretrained(REFERENCE)(file.read()[3000:12000])["input_ids"]
    asked = [ids[500:1200], ids[:1500], ids[300:2348]]
    model = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)
    rule = TopK(density=0.2, rule="row_share")
    gated = seerattn.attach(model, GATES, rule, decode_policy=decode_policy, impl="sparse")
    expected = [alone(gated, prompt, NEW) for prompt in asked]
    with seerattn.policy(gated, None if decode_policy is None else rule):
        assert [alone(gated, prompt, NEW) for prompt in asked] != expected

    def complete(prompt: list[int]) -> list[int]:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        return ask(port, "/v1/completions", body | {"return_token_ids": True})["choices"][0]["token_ids"]

    for _ in range(2):
        with ThreadPoolExecutor(len(asked)) as clients:
            assert list(clients.map(complete, asked)) == expected
    line = r"request (\S+): (\d+) prompt tokens(?:, (\d+) of them from the cache)?, density (\S+)"
    # Every rank tells of its own heads.
    lines = {found[0]: found[1:] for found in re.findall(line, said.read_text())}
    told = sorted((int(prompt), int(cached or 0), float(density)) for prompt, cached, density in lines.values())
    assert [prompt for prompt, _, _ in told] == [700, 700, 1500, 1500, 2048, 2048]
    answers = re.findall(r"request \S+: 7 decoded tokens, density (\S+)", said.read_text())
    # Of the requests before the last ones vLLM has said that it is done with them.
    assert len(answers) >= 3 * 2 if decode_policy else not answers
    # Page by page what was read before is found.
    assert [cached for _, cached, _ in told[1::2]] == [640, 1408, 1920] and all(0.15 < x[2] < 0.35 for x in told)
