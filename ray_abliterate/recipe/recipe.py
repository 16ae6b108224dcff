"""The recipe: what a run should do, read once from a TOML file and never changed.

Knows nothing about models, tensors or Ray; importing it takes a few hundredths of a second, so a
wrong recipe is refused before anything heavy is loaded. The docstring under a field is its
documentation, in `docs/recipe.md` and in `ray-abliterate init`.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from ray_abliterate.errors import RecipeError
from ray_abliterate.recipe.direction import DirectionSettings
from ray_abliterate.recipe.model import ModelSettings
from ray_abliterate.recipe.parsing import apply_override, explain_problems, set_setting
from ray_abliterate.recipe.run import EvaluationSettings, RunSettings
from ray_abliterate.recipe.scorers import KeywordRate, RefusalJudge, RefusalLogOdds, ScorerSettings
from ray_abliterate.recipe.search import EditSettings, SearchSettings
from ray_abliterate.recipe.section import Section
from ray_abliterate.recipe.sources import PromptSettings
from ray_abliterate.recipe.suites import SuiteSettings


class Recipe(Section):
    """Everything that a run is to do."""

    model: ModelSettings
    prompts: PromptSettings
    direction: DirectionSettings = Field(default_factory=DirectionSettings)
    edit: EditSettings = Field(default_factory=EditSettings)
    search: SearchSettings = Field(default_factory=SearchSettings)
    scorers: tuple[ScorerSettings, ...] = Field(min_length=1)
    suites: tuple[SuiteSettings, ...] = ()
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    run: RunSettings = Field(default_factory=RunSettings)

    @model_validator(mode="after")
    def _scorers_fit(self) -> "Recipe":
        names = [scorer.name for scorer in self.scorers]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"two scorers are named {repeated[0]!r}; set `name` of one of them")
        if all(scorer.goal == "report" for scorer in self.scorers):
            raise ValueError(
                'every scorer has goal = "report"; the search needs one to optimise: set another '
                "goal for one of them"
            )
        names = [suite.name for suite in self.suites]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"two suites are named {repeated[0]!r}; set `name` of one of them")
        if self.evaluation.replicas and not self.suites:
            raise ValueError(
                f"evaluation.replicas = {self.evaluation.replicas}, but there are no [[suites]] to "
                "measure; add one, or drop the setting"
            )
        return self

    @model_validator(mode="after")
    def _filter_has_a_test(self) -> "Recipe":
        if not self.prompts.filter_by_behaviour:
            return self
        if self.behaviour_test is None:
            raise ValueError(
                "prompts.filter_by_behaviour needs a scorer that judges single answers: add a "
                "keyword-rate, refusal-judge or refusal-log-odds"
            )
        if self.direction.pairs_prompts:
            raise ValueError(
                "prompts.filter_by_behaviour drops prompts of either set, which breaks the pairs "
                "that pca-paired needs; choose one of the two"
            )
        return self

    @model_validator(mode="after")
    def _seeds_have_prompts(self) -> "Recipe":
        kinds = {scorer.kind for scorer in self.scorers}
        missing = [k for k in ("refusal-log-odds", "kl-divergence") if k not in kinds]
        if self.search.seeds == "log-odds" and missing:
            raise ValueError(
                f'search.seeds = "log-odds" tries layers on the prompts of a {missing[0]} scorer, '
                f'and there is none; add one (with goal = "report", if it is not to be optimised), '
                "or choose another measure"
            )
        return self

    @property
    def behaviour_test(self) -> "KeywordRate | RefusalJudge | RefusalLogOdds | None":
        """The scorer that judges single answers: the first that reads them whole, or else the first
        that looks at how they begin; None if there is neither."""
        kinds = ((KeywordRate, RefusalJudge), (RefusalLogOdds,))
        return next((s for kind in kinds for s in self.scorers if isinstance(s, kind)), None)

    @property
    def evaluation_model(self) -> ModelSettings:
        """The model's settings for the evaluation's own replicas."""
        evaluation = self.evaluation
        changed: dict[str, Any] = {"replicas": evaluation.replicas or None}
        if evaluation.gpus_per_replica is not None:
            changed["gpus_per_replica"] = evaluation.gpus_per_replica
        changed["threads_per_replica"] = evaluation.threads_per_replica
        return self.model.model_copy(update=changed)

    @classmethod
    def load(cls, path: Path, overrides: tuple[str, ...] = ()) -> "Recipe":
        """Read a recipe, apply `key=value` overrides, and check everything that needs no model.

        Raises:
            RecipeError: the file is missing or not TOML, or a value is wrong; the message has one
                line per problem, each with the setting's full name.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise RecipeError(
                f"{path} cannot be read ({error.strerror or error}).\n"
                f"  Write one with:  ray-abliterate init {path}"
            ) from None
        except UnicodeDecodeError:
            raise RecipeError(f"{path} is not UTF-8 text; a recipe is a TOML file.") from None
        return cls.parse(text, source=path.name, overrides=overrides)

    @classmethod
    def parse(cls, text: str, source: str, overrides: tuple[str, ...] = ()) -> "Recipe":
        """Parse the text of a recipe.

        Args:
            text: TOML.
            source: The file's name, for errors.
            overrides: `key=value` texts; of two for one key the later counts.

        Raises:
            RecipeError: the text is not TOML, or a value is wrong; one line per problem.
        """
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"{source} is not TOML: {error}") from None
        for override in overrides:
            apply_override(values, override)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise RecipeError("\n".join(explain_problems(source, error, cls))) from None

    def with_overrides(self, overrides: Mapping[str, object]) -> "Recipe":
        """Return the recipe with some settings changed, and everything checked anew.

        Args:
            overrides: Values by the setting's full name, such as `{"search.trials": 8}`; items of
                a list go by their position, `{"scorers.0.max_new_tokens": 20}`.

        Raises:
            RecipeError: there is no such setting, or its value is wrong; one line per problem.
        """
        values = self.model_dump(mode="json")
        for key, value in overrides.items():
            set_setting(values, key, value)
        try:
            return type(self).model_validate(values)
        except ValidationError as error:
            problems = explain_problems("overrides", error, type(self))
            raise RecipeError("\n".join(problems)) from None

    def to_json(self) -> str:
        """Return the whole recipe, defaults included, as indented JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Parse a recipe from `to_json`'s output."""
        return cls.model_validate_json(text)


class SuiteFile(Section):
    """A file with `[[suites]]` alone, for `ray-abliterate evaluate`."""

    suites: tuple[SuiteSettings, ...] = ()

    @classmethod
    def of(cls, values: Sequence[Any]) -> tuple[SuiteSettings, ...]:
        """Parse suites as a run's `environment.json` holds them."""
        return cls.model_validate({"suites": values}).suites

    @classmethod
    def load(cls, path: Path) -> tuple[SuiteSettings, ...]:
        """Read the suites of a file, which may be a whole recipe.

        Raises:
            RecipeError: the file is missing or not TOML, or a value is wrong.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RecipeError(f"{path} can't be read: {error}") from None
        try:
            return cls.model_validate({"suites": values.get("suites", ())}).suites
        except ValidationError as error:
            raise RecipeError("\n".join(explain_problems(path.name, error, cls))) from None
