"""What a person reads: tables and progress, on a terminal and in a pipe or a log."""

import sys
import time
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


def show_table(headers, rows, title=None):
    """Prints a table to stdout: numbers to the right, never cut off; without lines or colours where it isn't a terminal."""
    console = Console(highlight=False)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD if console.is_terminal else None)
    numbers = [all(isinstance(row[i], (int, float)) or row[i] == "" for row in rows) for i in range(len(headers))]
    for header, number in zip(headers, numbers):
        table.add_column(header, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console.width = max(console.width, Measurement.get(console, console.options.update(max_width=10_000), table).maximum)
    console.print(table, markup=False)


@contextmanager
def progress(title, total):
    """Yields a function to call after each of total steps: a bar on stderr, or one line at the end where that is no terminal."""
    console = Console(stderr=True)
    start = time.monotonic()
    if not console.is_terminal:
        done = []
        yield lambda: done.append(1)
        print(f"{title}: {len(done)} of {total} in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
