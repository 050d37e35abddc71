"""Tables on the terminal: as wide as they are, quick at 100,000 rows, and safe to show.

Cells hold names of files and tensors, which are a stranger's; `compeft_fl.printable` is applied to
each.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Final

from rich.cells import cell_len

from compeft_fl.printable import printable

__all__ = ["Table", "say"]

_GAP: Final = "  "
_MAX_CELL: Final = 300  # characters


def say(text: str) -> None:
    """Print a line in which a name may stand."""
    print(printable(text, _MAX_CELL))


class Table:
    """Columns of text, which stand left, and of numbers, right.

    Parameters
    ----------
    title : str or None
    columns : sequence of str
        The headers.
    left : sequence of str
        The headers of the columns of text.

    Examples
    --------
    >>> table = Table(None, ["file", "bytes"], left=["file"])
    >>> table.add_row("a.compeft", "7")
    >>> table.print()
    file       bytes
    ────────────────
    a.compeft      7
    """

    def __init__(self, title: str | None, columns: Sequence[str], left: Sequence[str]) -> None:
        self._title = None if title is None else printable(title, _MAX_CELL)
        self._left = [column in left for column in columns]
        self._rows: list[list[str]] = []
        self._widths = [0] * len(columns)
        self.add_row(*columns)

    def add_row(self, *cells: str) -> None:
        """Add a row, one cell a column."""
        row = [printable(cell, _MAX_CELL) for cell in cells]
        for index, cell in enumerate(row):
            self._widths[index] = max(self._widths[index], cell_len(cell))
        self._rows.append(row)

    def print(self) -> None:
        """Print it to stdout."""
        sys.stdout.writelines(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        if self._title is not None:
            yield self._title
        yield self._line(self._rows[0])
        yield "─" * (sum(self._widths) + len(_GAP) * (len(self._widths) - 1))
        for row in self._rows[1:]:
            yield self._line(row)

    def _line(self, row: list[str]) -> str:
        cells = []
        for cell, width, left in zip(row, self._widths, self._left, strict=True):
            blanks = (width - cell_len(cell)) * " "
            cells.append(cell + blanks if left else blanks + cell)
        return _GAP.join(cells).rstrip()
