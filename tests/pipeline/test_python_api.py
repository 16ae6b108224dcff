"""The public names: listed, lazy, typed; and what they do without the command line."""

import csv
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ray_abliterate
from ray_abliterate import (
    Frontier,
    LanguageModel,
    Plan,
    Profile,
    PromptSet,
    RayAbliterateError,
    Recipe,
    RunDirectory,
    WeightCache,
    compute_directions,
    find_writers,
    resume_run,
    run_recipe,
)
from ray_abliterate.errors import RecipeError, RunExists, RunNotFound
from ray_abliterate.pipeline import run as pipeline_run
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.recipe import ModelSettings
from ray_abliterate.recipe.toml_writer import to_toml
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.score import Score, Scorecard
from tests.support.finished_runs import FLAGGED, THINGS

USER_FILE = '''
"""What somebody may write against the package; checked by mypy --strict."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_abliterate import (
    Directions,
    Frontier,
    LanguageModel,
    Measure,
    Plan,
    Profile,
    Prompt,
    PromptSet,
    RayAbliterateError,
    Recipe,
    Replica,
    Residuals,
    RunDirectory,
    Score,
    Scorecard,
    Scorer,
    StreamingEvaluator,
    Suite,
    SuiteChunk,
    Trial,
    WeightCache,
    compute_directions,
    export_trial,
    find_writers,
    mean_interval,
    needs,
    resume_run,
    run_recipe,
    wilson,
)


def study() -> list[dict[str, Any]]:
    try:
        frontier = run_recipe("my.toml", to="runs/my", search__trials=8)
    except RayAbliterateError as error:
        raise SystemExit(str(error)) from error
    reveal_type(frontier)
    reveal_type(resume_run("runs/my", trials=16).knee)
    run = RunDirectory.open("runs/my")
    best: Trial = run.trial(frontier.knee.number)
    reveal_type(best.scorecard)
    card: Scorecard | None = best.scorecard
    print(card, Frontier.of(run.trials()), Recipe.load(Path("my.toml")).search.trials)
    reveal_type(export_trial(run, best, Path("out")))
    return run.trial_rows()


def edit(module: Any, tokenizer: Any, plan: Plan) -> str:
    model = LanguageModel(module, tokenizer)
    cooking = PromptSet("behaviour", (Prompt("How do I bake a cake?"),))
    other = ["How do I tune a guitar?"]
    directions = compute_directions(model, cooking, other, {"method": "leace"})
    reveal_type(directions)
    cache = WeightCache(module, find_writers(module))
    with cache.edited(plan, directions):
        answers = model.answer(cooking.prompts, 20)
    reveal_type(answers[0].text)
    residuals = Residuals(model.residuals(cooking.prompts))
    print(residuals.layers, Profile(1.0, 3.0, 0.5, 4.0).strengths(8), Directions, Replica)
    return answers[0].text


class Length:
    """Scores the mean length of answers."""

    name = "length"
    goal = "minimize"

    def prepare(self, model: Any) -> None: ...

    def score(self, model: Any) -> Score:
        mean, low, high = mean_interval([1.0, 2.0])
        return Score(self.name, mean, low, high)


def uses(scorer: Scorer, suite: Suite, chunk: SuiteChunk, measure: type[Measure]) -> str:
    reveal_type(wilson(3, 20))
    reveal_type(StreamingEvaluator(object()))
    return f"{scorer.name} {suite.name} {chunk.suite} {measure.__name__} {needs}"
'''
REVEALED = [
    "Frontier",
    "Trial",
    "Scorecard | None",
    "Path",
    "Directions",
    "str",
    "tuple[float, float]",
    "StreamingEvaluator",
]


def test_every_public_name_is_listed_and_is_what_its_module_holds() -> None:
    assert set(ray_abliterate.__all__) <= set(dir(ray_abliterate))
    for name in ray_abliterate.__all__:
        assert getattr(ray_abliterate, name) is not None
    assert ray_abliterate.Plan is Plan
    with pytest.raises(AttributeError, match="no attribute 'run_recipes'"):
        _ = ray_abliterate.run_recipes  # type: ignore[attr-defined]


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, ray_abliterate; dir(ray_abliterate); "
        "print(*{'torch', 'ray', 'numpy', 'pydantic', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_users_file_is_checked_with_the_types_of_the_package(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER_FILE, encoding="utf-8")
    root = Path(ray_abliterate.__file__).parents[1]
    command = [
        sys.executable, "-m", "mypy", "--strict", "--config-file", str(root / "pyproject.toml"),
        "--no-error-summary", "--cache-dir", str(root / ".mypy_cache"), str(tmp_path / "user.py"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=280)
    lines = [line for line in done.stdout.splitlines() if "user.py" in line]
    errors = [line for line in lines if ": error:" in line]
    assert not errors, "\n".join(errors)
    revealed = [line.split('"')[1] for line in lines if "Revealed type" in line]
    short = [text.replace("builtins.", "").replace("pathlib.", "") for text in revealed]
    assert [_unqualified(text) for text in short] == REVEALED


def _unqualified(text: str) -> str:
    """Names without the modules that they are from."""
    parts = text.replace("|", " | ").split()
    plain = " ".join(part.rpartition(".")[2] if "[" not in part else part for part in parts)
    return plain if "[" not in text else text


def test_a_plan_is_applied_to_a_model_in_memory_and_undone(planted_run: Any) -> None:
    """The model is anybody's: transformers' own, loaded before this package was asked."""
    model = AutoModelForCausalLM.from_pretrained(planted_run.model)
    tokenizer = AutoTokenizer.from_pretrained(planted_run.model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text = f"tell me about the old {FLAGGED[0]}"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip

    def answer() -> str:
        ids = model.generate(**prompt, max_new_tokens=3, do_sample=False)
        return str(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :]))

    run, trial = planted_run.directory, planted_run.trial
    assert "sorry" in answer().lower()
    cache = WeightCache(model, find_writers(model))
    with cache.edited(trial.plan, run.directions()):
        assert "sorry" not in answer().lower()
    assert "sorry" in answer().lower()
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def sets() -> tuple[list[str], list[str]]:
    """The prompts that the planted run's directions were computed from."""
    return tuple(  # type: ignore[return-value]
        [f"tell me about the old {word}" for word in words[:4]] for words in (FLAGGED, THINGS)
    )


def test_directions_on_a_model_in_memory_are_those_of_a_run(planted_run: Any) -> None:
    module = AutoModelForCausalLM.from_pretrained(planted_run.model)
    tokenizer = AutoTokenizer.from_pretrained(planted_run.model)
    model, (behaviour, neutral) = LanguageModel(module, tokenizer), sets()
    model.response_prefix = (7,)
    directions = compute_directions(model, behaviour, PromptSet.of("neutral", *neutral))
    expected = planted_run.directory.directions()
    assert torch.allclose(directions.vectors, expected.vectors, atol=1e-6)
    assert directions.origin["behaviour"] == expected.origin["behaviour"]
    assert model.response_prefix == (7,), "it is left as it was"
    plan = Plan("global", 2.0, "row", (("mlp", Profile(1.0, 2.0, 1.0, 4.0)),))
    with WeightCache(module, find_writers(module)).edited(plan, directions):
        pass
    whitened = compute_directions(model, behaviour, neutral, {"method": "whitened"})
    assert whitened.method == "whitened"
    for wrong, words in (
        ({"method": "whitend"}, "whitend"),
        ({"metod": "leace"}, r"direction\.metod"),
        ({"positions": 3}, "positions is for runs only"),
        ({"per_component": True}, "per_component is for runs only"),
    ):
        with pytest.raises(RecipeError, match=words):
            compute_directions(model, behaviour, neutral, wrong)


RECIPE = """
[model]
name = "tiny"
[prompts]
behaviour = { file = "behaviour.txt" }
neutral = { file = "neutral.txt" }
[search]
trials = 4
[[scorers]]
kind = "keyword-rate"
prompts = { file = "behaviour.txt" }
"""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the pipeline is asked to run; nothing is run."""
    calls: list[tuple[Any, ...]] = []

    def run(*arguments: Any) -> Frontier:
        calls.append(arguments)
        return Frontier(())

    monkeypatch.setattr(pipeline_run, "run", run)
    return calls


def test_run_recipe_takes_a_path_or_a_recipe_and_overrides(
    asked: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    file = tmp_path / "my.toml"
    file.write_text(RECIPE)
    progress = SilentProgress()
    overrides: dict[str, Any] = {"search.trials": 8, "scorers.0.max_new_tokens": 20}
    assert run_recipe(str(file), tmp_path / "a", progress, **overrides) == Frontier(())
    recipe, directory, base, given = asked[0]
    assert (recipe.search.trials, recipe.scorers[0].max_new_tokens) == (8, 20)
    assert RunDirectory.open(tmp_path / "a").read_recipe() == recipe == directory.read_recipe()
    assert (base, given) == (tmp_path, progress)
    assert (tmp_path / "a" / "recipe.toml").read_text() == RECIPE
    run_recipe(
        Recipe.load(file), str(tmp_path / "b"), search__trials=8, scorers__0__max_new_tokens=20
    )
    recipe, directory, base, _ = asked[1]
    assert recipe == asked[0][0] and base == Path.cwd()
    written = (tmp_path / "b" / "recipe.toml").read_text()
    assert Recipe.parse(written, "recipe.toml") == Recipe.load(file)
    with pytest.raises(RecipeError, match=r"search\.trails is not a setting\. Did you mean"):
        run_recipe(file, tmp_path / "c", search__trails=8)
    with pytest.raises(RecipeError, match=r"nowhere\.toml"):
        run_recipe(tmp_path / "nowhere.toml", tmp_path / "c")
    assert not (tmp_path / "c").exists() and len(asked) == 2
    directory.record_facts(model={"name": "tiny"})
    with pytest.raises(RunExists, match="resume"):
        run_recipe(file, tmp_path / "b")


def test_resume_run_takes_a_folder_or_a_run_and_a_number_of_trials(
    asked: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    (tmp_path / "my.toml").write_text(RECIPE)
    run_recipe(tmp_path / "my.toml", tmp_path / "run")
    directory = RunDirectory.open(tmp_path / "run")
    directory.record_facts(base=str(tmp_path))
    resume_run(str(tmp_path / "run"), trials=9)
    recipe, _, base, _ = asked[1]
    assert recipe.search.trials == 9 == directory.read_recipe().search.trials
    assert base == tmp_path
    resume_run(directory)
    assert asked[2][0] == recipe
    directory.append_trial(Trial(0, Plan.nothing(), None, 1.0, "broken"))
    with pytest.raises(RecipeError, match="has 1 trials already"):
        resume_run(directory, trials=0)
    with pytest.raises(RunNotFound):
        resume_run(tmp_path / "nowhere")
    assert issubclass(RunNotFound, RayAbliterateError)


def test_a_run_is_a_table_of_its_trials(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run", Recipe.parse(RECIPE, "r"), RECIPE)
    assert directory.trial_rows() == []
    plan = Plan("global", 2.0, "row", (("attn", Profile(1.5, 2.0, 0.5, 3.0)),))
    per_layer = Plan("per-layer", 1.0, "row", (("attn", Profile(0.5, 2.0, 0.5, 3.0)),), 0.25)

    def card(rate: float, divergence: float, bound: bool = False) -> Scorecard:
        return Scorecard((
            Score("keyword-rate", rate, rate / 2, 1.0),
            Score("kl-divergence", divergence, 0.0, 9.0, bound=bound),
        ))  # fmt: skip

    for trial in (
        Trial(0, plan, card(0.5, 0.25), 1.5, replica="replica 0"),
        Trial(1, per_layer, card(0.75, 0.5), 2.0),
        Trial(2, plan, None, 0.0, "broken"),
        Trial(3, plan, card(0.9, 0.9, bound=True), 0.5),
    ):
        directory.append_trial(trial)
    rows = directory.trial_rows()
    assert rows[0] == {
        "number": 0,
        "frontier": True,
        "pruned": False,
        "error": None,
        "seconds": 1.5,
        "replica": "replica 0",
        "keyword-rate": 0.5,
        "keyword-rate/low": 0.25,
        "keyword-rate/high": 1.0,
        "kl-divergence": 0.25,
        "kl-divergence/low": 0.0,
        "kl-divergence/high": 9.0,
        "direction_scope": "global",
        "direction_layer": 2.0,
        "attn.peak": 1.5,
        "attn.peak_layer": 2.0,
        "attn.floor": 0.5,
        "attn.reach": 3.0,
        "source_offset": None,
    }
    assert [row["frontier"] for row in rows] == [True, False, False, False]
    assert [row["pruned"] for row in rows] == [False, False, False, True]
    assert rows[2]["error"] == "broken" and rows[2]["keyword-rate"] is None
    assert rows[1]["source_offset"] == 0.25
    columns = [list(row) for row in rows]
    assert columns.count(columns[0]) == len(columns), "csv.DictWriter takes them, too"
    writer = csv.DictWriter(io.StringIO(), columns[0])
    writer.writerows(rows)


def test_pandas_takes_the_table(planted_run: Any) -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(planted_run.directory.trial_rows()).set_index("number")
    assert table.loc[0, "frontier"] and table["keyword-rate"].dtype.kind == "f"
    assert {"keyword-rate/low", "kl-divergence/high", "mlp.peak"} <= set(table.columns)


def test_a_recipe_survives_being_written_as_toml() -> None:
    recipe = Recipe.parse(RECIPE, "recipe.toml")
    changed = recipe.with_overrides(
        {"direction": {"method": "ensemble", "ensemble": [
            {"method": "whitened", "weight": 0.5}, {"method": "mean-difference"}]},
         "search.space.components": {"attn": {"peak": [0.5, 2.0]}},
         "scorers.0.markers": ['a "quoted" one', "\x7f", "ünï"],
         "model": ModelSettings(name="x/y", revision="abc").model_dump()},
    )  # fmt: skip
    text = to_toml(changed.model_dump(mode="json", exclude_none=True))
    assert Recipe.parse(text, "recipe.toml") == changed
