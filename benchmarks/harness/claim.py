"""A claim of this project, and the benchmark that measures it.

Every benchmark has one `Claim`, in the file that measures it; `benchmarks/registry.py` lists them
all. Knows none of them.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.record import save

Figures = dict[str, Any]
Table = Callable[[Figures], list[str]]
"""Returns the lines of a Markdown table; none if the figures don't have what it shows."""


@dataclass(frozen=True)
class Claim:
    """What one benchmark measures, where its figures lie, and how pages show them.

    Attributes:
        name: The module below `benchmarks` that measures it, such as `weight_cache`.
        sentence: What it measures, for the list of benchmarks and for `--help`.
        results: Name of the JSON file under `results/` without its ending; None if the benchmark
            saves nothing.
        tables: The tables made of the figures, by the name of their place on a page.
    """

    name: str
    sentence: str
    results: str | None
    tables: Mapping[str, Table]

    @property
    def command(self) -> str:
        """The command that measures it."""
        return f"python -m benchmarks.{self.name}"

    def parser(self, **quick: Any) -> "BenchmarkParser":
        """Return a parser for the benchmark's options.

        Args:
            **quick: The smallest sensible value of each option that decides how long it takes.
                They become the defaults when `--quick` is given.
        """
        return BenchmarkParser(self, quick)

    def save(self, figures: Figures, options: argparse.Namespace, file: str = "") -> None:
        """Save the figures under `results/` and print the path; a quick run saves nothing.

        Args:
            figures: What was measured.
            options: Parsed by `parser`.
            file: Another name of the JSON file, without its ending.
        """
        if options.quick:
            print("Nothing is saved: the figures of a quick run only show that it works.")
        elif file or self.results:
            print(save(file or str(self.results), figures))


class BenchmarkParser(argparse.ArgumentParser):
    """A parser that describes its claim and understands `--quick`."""

    def __init__(self, claim: Claim, quick: Mapping[str, Any]) -> None:
        super().__init__(prog=claim.command, description=claim.sentence)
        self._quick = dict(quick)
        sizes = " ".join(_as_options(quick))
        self.add_argument(
            "--quick",
            action="store_true",
            help=f"run with the smallest sizes ({sizes or 'nothing to set'}) and save nothing",
        )

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """Parse the options; with `--quick`, those not given have their smallest values."""
        given = sys.argv[1:] if args is None else list(args)
        if "--quick" in given:
            self.set_defaults(**self._quick)
        options: argparse.Namespace = super().parse_args(given, namespace)
        return options


def _as_options(values: Mapping[str, Any]) -> list[str]:
    """Return values as they are written on a command line."""
    texts = []
    for name, value in values.items():
        items = value if isinstance(value, list | tuple) else [value]
        words = "" if value is True else " " + " ".join(map(str, items))
        texts.append(f"--{name.replace('_', '-')}{words}")
    return texts
