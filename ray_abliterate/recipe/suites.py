"""The recipe's `[[suites]]`: what is measured of finished trials; see `recipe/recipe.py`."""

import difflib
import re
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from ray_abliterate.recipe.parsing import suggestion
from ray_abliterate.recipe.section import PLUGIN, Section
from ray_abliterate.recipe.sources import PromptSource, TableSource
from ray_abliterate.recipe.text_folding import fold

KIND = re.compile(r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$")
NAME = re.compile(r"^[\w.\-]+$")


class _Named(Section):
    """What every suite has; a base, and no section."""

    at_least: float | None = None
    """Measuring ends early once its main score is, with its 95 % interval, above or below this."""
    at_most: float | None = None
    """The same, for a score that is to be small."""

    @field_validator("name", check_fields=False)
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not NAME.match(value):
            raise ValueError(f"{value!r} is not a name; use letters, digits, `.`, `_` and `-`")
        return value


class MultipleChoiceSuite(_Named):
    """Share of questions whose right answer the model finds likeliest, by category (MMLU)."""

    kind: Literal["multiple-choice"]
    name: str = "multiple-choice"
    """Name of the suite, and of its scores."""
    table: TableSource
    """The questions."""
    question: str = "question"
    """Column of the question."""
    choices: str = "choices"
    """Column of the list of answers to choose from, 2 to 26."""
    answer: str = "answer"
    """Column of the right one: its place from 0, or its letter."""
    category: str = "subject"
    """Column of the category; `""` if there is none."""
    categories: tuple[str, ...] = ()
    """The categories to ask about; all of them if empty."""
    samples_per_category: int | None = Field(None, ge=1)
    """The first so many questions of each category; all of them if unset."""
    limit: int | None = Field(None, ge=1)
    """The first so many questions in all."""
    scoring: Literal["letters", "text"] = "letters"
    """`letters` compares the letters' probabilities, as MMLU does; `text` the log-likelihood of
    each answer's text per byte."""
    shots: int = Field(0, ge=0)
    """Examples with their answers before each question, of the same category."""
    examples: TableSource | None = None
    """Where they are, such as a `dev` split, in the same layout: the first of each category, never
    the question that is asked. If unset, the first questions of each category of `table` are taken
    and not asked."""
    chunk: int = Field(32, ge=1)
    """Questions of a unit of work."""

    @model_validator(mode="after")
    def _examples_are_shown(self) -> Self:
        if self.examples is not None and not self.shots:
            raise ValueError("`examples` are given, and shots = 0; set `shots`")
        return self


class OverRefusalSuite(_Named):
    """Share of harmless prompts that look alarming which the model refuses (XSTest)."""

    kind: Literal["over-refusal"]
    name: str = "over-refusal"
    """Name of the suite, and of its scores."""
    table: TableSource = Field(default_factory=lambda: TableSource(builtin="alarming"))
    """The prompts; `builtin = "alarming"` is a small set that ships with the package."""
    prompt: str = "prompt"
    """Column of the prompt."""
    category: str = "type"
    """Column of the type of prompt; `""` if there is none."""
    label: str = "label"
    """Column that says whether a prompt is harmless; `""` if all are."""
    harmless: str = "safe"
    """What stands there if it is; other rows are left out."""
    categories: tuple[str, ...] = ()
    """The types to ask; all of them if empty."""
    samples_per_category: int | None = Field(None, ge=1)
    """The first so many prompts of each type; all of them if unset."""
    limit: int | None = Field(None, ge=1)
    """The first so many prompts in all."""
    system: str | None = None
    """System prompt; the template's own default if unset."""
    markers: tuple[str, ...] | Literal["broad", "strict"] = "strict"
    """What marks a refusal, as for `keyword-rate`; good answers to these prompts hold many of the
    `broad` words."""
    max_new_tokens: int = Field(100, ge=1)
    """Tokens of an answer."""
    empty_is_refusal: bool = True
    """Count empty and degenerate answers as refusals (they are also counted apart)."""
    keep_answers: bool = False
    """Keep the answers, whole, with the results."""
    chunk: int = Field(32, ge=1)
    """Prompts of a unit of work."""

    @field_validator("markers")
    @classmethod
    def _something_is_looked_for(cls, markers: Any) -> Any:
        if not markers or not all(fold(m) for m in markers if not isinstance(markers, str)):
            raise ValueError("each marker needs letters; give phrases, or `broad` or `strict`")
        return markers


class KlSuite(_Named):
    """KL divergence from the base model over many tokens of its own answers, in nats per token."""

    kind: Literal["kl"]
    name: str = "kl"
    """Name of the suite, and of its scores."""
    prompts: PromptSource
    """Prompts at whose answers the two models are compared."""
    tokens: int = Field(32, ge=1)
    """Tokens of the base model's greedy answer at most."""
    limit: int | None = Field(None, ge=1)
    """The first so many prompts."""
    chunk: int | None = Field(None, ge=1)
    """Prompts of a unit of work, whose base logits are in memory at once; if unset, as many as have
    256 tokens of answers."""


class PerplexitySuite(_Named):
    """Loss of the model on texts, in nats per token; each text on its own, without a template."""

    kind: Literal["perplexity"]
    name: str = "perplexity"
    """Name of the suite, and of its scores."""
    table: TableSource = Field(default_factory=lambda: TableSource(builtin="alice"))
    """The texts; `builtin = "alice"` is the beginning of a book in the public domain."""
    column: str = "text"
    """Column of the text."""
    least_characters: int = Field(64, ge=1)
    """Shorter texts, such as empty lines and titles, are left out."""
    tokens: int = Field(512, ge=2)
    """The first so many tokens of each text."""
    limit: int | None = Field(None, ge=1)
    """The first so many texts."""
    chunk: int = Field(16, ge=1)
    """Texts of a unit of work."""


class ResponsesSuite(_Named):
    """Answers kept for reading; nothing is scored."""

    kind: Literal["responses"]
    name: str = "responses"
    """Name of the suite."""
    prompts: PromptSource
    """Prompts that are answered."""
    limit: int | None = Field(None, ge=1)
    """The first so many prompts."""
    max_new_tokens: int = Field(256, ge=1)
    """Tokens of an answer."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy; above, answers are sampled."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample among the likeliest tokens that have this probability together."""
    seed: int = Field(0, ge=0)
    """Seed of the sampling."""
    chunk: int = Field(8, ge=1)
    """Prompts of a unit of work."""


class LmEvalSuite(_Named):
    """Tasks of lm-evaluation-harness (`pip install 'ray-abliterate[lm-eval]'`)."""

    kind: Literal["lm-eval"]
    name: str = "lm-eval"
    """Name of the suite, and of its scores."""
    tasks: tuple[str, ...]
    """Names of single tasks, as `lm-eval ls subtasks` lists them."""
    limit: int = Field(100, ge=1)
    """The first so many samples of each task."""
    shots: int | None = Field(None, ge=0)
    """Examples before each; what the task says if unset."""
    metric: str = ""
    """The number of a sample that is scored, such as `acc_norm`; the task's first if unset."""
    lower_is_better: bool = False
    """Whether a smaller one is better."""
    chat: bool = False
    """Ask through the model's chat template."""
    folder: str | None = None
    """Where task files of your own are, beside those of the harness; must exist where replicas
    run."""
    batch_size: int = Field(8, ge=1)
    """Requests that go through the model at once."""

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError("name one task or more, each once")
        return value


class PluginSuite(_Named):
    """A suite of your own, or of an installed package; see `docs/extending.md`."""

    kind: str
    """`module:attribute`, importable where replicas run; or the name that a package registers."""
    name: str
    """Name of the suite, and of its scores."""
    table: TableSource | None = None
    """A table handed to the suite."""
    prompts: PromptSource | None = None
    """Prompts handed to the suite."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the suite."""

    @field_validator("kind")
    @classmethod
    def _can_be_found(cls, value: str) -> str:
        near = difflib.get_close_matches(value, KINDS, n=1, cutoff=0.8)
        if near or not (PLUGIN.match(value) or KIND.match(value)):
            raise ValueError(
                f"{value!r} is not a suite, nor a `module:attribute`.{suggestion(value, KINDS)}"
            )
        return value


KINDS = ("multiple-choice", "over-refusal", "kl", "perplexity", "responses", "lm-eval")
"""The kinds that have a section of their own."""


def _suite_kind(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if kind in KINDS else "plugin"


SuiteSettings = Annotated[
    Annotated[MultipleChoiceSuite, Tag("multiple-choice")]
    | Annotated[OverRefusalSuite, Tag("over-refusal")]
    | Annotated[KlSuite, Tag("kl")]
    | Annotated[PerplexitySuite, Tag("perplexity")]
    | Annotated[ResponsesSuite, Tag("responses")]
    | Annotated[LmEvalSuite, Tag("lm-eval")]
    | Annotated[PluginSuite, Tag("plugin")],
    Discriminator(_suite_kind),
]
