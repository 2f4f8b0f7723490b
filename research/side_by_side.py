"""An experiment in several processes that share one GPU, a method each: models this small are bound by the host.

    python research/side_by_side.py research/experiments/smollm2.yaml --jobs 8 --time-limit 500 --output outputs/smollm2
    seerattn report outputs/smollm2/results.jsonl --output outputs/smollm2/report

It does what `seerattn eval --config` does, faster, and takes no times. Dense attention comes first, since all others
are compared with it. A method whose gates or plan are missing fails with that sentence, and the rest goes on. The same
call continues what was ended, by ``--time-limit`` or otherwise; ``--begin`` takes results of an earlier one.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from worker_pool import Job, WorkerPool

from seerattn.cli import main as seerattn
from seerattn.eval.experiment import Experiment
from seerattn.results.file import read_results
from seerattn.results.record import Result, to_line
from seerattn.saving import write_whole

DENSE = "dense"


def measure(arguments: list[str], part: Path, begin: list[Path], done: Path | None) -> None:
    """Measures one method, going on with what is known; ``done`` tells others that they may begin."""
    if begin and not part.exists():
        write_results(part, begin)
    ended = False
    try:
        seerattn([*arguments, "--output", str(part)])
    except SystemExit as end:
        ended = not end.code
        raise
    finally:
        # Cells of dense attention that failed are missed by nobody but the report, and tasks of decoding have none.
        if done is not None and (ended or part.exists()):
            done.write_text("")


def write_results(path: Path, sources: list[Path]) -> None:
    """Puts results of several files together, of the same cell the first one."""
    found: dict[str, Result] = {}
    for result in read_results([source for source in sources if source.exists()]):
        found.setdefault(result.key, result)
    write_whole(path, "".join(map(to_line, found.values())))


def main(
    config: Annotated[Path, typer.Argument(help="Experiment, a YAML file.")],
    output: Annotated[Path, typer.Option(help="Folder of results and logs.")],
    jobs: Annotated[int, typer.Option(help="Processes at a time.", min=1)] = 8,
    only: Annotated[list[str], typer.Option(help="A method or task of this name alone; may be repeated.")] = [],  # noqa: B006
    limit: Annotated[int, typer.Option(help="At most so many documents in each task; 0 for all.", min=0)] = 0,
    contexts: Annotated[str, typer.Option(help="Other contexts than the experiment's, with commas.")] = "",
    begin: Annotated[list[Path], typer.Option(help="Results that are not measured again; may be repeated.")] = [],  # noqa: B006
    time_limit: Annotated[float, typer.Option(help="Seconds after which all processes are ended; 0 for none.")] = 0.0,
) -> None:
    """Measure an experiment, one process a method, and put the results together in OUTPUT/results.jsonl."""
    start = time.monotonic()
    experiment = Experiment.from_file(config).keep(only)
    tasks = [name for name in only if name not in map(str, experiment.methods)]
    arguments = ["eval", "--config", str(config), "--limit", str(limit)]
    arguments += ["--contexts", contexts] if contexts else []
    parts, first = output / "parts", output / "parts" / "dense.done"
    parts.mkdir(parents=True, exist_ok=True)
    work = []
    for method in map(str, experiment.methods):
        part = parts / f"{method.replace(' ', '-')}.jsonl"
        own = [*arguments, *(word for name in (method, *tasks) for word in ("--only", name))]
        known = list(begin) if method == DENSE else [*begin, parts / f"{DENSE}.jsonl"]
        run = partial(measure, own, part, known, first if method == DENSE else None)
        work.append(Job(method, run, output / "logs" / f"{part.stem}.txt", None if method == DENSE else first))
    pool = WorkerPool(work, at_once=jobs, gpus=torch.cuda.device_count())
    pool.work(start + time_limit if time_limit else float("inf"))
    write_results(output / "results.jsonl", [*begin, *sorted(parts.glob("*.jsonl"))])
    left = [job.name for job in (*pool.waiting, *(worker.job for worker in pool.working))]
    print(f"{time.monotonic() - start:.0f} s; failed: {', '.join(pool.failed) or 'none'}", flush=True)
    if left:
        print(f"unfinished: {', '.join(left)}; the same call continues", flush=True)
    if left or pool.failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
