"""`seerattn bench`: speed and memory on the user's own device, each appending its results to one file of JSON lines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import typer

from seerattn.bench.attention import AttentionBench
from seerattn.bench.attention_map import MapBench
from seerattn.bench.crossover import CrossoverBench, save_table
from seerattn.bench.decode import DecodeBench
from seerattn.bench.distill import DistillBench
from seerattn.bench.finetune import FinetuneBench
from seerattn.bench.options import Bench, Measuring, ModelBench
from seerattn.bench.serve import ServeBench
from seerattn.bench.session import Session, shown
from seerattn.bench.ttft import TTFTBench
from seerattn.cli.options import from_options
from seerattn.cli.terminal import print_table, say
from seerattn.hf.eval_model import choose_device
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
@from_options
def attention(bench: AttentionBench, measuring: Measuring) -> None:
    """Time one attention layer: dense, sparse with random blocks, and gate with selection.

    The report draws the speed-up against sparsity and the breakdown of the time from it.
    """
    _measure(bench, measuring)


@app.command("map")
@from_options
def attention_map(bench: MapBench, measuring: Measuring) -> None:
    """Time attention that also emits the map gates learn from, and count its memory, beside dense attention."""
    _measure(bench, measuring)


@app.command()
@from_options
def crossover(bench: CrossoverBench, measuring: Measuring) -> None:
    """Measure from which length and density on sparse attention pays on this GPU, for impl="auto".

    The table goes to the user's cache folder, where every attached model finds it.
    """
    session = _session(measuring)
    path = bench.place(session)
    found = bench.run(session, bench.subject(measuring.torch_dtype(session.device)))
    _print_crossover(found)
    if found["rows"]:
        save_table(found, path)
        say(f"the table is in {path}")
    _finish(session, None, measuring)


@app.command()
@from_options
def ttft(bench: TTFTBench, measuring: Measuring) -> None:
    """Time the prefill of a whole model: dense, and with gates at several densities."""
    _measure(bench, measuring)


@app.command()
@from_options
def decode(bench: DecodeBench, measuring: Measuring) -> None:
    """Time tokens that a whole model decodes behind long caches: dense, and with gates at several densities."""
    _measure(bench, measuring)


@app.command()
@from_options
def serve(bench: ServeBench, measuring: Measuring) -> None:
    """Time many prompts at once through the engine of `seerattn serve`: dense, and with gates at several densities."""
    _measure(bench, measuring)


@app.command()
@from_options
def distill(bench: DistillBench, measuring: Measuring) -> None:
    """Time steps of gate distillation beside plain forwards of the same model, and what the paper's recipe takes."""
    _measure(bench, measuring)


@app.command()
@from_options
def finetune(bench: FinetuneBench, measuring: Measuring) -> None:
    """Time fine-tuning with sparse attention beside dense: one layer, and whole steps without the optimizer."""
    _measure(bench, measuring)


def _measure(bench: Bench, measuring: Measuring) -> None:
    """Runs a benchmark and shows its results."""
    session = _session(measuring)
    subject = bench.subject(measuring.torch_dtype(session.device))
    if isinstance(bench, ModelBench) and subject.layers != subject.whole:
        say(f"measuring {subject.layers} of {subject.whole} layers")
    _finish(session, bench.run(session, subject), measuring)


def _session(measuring: Measuring) -> Session:
    device = choose_device(measuring.device)
    return Session(device, ResultsFile(measuring.output, device), say, time_limit=measuring.time_limit or None)


def _finish(session: Session, rows: list[Result] | None, measuring: Measuring) -> None:
    """Prints what was measured, what was not, and exits with 1 if something failed."""
    if rows is not None:
        _print_results(rows)
    if measuring.output is not None and measuring.output.exists():
        say(f"results are in {measuring.output}")
    if session.left_out:
        say(f"{len(session.left_out)} cells were left out for the time limit; run again to measure them")
    for failure in session.failures:
        say(f"failed: {failure}")
    if session.failures:
        raise typer.Exit(1)
    if rows == [] and not session.left_out:
        raise ValueError("nothing could be measured; the reasons are above")


def _print_results(rows: list[Result]) -> None:
    """A line for each variant, with its quantities beside each other."""
    lines: dict[tuple, list[Result]] = {}
    for row in rows:
        cell = {name: value for name, value in row.cell.items() if name not in ("device", "dtype", "clock")}
        lines.setdefault((row.context, row.name, row.density, str(cell)), []).append(row)
    heads = ("tokens", "what", "impl", "blocks", "lists", "density", "realised", "measured")
    body = []
    for found in lines.values():
        row = found[0]
        name = {"dense": "dense", "random": "sparse, random blocks"}.get(row.method, f"gate {row.name}")
        if row.cell.get("map"):
            name = "dense with the map"
        targets = [f"{row.cell['target_share']:.0%} of the targets"] if "target_share" in row.cell else []
        chunks = [f"chunks of {row.cell['chunk']:,}"] if "chunk" in row.cell else []
        chunks += [f"{row.cell['at_once']} at once"] if "at_once" in row.cell else []
        chunks += [f"{row.cell['batch']} at a time, by {row.cell['launch']}"] if row.what == "decode_ms" else []
        blocks = f"{row.cell['block_q']}x{row.cell['block_k']}" if "block_q" in row.cell else ""
        body.append(
            [
                f"{row.context:,}",
                ", ".join([name, *([row.cell["work"]] if "work" in row.cell else []), *targets, *chunks]),
                row.cell["impl"],
                blocks,
                f"per {row.cell['share']}" if "share" in row.cell else "",
                "" if row.density is None else f"{row.density:g}",
                "" if row.realised_density is None else f"{row.realised_density:.3f}",
                ", ".join([*map(shown, found), *_speed_up(found, rows)]),
            ]
        )
    print_table(heads, body, texts=heads)


# What is compared with dense runs of as many sequences, and how the comparison is worded.
_COMPARED = {"serve_first_s": "times as soon as dense", "decode_ms": "times as fast as dense"}


def _speed_up(found: list[Result], rows: Iterable[Result]) -> list[str]:
    """How much sooner a first token comes, or any other one, than densely."""
    (row,) = [one for one in found if one.what in _COMPARED] or [None]
    if row is None or row.method == "dense" or row.value is None:
        return []

    def asked(one: Result) -> tuple:
        return one.what, one.context, one.model, one.cell.get("at_once"), one.cell.get("batch")

    dense = [one.value for one in rows if one.method == "dense" and asked(one) == asked(row) and one.value]
    return [f"{min(dense) / row.value:.2f} {_COMPARED[row.what]}"] if dense else []


def _print_crossover(found: dict[str, Any]) -> None:
    _print_rows("tokens", found["rows"], found.get("host_ms", 0.0))
    if "decode_rows" in found:
        say(f"one token of every sequence; the host takes {found['decode_host_ms']:.2f} ms for a sparse layer of it")
        _print_rows("keys", found["decode_rows"], found["decode_host_ms"])


def _print_rows(unit: str, rows: list[dict[str, Any]], host_ms: float) -> None:
    densities = rows[0]["sparse_ms"] if rows else {}
    heads = [unit, "dense ms", "gate + selection ms", *(f"sparse {d} ms" for d in densities), "pays up to density"]
    body = []
    for row in rows:
        sparse = {d: max(row["overhead_ms"] + ms, host_ms) for d, ms in row["sparse_ms"].items()}
        pays = [d for d, ms in sparse.items() if ms < row["dense_ms"]]
        times = [row["dense_ms"], row["overhead_ms"], *row["sparse_ms"].values()]
        body.append([f"{row['tokens']:,}", *(f"{ms:.3f}" for ms in times), max(pays, key=float, default="never")])
    print_table(heads, body)
