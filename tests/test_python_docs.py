"""The blocks of docs/python.md and the notebook run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|toml)(?: title=\"(.*?)\")?\n(.*?)```", PAGE, re.DOTALL)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The working directory of somebody who follows the page: its files, and nothing else."""
    recipe, scorer = (text for language, _, text in BLOCKS if language == "toml")
    (tmp_path / "my.toml").write_text(recipe, encoding="utf-8")
    (tmp_path / "with_scorer.toml").write_text(recipe + scorer, encoding="utf-8")
    for _, title, text in BLOCKS:
        if title:
            (tmp_path / title).write_text(text, encoding="utf-8")
    return tmp_path


def run(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(DOCS.parent)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_runs_from_its_first_block_to_its_last(folder: Path) -> None:
    program = "\n".join(text for language, _, text in BLOCKS if language == "python")
    (folder / "page.py").write_text(program, encoding="utf-8")
    printed = run(folder, "page.py")
    assert "sorry -> sure" in printed, "the planted model's refusal has to be gone"
    assert (folder / "out" / "my-model" / "verification.json").exists()


def test_the_recipe_takes_the_scorer_of_the_page(folder: Path) -> None:
    run(folder, "-m", "ray_abliterate", "run", "with_scorer.toml", "search.trials=2", "--to", "r")
    assert "answer-length" in run(folder, "-m", "ray_abliterate", "show", "r")


def test_the_notebook_runs_and_ends_with_an_edited_answer(tmp_path: Path) -> None:
    notebook = nbformat.read(DOCS / "examples" / "first_run.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the frontier's plot"
    last = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    assert "sorry" in last and "sure" in last


def test_the_notebooks_outputs_are_those_of_a_run_and_hold_no_path() -> None:
    text = (DOCS / "examples" / "first_run.ipynb").read_text(encoding="utf-8")
    assert '"output_type": "error"' not in text
    assert not re.search(r"/(tmp|home|root|Users)/", text)
