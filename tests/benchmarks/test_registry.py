"""Every claim is listed, has results, and a table that renders from them on a page."""

import json
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.__main__ import documentation, list_claims
from benchmarks.harness.record import RESULTS
from benchmarks.harness.tables import PLACE, render
from benchmarks.registry import CLAIMS

FOLDER = Path(__file__).parents[2] / "benchmarks"
PAGES = [page for page in documentation() if PLACE.search(page.read_text(encoding="utf-8"))]


def test_every_claim_is_registered():
    files = [f for f in FOLDER.rglob("*.py") if "\nCLAIM = Claim(" in f.read_text("utf-8")]
    assert len(files) == len(CLAIMS) == len({claim.name for claim in CLAIMS})


def test_the_list_names_every_command_sentence_and_page():
    lines = list_claims()
    for claim in CLAIMS:
        place = lines.index(claim.command)
        assert lines[place + 1].strip() == claim.sentence
        assert f"results/{claim.results}.json, shown on" in lines[place + 2]
        assert "no page" not in lines[place + 2]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_every_table_renders_from_results_of_todays_command(claim):
    record = json.loads((RESULTS / f"{claim.results}.json").read_text(encoding="utf-8"))
    assert f"{record['command']} ".startswith(f"{claim.command} ")
    assert claim.tables
    for name, table in claim.tables.items():
        head, rule, *rows = [line for line in table(record["figures"]) if line.startswith("|")]
        columns = head.count(" | ")
        assert rule.count("---") == columns + 1 and rows, name


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_help_says_what_is_measured_and_how_to_try_it(claim, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"benchmarks.{claim.name}", run_name="__main__", alter_sys=True)
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert claim.command in text.replace("- ", "-")
    assert claim.sentence in text
    assert "--quick" in text


def test_help_needs_no_torch_and_no_ray():
    program = (
        "import sys, benchmarks.registry; heavy = ('torch', 'ray', 'transformers', 'optuna'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=FOLDER.parent,
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_committed_pages_have_the_tables_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert text == render(text, CLAIMS), (
        f"{page.name} is out of date; write it anew with\n  python -m benchmarks tables"
    )


def test_every_table_has_one_place_on_a_page():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    placed = Counter(match["name"] for match in PLACE.finditer(text))
    assert placed == Counter(name for claim in CLAIMS for name in claim.tables)
