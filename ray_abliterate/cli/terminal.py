"""What the terminal shows."""

import sys

from rich.console import Console


def console() -> Console:
    """Where people read: standard output, at a sensible width when it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 110, highlight=False)
