"""A progress bar on a terminal, nothing elsewhere."""

import sys
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


class Progress:
    """Shows count, rate and remaining time on stderr while it is a terminal.

    Args:
        title: What is being done.
        items: Makes an iterator whose length is the total; counted in a thread, as that may take minutes. None:
            nobody knows the total.
        limit: The total is at most this.
    """

    def __init__(
        self, title: str, items: Callable[[], Iterator[object]] | None, limit: int | None = None
    ) -> None:
        self._title = title
        self._items = items
        self._limit = limit
        self._bar: RichProgress | None = None
        self._ended = threading.Event()

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import (
                Progress as RichProgress,
            )

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("remaining"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[failed]}", style="red"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self._title, total=None, rate="", failed="")
            self._bar.start()
            if self._items is not None:
                threading.Thread(target=self._count, args=(self._items,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.stop()

    def advance(self, failed: int = 0, count: int = 1) -> None:
        """Count items that are done."""
        if self._bar is not None:
            speed = self._bar.tasks[0].speed
            self._bar.update(
                self._task,
                advance=count,
                rate=f"{speed:,.0f}/s" if speed else "",
                failed=f"{failed:,} failed" if failed else "",
            )

    def _count(self, items: Callable[[], Iterator[object]]) -> None:
        total = 0
        for _ in items():
            total += 1
            if self._ended.is_set() or total == self._limit:
                break
        if self._bar is not None:
            self._bar.update(self._task, total=total)
