"""Progress on stderr: a bar per stage on a terminal, one line per stage elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress

Unit = Literal["bytes", "tensors"]


class Report(Protocol):
    """Tells how much of a stage is done, and, where only the work itself knows, how much there is."""

    def __call__(self, done: int, total: int | None = None, /) -> None: ...


class Stages:
    """The stages of one long job; a context manager. stdout stays free for the job's result."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._bars = _bars() if sys.stderr.isatty() else None

    def __enter__(self) -> Stages:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    @contextmanager
    def stage(self, verb: str, total: int, *, unit: Unit) -> Iterator[Report]:
        """Show one stage of `total` `unit`s while the body runs."""
        if self._bars is None:
            size = f" ({total / 1e6:.0f} MB)" if unit == "bytes" else ""
            print(f"{self.title}: {verb}{size}", file=sys.stderr, flush=True)
            yield lambda done, total=None, /: None
            return
        bars = self._bars
        task = bars.add_task(f"{self.title}: {verb}", total=total, unit=unit)
        yield lambda done, total=None, /: bars.update(task, completed=done, total=total)


def _bars() -> Progress:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class Amount(ProgressColumn):
        def render(self, task: Task) -> Text:
            done, total = int(task.completed), int(task.total or 0)
            if task.fields["unit"] == "bytes":
                return Text(f"{decimal(done)} of {decimal(total)}")
            return Text(f"{done} of {total} {task.fields['unit']}")

    columns = (TextColumn("{task.description}"), BarColumn(), Amount(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))
