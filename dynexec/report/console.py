"""What several commands show in a terminal: progress, and tables."""

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


def new_progress(**options):
    """Progress bars on standard error, with a text and the time; ``options`` are those of rich's Progress."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    return Progress(*columns, console=Console(file=sys.stderr), **options)


def print_wide(console, table, width):
    """Print a table, into a file or a pipe with at least ``width`` columns of text."""
    if console.width < width and not console.is_terminal:
        console.width = width
    console.print(table)
