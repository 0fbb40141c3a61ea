"""What the terminal shows: tables that never break a number, progress on stderr, short numbers."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

PATIENCE_SECONDS = 0.7
"""Nothing moves on the screen for what takes less."""

GAP = 2


def stdout() -> Console:
    return Console(highlight=False, markup=False, emoji=False)


def stderr() -> Console:
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


@dataclass(frozen=True)
class Column:
    """A column of short cells. An `optional` one is left out where the terminal is too narrow."""

    title: str
    right: bool = False
    optional: bool = False


def print_table(
    console: Console,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    styles: Sequence[str] | None = None,
) -> None:
    """The table, or where it is too wide several below each other, each with the first column."""
    widths = [
        max([cell_len(column.title), *(cell_len(row[index]) for row in rows)])
        for index, column in enumerate(columns)
    ]
    needed = widths[0]
    kept = [0]
    for index in range(1, len(columns)):
        if not columns[index].optional:
            needed += GAP + widths[index]
    for index in range(1, len(columns)):
        if columns[index].optional:
            if needed + GAP + widths[index] > console.width:
                continue
            needed += GAP + widths[index]
        kept.append(index)
    chunks, used = [[0]], widths[0]
    for index in kept[1:]:
        if used + GAP + widths[index] > console.width and len(chunks[-1]) > 1:
            chunks.append([0])
            used = widths[0]
        chunks[-1].append(index)
        used += GAP + widths[index]
    for number, chunk in enumerate(chunks):
        table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
        for index in chunk:
            table.add_column(
                Text(columns[index].title),
                justify="right" if columns[index].right else "left",
                no_wrap=True,
                min_width=widths[index],
            )
        for place, row in enumerate(rows):
            style = styles[place] if styles else ""
            table.add_row(*(Text(row[index]) for index in chunk), style=style or None)
        if number:
            console.print()
        console.print(table, crop=False, overflow="ignore")


def print_pairs(
    console: Console, pairs: Iterable[tuple[str, str]], *, style: str = "", indent: int = 0
) -> None:
    """A term and a text that may be long: it wraps beside the term, or on a narrow screen below."""
    listed = list(pairs)
    if not listed:
        return
    if max(cell_len(term) for term, _ in listed) > console.width // 3:
        for term, text in listed:
            console.print(Padding(Text(term, style=style), (0, 0, 0, indent)))
            console.print(Padding(Text(text), (0, 0, 0, indent + 2)))
        return
    grid = Table.grid(padding=(0, GAP, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for term, text in listed:
        grid.add_row(Text(term, style=style), Text(text))
    console.print(Padding(grid, (0, 0, 0, indent), expand=False))


def print_heading(console: Console, text: str) -> None:
    console.print()
    console.print(Text(text, style="bold"))


class Teller:
    """Progress of a comparison: redrawn only when told, so that drawing never disturbs a timing."""

    def __init__(self, console: Console, enabled: bool) -> None:
        self._enabled = enabled
        self._started = time.monotonic()
        self._drawn = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task("", total=1.0)
        self._live = False

    def __call__(self, what: str, share: float) -> None:
        now = time.monotonic()
        if not self._enabled or now - self._started < PATIENCE_SECONDS or now - self._drawn < 0.1:
            return
        if not self._live:
            self._bar.start()
            self._live = True
        self._drawn = now
        self._bar.update(self._task, description=what, completed=min(1.0, share))
        self._bar.refresh()

    def stop(self) -> None:
        if self._live:
            self._bar.stop()


@contextmanager
def telling(as_json: bool) -> Iterator[Teller]:
    """A `Teller` on stderr, which stays silent for JSON and where stderr is no terminal."""
    console = stderr()
    teller = Teller(console, console.is_terminal and not as_json)
    try:
        yield teller
    finally:
        teller.stop()


@contextmanager
def waiting(what: str, as_json: bool) -> Iterator[None]:
    """A spinner on stderr for work that cannot tell how far it is, once it takes long."""
    console = stderr()
    if as_json or not console.is_terminal:
        yield
        return
    spinner = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), console=console, transient=True
    )
    spinner.add_task(what, total=None)
    gate, over = threading.Lock(), False

    def show() -> None:
        with gate:
            if not over:
                spinner.start()

    timer = threading.Timer(PATIENCE_SECONDS, show)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with gate:
            over = True
            spinner.stop()


def prepare_streams() -> None:
    """A terminal whose encoding lacks a character shows another instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


# --- short numbers -------------------------------------------------------------------------------


def three_digits(value: float) -> str:
    """About three digits: 1.23, 12.3, 123, 12,345."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{three_digits(seconds * 1e6)} µs"
    if seconds < 1:
        return f"{three_digits(seconds * 1e3)} ms"
    return f"{three_digits(seconds)} s"


def size_text(size: int | None) -> str:
    if size is None:
        return ""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{size} B" if unit == "B" else f"{three_digits(value)} {unit}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
