"""What the documentation names exists, and the site builds."""

import ast
import importlib.util
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PATH = re.compile(r"`((?:[\w.-]+/)+(?:[\w-]+\.(?:py|toml|sh|json|jsonl|yaml|md))?)`")
"""A file or a folder between backticks, with a slash."""
ELSEWHERE = re.compile(r"^(out|runs|RUN|models|exports|checkpoints|logs|my)/|^[A-Z_]+/")
"""What a user has, and what a run leaves behind."""


def exists(name: str, page: Path) -> bool:
    bases = (ROOT, ROOT / "ray_abliterate", page.parent, ROOT / "ray_abliterate" / page.stem)
    return any((base / name).exists() for base in bases)


def left_by_a_run(name: str) -> bool:
    """Files and folders of a run directory, an export or a cache, which stand in no checkout."""
    return name.rstrip("/") in {
        "evaluations", "evaluation", "residuals", "responses", "reproduce", "tune", "exports",
        "judgements", "profile", "serving", "validation", "site", "dist",
        "reproduce/reproduce.json",
    }  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = PATH.findall(page.read_text(encoding="utf-8"))
    missing = [
        name
        for name in named
        if "NAME" not in name
        and not exists(name, page)
        and not ELSEWHERE.match(name)
        and not left_by_a_run(name)
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    modules = re.findall(r"python -m ((?:benchmarks|ray_abliterate|scripts)[\w.]*)", text)
    modules += re.findall(r"(?:from|import) (ray_abliterate[\w.]*)", text)
    missing = [name for name in modules if importlib.util.find_spec(name.rstrip(".")) is None]
    assert not missing


def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    """`make docs` does the same; a link or an anchor that leads nowhere is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir"]
    done = subprocess.run([*command, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def names_in(file: str, defined: bool = False) -> set[str]:
    """The names of a module's classes and functions, and unless `defined`, all that it uses."""
    nodes = ast.walk(ast.parse((ROOT / "ray_abliterate" / file).read_text(encoding="utf-8")))
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    fields = ("name",) if defined else ("name", "id", "attr")
    return {
        getattr(node, field)
        for node in nodes
        for field in fields
        if hasattr(node, field) and (isinstance(node, kinds) or field != "name")
    }


def test_the_walk_of_a_trial_goes_from_definition_to_definition() -> None:
    """Each file uses the name of its row, and the next file defines it."""
    page = (ROOT / "docs" / "trial-walk.md").read_text(encoding="utf-8")
    steps = re.findall(r"^\| \d+ \| `([\w/]+\.py)` \|.*\| (?:`(\w+)`)? ?\|$", page, re.MULTILINE)
    assert 5 < len(steps) <= 12
    for (file, name), (next_file, _) in pairwise(steps):
        assert name in names_in(next_file, defined=True), f"{next_file} defines no {name}"
        assert name in names_in(file), f"{file} does not use {name}"
