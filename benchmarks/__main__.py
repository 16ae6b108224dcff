"""List all claims; or write the tables on the documentation's pages anew.

python -m benchmarks [list]
python -m benchmarks tables
"""

import argparse
from pathlib import Path

from benchmarks.harness.record import RESULTS
from benchmarks.harness.tables import places, render
from benchmarks.registry import CLAIMS

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "verb",
        nargs="?",
        choices=["list", "tables"],
        default="list",
        help="list: every claim with its command, results and pages; "
        "tables: write the tables on the pages from benchmarks/results/",
    )
    verb = parser.parse_args().verb
    print("\n".join(write_tables() if verb == "tables" else list_claims()))


def documentation() -> list[Path]:
    """Return all Markdown pages that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def list_claims() -> list[str]:
    """Return the lines that say what each benchmark measures, and where its figures are shown."""
    pages = places(documentation())
    lines = []
    for claim in CLAIMS:
        file = RESULTS / f"{claim.results}.json"
        results = file.relative_to(ROOT) if file.exists() else "not measured yet"
        shown = dict.fromkeys(pages[name] for name in claim.tables if name in pages)
        on = ", ".join(str(page.relative_to(ROOT)) for page in shown) or "no page"
        lines += [claim.command, f"    {claim.sentence}", f"    {results}, shown on {on}", ""]
    return [*lines, "Each has --help, and --quick for a run that only shows that it works."]


def write_tables() -> list[str]:
    """Write the tables of all pages anew, and return the pages that have any."""
    pages = dict.fromkeys(places(documentation()).values())
    for page in pages:
        page.write_text(render(page.read_text(encoding="utf-8"), CLAIMS), encoding="utf-8")
    return [str(page.relative_to(ROOT)) for page in pages]


if __name__ == "__main__":
    main()
