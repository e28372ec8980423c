"""Progress bars with rate and time left."""

import contextlib
from collections.abc import Callable, Generator, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextlib.contextmanager
def bars(
    console: Console, nbytes: int, phases: Sequence[str]
) -> Generator[tuple[Callable[[int], None], ...]]:
    """Shows a bar for each phase on a terminal; nothing in a pipe.

    Yields:
        For each phase, what is to be called with the bytes done since the last call.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    disable = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=disable) as shown:
        yield tuple(_step(shown, shown.add_task(phase, total=nbytes, start=False)) for phase in phases)


def _step(shown: Progress, task: TaskID) -> Callable[[int], None]:
    def step(done: int) -> None:
        shown.start_task(task)
        shown.update(task, advance=done)

    return step
