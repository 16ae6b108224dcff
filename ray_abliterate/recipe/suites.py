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


class _SuiteBase(Section):
    """Settings that every suite has; not a section itself."""

    at_least: float | None = None
    """Stop measuring once the main score's 95 % interval lies wholly above or below this value."""
    at_most: float | None = None
    """The same for a score that should be small."""

    @field_validator("name", check_fields=False)
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not NAME.match(value):
            raise ValueError(f"{value!r} is not a name; use letters, digits, `.`, `_` and `-`")
        return value


class MultipleChoiceSuite(_SuiteBase):
    """Share of questions whose right answer the model finds most likely, by category (MMLU)."""

    kind: Literal["multiple-choice"]
    name: str = "multiple-choice"
    """Name of the suite, and of its scores."""
    table: TableSource
    """The questions."""
    question: str = "question"
    """Column of the question."""
    choices: str = "choices"
    """Column of the list of 2 to 26 answers to choose from."""
    answer: str = "answer"
    """Column of the right answer: its index from 0, or its letter."""
    category: str = "subject"
    """Column of the category; `""` if there is none."""
    categories: tuple[str, ...] = ()
    """Categories to ask about; all if empty."""
    samples_per_category: int | None = Field(None, ge=1)
    """Ask only the first so many questions of each category; all if unset."""
    limit: int | None = Field(None, ge=1)
    """Ask only the first so many questions in total."""
    scoring: Literal["letters", "text"] = "letters"
    """`letters` compares the letters' probabilities, as MMLU does; `text` compares the
    log-likelihoods of the answers' texts per byte."""
    shots: int = Field(0, ge=0)
    """Examples with answers before each question, from the same category."""
    examples: TableSource | None = None
    """Table of the examples, such as a `dev` split, in the same layout: the first of each category
    are used, never the question that is asked. If unset, the first questions of each category of
    `table` become examples and are not asked."""
    chunk: int = Field(32, ge=1)
    """Questions in a unit of work."""

    @model_validator(mode="after")
    def _examples_are_shown(self) -> Self:
        if self.examples is not None and not self.shots:
            raise ValueError("`examples` are given, but shots = 0; set `shots`")
        return self


class OverRefusalSuite(_SuiteBase):
    """Share of harmless but alarming-looking prompts that the model refuses (XSTest)."""

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
    """Value of `label` for harmless prompts; other rows are left out."""
    categories: tuple[str, ...] = ()
    """Types of prompt to ask; all if empty."""
    samples_per_category: int | None = Field(None, ge=1)
    """Ask only the first so many prompts of each type; all if unset."""
    limit: int | None = Field(None, ge=1)
    """Ask only the first so many prompts in total."""
    system: str | None = None
    """System prompt; the chat template's default if unset."""
    markers: tuple[str, ...] | Literal["broad", "strict"] = "strict"
    """Markers of a refusal, as for `keyword-rate`; good answers to these prompts contain many of
    the `broad` words."""
    max_new_tokens: int = Field(100, ge=1)
    """Longest answer, in tokens."""
    empty_is_refusal: bool = True
    """Count empty and degenerate answers as refusals; they are also counted separately."""
    keep_answers: bool = False
    """Save the full answers with the results."""
    chunk: int = Field(32, ge=1)
    """Prompts in a unit of work."""

    @field_validator("markers")
    @classmethod
    def _markers_can_match(cls, markers: Any) -> Any:
        if not markers or not all(fold(m) for m in markers if not isinstance(markers, str)):
            raise ValueError("each marker needs letters; give phrases, or `broad` or `strict`")
        return markers


class KlSuite(_SuiteBase):
    """KL divergence from the base model over many tokens of its own answers, in nats per token."""

    kind: Literal["kl"]
    name: str = "kl"
    """Name of the suite, and of its scores."""
    prompts: PromptSource
    """Prompts at whose answers the two models are compared."""
    tokens: int = Field(32, ge=1)
    """Longest greedy answer of the base model, in tokens."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many prompts."""
    chunk: int | None = Field(None, ge=1)
    """Prompts in a unit of work, whose base logits are in memory at once; if unset, as many as have
    256 tokens of answers."""


class PerplexitySuite(_SuiteBase):
    """Loss on texts, in nats per token; each text by itself, without a chat template."""

    kind: Literal["perplexity"]
    name: str = "perplexity"
    """Name of the suite, and of its scores."""
    table: TableSource = Field(default_factory=lambda: TableSource(builtin="alice"))
    """The texts; `builtin = "alice"` is the beginning of a book in the public domain."""
    column: str = "text"
    """Column of the text."""
    least_characters: int = Field(64, ge=1)
    """Leave out shorter texts, such as empty lines and titles."""
    tokens: int = Field(512, ge=2)
    """Read only the first so many tokens of each text."""
    limit: int | None = Field(None, ge=1)
    """Read only the first so many texts."""
    chunk: int = Field(16, ge=1)
    """Texts in a unit of work."""


class ResponsesSuite(_SuiteBase):
    """Answers to be read by people; nothing is scored."""

    kind: Literal["responses"]
    name: str = "responses"
    """Name of the suite."""
    prompts: PromptSource
    """Prompts that the model answers."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many prompts."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest answer, in tokens."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy; above 0, answers are sampled."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the most likely tokens with this total probability."""
    seed: int = Field(0, ge=0)
    """Random seed of the sampling."""
    chunk: int = Field(8, ge=1)
    """Prompts in a unit of work."""


class LmEvalSuite(_SuiteBase):
    """Tasks of lm-evaluation-harness (`pip install 'ray-abliterate[lm-eval]'`)."""

    kind: Literal["lm-eval"]
    name: str = "lm-eval"
    """Name of the suite, and of its scores."""
    tasks: tuple[str, ...]
    """Names of single tasks, as listed by `lm-eval ls subtasks`."""
    limit: int = Field(100, ge=1)
    """Use only the first so many samples of each task."""
    shots: int | None = Field(None, ge=0)
    """Examples before each sample; the task's own number if unset."""
    metric: str = ""
    """The metric that is scored, such as `acc_norm`; the task's first if empty."""
    lower_is_better: bool = False
    """Whether a smaller value of the metric is better."""
    chat: bool = False
    """Ask with the model's chat template."""
    folder: str | None = None
    """Folder of your own task files, in addition to the harness's; it must exist wherever replicas
    run."""
    batch_size: int = Field(8, ge=1)
    """Requests in one batch."""

    @field_validator("tasks")
    @classmethod
    def _tasks_are_distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError("name at least one task, and each only once")
        return value


class PluginSuite(_SuiteBase):
    """A suite of your own, or of an installed package; see `docs/extending.md`."""

    kind: str
    """`module:attribute`, importable wherever replicas run; or the name that a package
    registers."""
    name: str
    """Name of the suite, and of its scores."""
    table: TableSource | None = None
    """A table that is passed to the suite."""
    prompts: PromptSource | None = None
    """Prompts that are passed to the suite."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the suite."""

    @field_validator("kind")
    @classmethod
    def _names_a_suite(cls, value: str) -> str:
        near = difflib.get_close_matches(value, KINDS, n=1, cutoff=0.8)
        if near or not (PLUGIN.match(value) or KIND.match(value)):
            raise ValueError(
                f"{value!r} is not a suite and not a `module:attribute`.{suggestion(value, KINDS)}"
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
