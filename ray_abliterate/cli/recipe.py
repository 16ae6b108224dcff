"""The verbs that take a recipe and no run: `init`, `doctor` and `calibrate`."""

from pathlib import Path
from typing import Annotated

import typer

from ray_abliterate.cli.terminal import console, say
from ray_abliterate.errors import RecipeError
from ray_abliterate.recipe import Recipe

commands = typer.Typer()
judges = typer.Typer()


def shipped_recipes() -> Path:
    """Return the folder of recipes that ship: in the package, or beside it in a checkout."""
    installed = Path(__file__).parents[1] / "configs"
    return installed if installed.exists() else Path(__file__).parents[2] / "configs"


@commands.command()
def init(
    to: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("recipe.toml"),
    model: Annotated[str | None, typer.Option(help="Hub name or folder of the model.")] = None,
    like: Annotated[str, typer.Option(help="The shipped recipe to start from.")] = "refusal",
) -> None:
    """Write a commented recipe to start from."""
    shipped = {file.stem: file for file in sorted(shipped_recipes().glob("*.toml"))}
    if like not in shipped:
        raise RecipeError(f"there is no recipe {like!r}; --like takes one of {', '.join(shipped)}")
    if to.exists():
        raise RecipeError(f"{to} already exists; choose another name, or remove it first")
    text = shipped[like].read_text(encoding="utf-8")
    if model is not None:
        lines = text.splitlines(keepends=True)
        index = next(i for i, line in enumerate(lines) if line.startswith("name = "))
        lines[index] = f'name = "{model}"\n'
        text = "".join(lines)
    Recipe.parse(text, to.name)
    try:
        to.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{to} cannot be written ({error.strerror})") from None
    say(f"Wrote {to}. Check it with:  ray-abliterate doctor {to}")


@commands.command()
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe to check too.", show_default=False)
    ] = None,
) -> None:
    """Check this machine, and whether a recipe can run on it."""
    settings = Recipe.load(recipe) if recipe else None
    from ray_abliterate.cli.doctor import check_all

    raise typer.Exit(check_all(settings, recipe.parent if recipe else Path(), console()))


@judges.command()
def calibrate(
    recipe: Annotated[Path, typer.Argument(help="A recipe with a refusal-judge.")],
    labelled: Annotated[
        Path,
        typer.Argument(
            help="JSONL file with `text`, `label` (refusal or answer) and, if the judge sees "
            "prompts, `prompt`."
        ),
    ],
    scorer: Annotated[
        str | None, typer.Option(help="Name of the scorer, if the recipe has several judges.")
    ] = None,
) -> None:
    """Show how well a refusal-judge recognises refusals, and which threshold is best."""
    settings = Recipe.load(recipe)
    from ray_abliterate.evaluation.judges import calibration
    from ray_abliterate.evaluation.judges.build import build_judge
    from ray_abliterate.evaluation.scorers.keyword_rate import MARKERS
    from ray_abliterate.evaluation.scorers.markers import Markers
    from ray_abliterate.recipe import RefusalJudge

    all_judges = [s for s in settings.scorers if isinstance(s, RefusalJudge)]
    chosen = [s for s in all_judges if scorer in (None, s.name)]
    if len(chosen) != 1:
        names = ", ".join(s.name for s in all_judges) or "none"
        raise RecipeError(
            f"{recipe} has these scorers of kind refusal-judge: {names}.\n"
            "  Add one, or choose one with --scorer NAME."
        )
    with_prompts = chosen[0].endpoint is not None or chosen[0].sees_prompt
    texts = list(calibration.read_labelled_texts(labelled, with_prompts))
    markers = {name: Markers(phrases, name).in_text for name, phrases in MARKERS.items()}
    for line in calibration.calibrate(build_judge(chosen[0]), texts, markers).lines():
        say(line)
