"""Rows of a dump's CSV with their lines; what is no CSV costs its own line only.

What is left out is counted here, by whoever leaves it out.
"""

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TextIO

from millrace import dump_rows
from millrace.dump_files import READ_ERRORS, DumpFile
from pipeline.errors import ContractError

_LINES_KEPT = 5


@dataclass
class Rejects:
    """What was left out or doubted: how much by reason, and in which lines first."""

    counts: Counter[str] = field(default_factory=Counter)
    lines: dict[str, list[int]] = field(default_factory=dict)
    #: Rows that were left out.
    rows: int = 0

    def add(self, reason: str, line: int, *, is_kept: bool = False) -> None:
        """Count a row; `is_kept` if its value was."""
        self.counts[reason] += 1
        self.rows += not is_kept
        kept = self.lines.setdefault(reason, [])
        if len(kept) < _LINES_KEPT:
            kept.append(line)


class Lines:
    """The rows of one file.

    Raises:
        ContractError: it has no usable header.
    """

    def __init__(self, file: DumpFile, rejects: Rejects) -> None:
        self._file = file
        self._rejects = rejects
        self._held = ExitStack()
        self._piped: TextIO | None = None
        try:
            if file.is_pipe:
                self._piped = self._held.enter_context(file.text())
                header = next(csv.reader(self._piped), [])
            else:
                with file.text() as text:
                    header = next(csv.reader(text), [])
        except (csv.Error, *READ_ERRORS) as error:
            raise ContractError(f"{file}: no CSV that can be read: {error}") from None
        try:
            #: Where everything is; whoever finds another header further down may change it.
            self.columns = dump_rows.columns(header)
        except ContractError as error:
            raise ContractError(f"{file}, line 1: {error.message}") from None

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield what is not empty with its line, from the first line below the header on; of a pipe only once."""
        if not self._file.is_pipe:
            with self._file.text() as text:
                next(csv.reader(text), None)
                yield from self._rows_of(text)
        elif self._piped is not None:
            piped, self._piped = self._piped, None
            yield from self._rows_of(piped)

    def _rows_of(self, file: TextIO) -> Iterator[tuple[int, list[str]]]:
        """What is not CSV is counted, and lines that a quote joins are parted again."""
        lines: list[str] = []

        def remembered() -> Iterator[str]:
            for line in file:
                lines.append(line)
                yield line

        reader = csv.reader(remembered())
        while True:
            begin = reader.line_num + 2
            lines.clear()
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error:
                yield from self._apart(begin, lines)
                continue
            except READ_ERRORS as error:
                # A gzip file that was cut off: what came before it is good.
                self._rejects.add(f"the file ends too early: {error}", begin)
                return
            if len(lines) > 1 and self._is_joined(row, lines):
                yield from self._apart(begin, lines)
            elif row:
                yield begin, row

    def _is_joined(self, row: list[str], lines: Sequence[str]) -> bool:
        """Whether it is several rows, of which one has a quote that nothing closes."""
        if len(row) != self.columns.count:
            return True
        for line in lines[1:]:
            try:
                alone = next(csv.reader([line]), [])
                if len(alone) == self.columns.count and dump_rows.moment(
                    alone[self.columns.timestamp].strip()
                ):
                    return True
            except (csv.Error, ValueError):
                continue
        return False

    def _apart(self, begin: int, lines: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        for number, line in enumerate(lines, begin):
            try:
                row = next(csv.reader([line]), [])
            except csv.Error:
                self._rejects.add("not CSV", number)
                continue
            if row:
                yield number, row
