"""How work grows from one GPU to eight: computing as measured on one, and what links carry, by their measured speed.

    python research/several_cost.py several.jsonl

Reads what `several_gpus.py` wrote (`one`, `distill` and `finetune` of one process, `links` of several) and prints a
table. For a page, docs/page_tables.py draws it by `growth`.

A prompt is shared out, so its computing is divided. In training every process has a sample of its own, so it stays. To
that is added the time of what a process is sent, as if nothing of it happened while the GPU computes; FSDP2 and DDP
hide most of it. What was measured on several stands in brackets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

from seerattn.bench.model import SIZES, Size, gate_form, random_model
from seerattn.hf.attach import attach
from seerattn.report.parts import Cell, Table, plain
from seerattn.report.render.markdown import render_table
from seerattn.results.file import read_results
from seerattn.results.record import Result
from seerattn.training.memory import own_bytes

PROCESSES = (1, 2, 4, 8)
# By the width that results name.
BY_WIDTH = {f"Llama of width {size.hidden}": size for size in SIZES.values()}


class Sent(NamedTuple):
    """Collectives of a kind: bytes of their whole tensors, of all calls together, and how many calls there are."""

    kind: str
    total: int
    calls: int

    def held(self, count: int) -> float:
        """Bytes of the whole tensors that each of so many processes has, as `links` counts them."""
        return self.total / count if self.kind == "all-to-all" else self.total

    def to_each(self, count: int) -> float:
        """Bytes that each of so many processes is sent."""
        return self.held(count) * (count - 1) / count


def main(results: Annotated[Path, typer.Argument(help="Results of several_gpus.py.")]) -> None:
    """Print how work grows."""
    (table,) = growth(read_results([results]))
    print(render_table(table))


def growth(results: Sequence[Result]) -> list[Table]:
    """Seconds of a prompt, or of a step of a sample a process, on one GPU and on several."""
    links = {(r.cell["work"], r.cell["processes"], r.cell["bytes"]): r.value for r in results if _part(r) == "links"}
    if not links:
        raise ValueError("results must hold the links of several processes, got none; run several_gpus.py links")
    body = []
    for row in results:
        if row.value is None or row.cell.get("processes") != 1 or row.what not in ("ttft_s", "step_s"):
            continue
        for way in ("tensor", "context") if _part(row) == "one" else (_part(row),):
            measured = {r.cell["processes"]: _seconds(r) for r in results if _alike(r, row, way)}
            cells = [_cell(row, way, count, links, measured) for count in PROCESSES]
            sent = sum(each.to_each(8) for each in _sent(row, way)) / 2**30
            body.append([_name(row, way), f"{sent:.2f}", *cells])
    heads = ["seconds", "GiB sent to each of 8", *map(str, PROCESSES)]
    known = sorted({count for _, count, _ in links})
    note = f"Links were measured with {', '.join(map(str, known))} processes; more are taken to be as fast as the most."
    return [plain("", heads, body, [note])]


def _part(row: Result) -> str:
    return row.cell.get("parts", "")


def _seconds(row: Result) -> float:
    """Of a prompt, or of a sample on each process."""
    return row.value * row.cell.get("processes", 1) / row.cell["batch"] if "batch" in row.cell else row.value


def _alike(row: Result, one: Result, way: str) -> bool:
    """Whether a result is that of several processes of the same work, spread this way."""
    if row.value is None or row.cell.get("processes", 1) == 1 or _part(row) != way or row.what != one.what:
        return False
    free = {"parts": "", "processes": 0, "sharded": False, "device": ""}
    return replace(row, cell=row.cell | free).key == replace(one, cell=one.cell | free).key


def _name(row: Result, way: str) -> str:
    ways = {"tensor": "a prompt by heads", "context": "a prompt by tokens", "distill": "distilling (DDP)"}
    ways |= {"finetune": "fine-tuning (FSDP2)"}
    how = "" if way == "distill" else f", {row.cell['impl']}"
    return f"{ways[way]}{how}, {row.context:,} tokens"


def _cell(row: Result, way: str, count: int, links: dict, measured: dict[int, float]) -> Cell:
    alone = _seconds(row)
    if count == 1:
        return Cell(_short(alone))
    computing = alone / count if way in ("tensor", "context") else alone
    carried = sum(each.to_each(count) / (1e9 * _rate(links, each, count)) for each in _sent(row, way))
    return Cell(_short(computing + carried), more=_short(measured[count]) if count in measured else "")


def _short(seconds: float) -> str:
    return f"{seconds:.3g}"


def _rate(links: dict[tuple[str, int, int], float], sent: Sent, count: int) -> float:
    """GB a second that a process is sent, of the calls most like these."""
    size, own = sent.held(count) / sent.calls, ((*key[1:], rate) for key, rate in links.items() if key[0] == sent.kind)
    return min((abs(n - count), abs(of - size), rate) for n, of, rate in own)[2]


def _sent(row: Result, way: str) -> Iterable[Sent]:
    """What all processes together exchange for a prompt or a step."""
    size, layers = BY_WIDTH[row.model], row.cell["layers"]
    each = torch.empty(0, dtype=getattr(torch, row.cell["dtype"])).element_size()
    if way == "tensor":
        # The sum over processes after attention and after the MLP.
        return [Sent("all-reduce", 2 * layers * row.context * size.hidden * each, 2 * layers)]
    if way == "context":
        # Queries, keys and values before attention, its output after it.
        heads = 2 * size.shape.heads + 2 * size.shape.kv_heads
        return [Sent("all-to-all", layers * row.context * heads * size.shape.head_dim * each, 4 * layers)]
    size = replace(size, layers=layers, shape=replace(size.shape, dtype=getattr(torch, row.cell["dtype"])))
    weights, gates = _bytes(size)
    if way == "distill":
        return [Sent("all-reduce", gates, layers)]
    # Weights are gathered for the forward and for the backward pass, and gradients are summed.
    whole = weights if row.kind == "dense" else weights + gates
    return [Sent("all-gather", 2 * whole, 2 * layers), Sent("reduce-scatter", whole, layers)]


def _bytes(size: Size) -> tuple[int, int]:
    """Bytes of the weights of a model, and of its gates."""
    model = random_model(size, torch.device("meta"))
    weights = own_bytes(model, 1)
    return weights, own_bytes(attach(model, gate_form("default")), 1) - weights


if __name__ == "__main__":
    typer.run(main)
