"""`seerattn generate`: a text in, what the model says to it out."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from transformers.generation.streamers import BaseStreamer

from seerattn.cli.options import from_options
from seerattn.cli.terminal import say
from seerattn.hf.decode_graph import decode_graphs, fits_graphs
from seerattn.hf.eval_model import Loading
from seerattn.hf.meters import record_density
from seerattn.hf.placement import execution_device
from seerattn.options import check_options, option
from seerattn.serve.model import Answering
from seerattn.texts import read_decompressed, visible


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a model is to answer.

    Attributes:
        prompt: the text itself.
        file: or the file that holds it; without either it is read from stdin.
        max_new_tokens: of the answer at most.
        chat: whether the text is what a user says in a chat.
        spread: whether the layers are dealt out to all GPUs, where one has no room for the model.
    """

    prompt: str = option("", help="The text; default: what comes from --file or stdin.")
    file: Path | None = option(None, help="File of the text, also compressed.")
    max_new_tokens: int = option(256, help="Tokens of the answer at most.", low=1)
    chat: bool = option(False, help="Ask in a chat, by the chat template of the model.")
    spread: bool = option(False, help="Deal the layers out to all GPUs, one after the other, then to the host.")

    def __post_init__(self) -> None:
        check_options(self)
        if self.prompt and self.file is not None:
            raise ValueError("one of prompt and file must be given, got both")

    def text(self) -> str:
        """The text.

        Raises:
            ValueError: it is no text, or none comes.
        """
        if self.prompt:
            return self.prompt
        if self.file is None and sys.stdin.isatty():
            raise ValueError("a text must come by prompt, file or stdin, got none")
        held = sys.stdin.buffer.read() if self.file is None else read_decompressed(self.file)
        try:
            return held.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.file or 'stdin'} must hold UTF-8 text, got other bytes: {error}") from error


@from_options
def generate(answering: Answering, asked: Asked, loading: Loading) -> None:
    """Answer a text: --prompt, --file or stdin in, the answer on stdout, what it took on stderr.

    The prompt is read sparsely. The answer is written densely unless --decode-tokens or the gates say otherwise, always
    by the most likely token, and on a GPU by a CUDA graph where the model allows it.
    """
    text = asked.text()
    loaded = answering.load(loading, spread=asked.spread)
    tokens = loaded.tokens_of_chat([{"role": "user", "content": text}]) if asked.chat else loaded.tokens_of(text)
    loaded.check_room(len(tokens), asked.max_new_tokens)
    ids, clock = torch.tensor([tokens], device=execution_device(loaded.model)), _Clock()
    options: dict[str, Any] = {}
    with ExitStack() as stack:
        if fits_graphs(loaded.model):
            stack.enter_context(decode_graphs(loaded.model))
            options["cache_implementation"] = "static"
        meter = stack.enter_context(record_density(loaded.model))
        found = loaded.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=asked.max_new_tokens,
            do_sample=False,
            streamer=clock,
            **options,
        )
    new = found[0, len(tokens) :].tolist()
    answer = loaded.text_of(new)
    # What a model says may hold signs that a terminal obeys.
    typer.echo("\n".join(map(visible, answer.split("\n"))) if sys.stdout.isatty() else answer)
    density = f"density {meter.mean():.3f}" if meter.layers else "dense"
    decoded = f" (density {meter.decode.mean():.3f})" if meter.decode.layers else ""
    read = f"{len(tokens)} tokens read in {clock.reading:.2f} s ({density})"
    say(f"{read}, {len(new)} written in {clock.writing:.2f} s{decoded}")


class _Clock(BaseStreamer):
    """Takes the time up to the first token of the answer, and from there."""

    def __init__(self) -> None:
        self._times = [time.perf_counter()]

    def put(self, value: Any) -> None:
        # The first is the prompt itself; what comes is on the host, so nothing is left to wait for.
        self._times.append(time.perf_counter())

    def end(self) -> None:
        """There is nothing to end."""

    @property
    def reading(self) -> float:
        return self._times[2] - self._times[0]

    @property
    def writing(self) -> float:
        return self._times[-1] - self._times[2]
