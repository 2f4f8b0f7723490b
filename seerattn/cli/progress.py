"""The progress bar of long commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from seerattn.cli.terminal import screen
from seerattn.texts import visible


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Yields what starts a bar, given its description and total, and returns what is told of finished steps.

    One bar is seen at a time, and none is left behind.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=screen(stderr=True), transient=True
    ) as bar:

        def start(description: str, total: int) -> Callable[[int], None]:
            for task in bar.task_ids:
                bar.remove_task(task)
            task = bar.add_task(visible(description), total=total)
            return lambda done: bar.advance(task, done)

        yield start
