"""What the terminal shows: tables that never break a number, progress on stderr, short numbers."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from unirt.backend import BuildStep

PATIENCE_SECONDS = 0.7
"""Nothing moves on the screen for what takes less."""

GAP = 2

CONTROLS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)], "\N{REPLACEMENT CHARACTER}")
SAFE = {code: text for code, text in CONTROLS.items() if chr(code) not in "\n\t"}


def safe(text: str) -> str:
    """The text without what a terminal would obey: names and messages come from strangers."""
    return text.translate(SAFE)


class SafeConsole(Console):
    """Shows control characters of texts instead of sending them; its own styles stay."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(safe(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        leave_quietly()


def leave_quietly() -> NoReturn:
    """The reader (`| head`) has enough. Python would complain again when it flushes stdout."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    raise SystemExit(0)


def stdout() -> Console:
    return SafeConsole(highlight=False, markup=False, emoji=False)


def stderr() -> Console:
    return SafeConsole(stderr=True, highlight=False, markup=False, emoji=False)


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
    # A line break in a name would break the table.
    rows = [[cell.translate(CONTROLS) for cell in row] for row in rows]
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
    listed = [(term.translate(CONTROLS), safe(text)) for term, text in pairs]
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


class _Spinner:
    """Turns by a thread of rich's own while something takes long that cannot tell how far it is."""

    def __init__(self, console: Console, what: str) -> None:
        self._shown = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
        )
        self._task = self._shown.add_task(what, total=None)
        self._gate, self._over = threading.Lock(), False
        self._timer = threading.Timer(PATIENCE_SECONDS, self._start)
        self._timer.daemon = True
        self._timer.start()

    def _start(self) -> None:
        with self._gate:
            if not self._over:
                self._shown.start()

    def tell(self, what: str) -> None:
        self._shown.update(self._task, description=what)

    def stop(self) -> None:
        self._timer.cancel()
        with self._gate:
            self._over = True
            self._shown.stop()


class Teller:
    """Progress of a comparison: a spinner while building, when nothing is timed; after that redrawn
    only when told, so that drawing never disturbs a timing.
    """

    def __init__(self, console: Console, enabled: bool) -> None:
        self._console = console
        self._enabled = enabled
        self._spinner: _Spinner | None = None
        self._started = time.monotonic()
        self._drawn = 0.0
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
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
        if not self._enabled:
            return
        if what.startswith("building"):
            if self._spinner is None:
                self._spinner = _Spinner(self._console, what)
            self._spinner.tell(what)
            return
        self._stop_spinner()
        now = time.monotonic()
        if now - self._started < PATIENCE_SECONDS or now - self._drawn < 0.1:
            return
        if not self._live:
            self._bar.start()
            self._live = True
        self._drawn = now
        self._bar.update(self._task, description=what, completed=min(1.0, share))
        self._bar.refresh()

    def _stop_spinner(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None

    def stop(self) -> None:
        self._stop_spinner()
        if self._live:
            self._bar.stop()


@contextmanager
def telling(as_json: bool) -> Iterator[Teller]:
    """A `Teller` on stderr, which stays silent for JSON and where stderr is no terminal.

    What plugins print meanwhile goes to stderr too.
    """
    console = stderr()
    teller = Teller(console, console.is_terminal and not as_json)
    with redirect_stdout(sys.stderr):
        try:
            yield teller
        finally:
            teller.stop()


@contextmanager
def waiting(what: str, as_json: bool) -> Iterator[None]:
    """A spinner on stderr for work that cannot tell how far it is, once it takes long.

    What plugins print meanwhile goes to stderr too.
    """
    console = stderr()
    with redirect_stdout(sys.stderr):
        spinner = None if as_json or not console.is_terminal else _Spinner(console, what)
        try:
            yield
        finally:
            if spinner is not None:
                spinner.stop()


@contextmanager
def building(what: str, as_json: bool) -> Iterator[Callable[[BuildStep], None] | None]:
    """As `waiting`, with a function for the steps of a build: once they come, it shows a bar."""
    console = stderr()
    with redirect_stdout(sys.stderr):
        if as_json or not console.is_terminal:
            yield None
            return
        spinner = _Spinner(console, f"building {what}")
        started = time.monotonic()
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        task = bar.add_task(f"building {what}", total=1.0)

        def tell(step: BuildStep) -> None:
            if time.monotonic() - started < PATIENCE_SECONDS:
                return
            spinner.stop()
            bar.start()
            if step.parent:
                bar.update(task, description=f"building {what}: {step.phase}")
            elif step.steps:
                bar.update(task, completed=step.step / step.steps)

        try:
            yield tell
        finally:
            spinner.stop()
            bar.stop()


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
