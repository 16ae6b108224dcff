"""The recipe's reference is what the recipe's types say."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ray_abliterate.recipe import Recipe, Section, SuiteFile
from ray_abliterate.recipe.reference import INTRO, SECTIONS, recipe_markdown

ROOT = Path(__file__).parents[2]


def test_the_committed_reference_is_the_generated_one():
    written = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert written == recipe_markdown(), (
        "docs/recipe.md is out of date; write it anew with\n"
        "  python -m ray_abliterate.recipe.reference > docs/recipe.md"
    )


def test_the_module_prints_the_reference():
    command = [sys.executable, "-m", "ray_abliterate.recipe.reference"]
    done = subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
    assert done.stdout.decode() == recipe_markdown()


def test_every_section_of_a_recipe_is_in_the_reference():
    documented = {model for _, model in SECTIONS} | {Recipe, SuiteFile}

    def all_below(model: type) -> set[type]:
        return {model}.union(*map(all_below, model.__subclasses__()))

    assert documented == {m for m in all_below(Section) if not m.__name__.startswith("_")} - {
        Section
    }


@pytest.mark.parametrize(("title", "model"), SECTIONS, ids=[title for title, _ in SECTIONS])
def test_every_setting_has_a_row_with_four_filled_cells(title, model):
    text = recipe_markdown().split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(model.model_fields)
    for name, row in zip(model.model_fields, rows, strict=True):
        cells = [cell.strip() for cell in row.replace("\\|", "").strip("|").split("|")]
        assert cells[0] == f"`{name}`"
        assert len(cells) == 4
        assert all(cells)


def test_the_references_example_is_a_recipe():
    example = INTRO.split("```toml\n")[1].split("```")[0]
    commands = INTRO.split("```sh\n")[1].split("```")[0]
    overrides = [word for line in commands.splitlines() for word in shlex.split(line)[3:]]
    recipe = Recipe.parse(example, "docs/recipe.md", tuple(overrides))
    assert recipe.search.trials == 50
    assert recipe.scorers[1].tokens == 4
    assert recipe.search.space.peak == (0.5, 2.0)
