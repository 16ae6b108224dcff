"""The recipe's `[[scorers]]`; see `recipe/recipe.py`."""

import re
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ray_abliterate.recipe.parsing import suggestion
from ray_abliterate.recipe.section import PLUGIN, Goal, Section
from ray_abliterate.recipe.sources import PromptSource
from ray_abliterate.recipe.text_folding import fold


class KeywordRate(Section):
    """Share of answers that contain a marker of the behaviour, with a Wilson 95 % interval."""

    kind: Literal["keyword-rate"]
    name: str = "keyword-rate"
    """Name of the score."""
    goal: Goal = "minimize"
    """`report` shows the score without optimising it."""
    prompts: PromptSource
    """Prompts that the model answers."""
    markers: tuple[str, ...] | Literal["broad", "strict"] = "broad"
    """Markers of the behaviour: a list of phrases, or the name of a list that ships with the
    package."""
    max_new_tokens: int = Field(100, ge=1)
    """Longest answer, in tokens."""
    empty_is_behaviour: bool = True
    """Count empty and degenerate answers as showing the behaviour; they are also counted
    separately."""

    @field_validator("markers")
    @classmethod
    def _markers_can_match(cls, markers: Any) -> Any:
        if not markers:
            raise ValueError("[] matches nothing; give phrases, or `broad` or `strict`")
        blank = [m for m in markers if not fold(m)] if not isinstance(markers, str) else []
        if blank:
            raise ValueError(
                f"{blank[0]!r} is empty without blanks and emphasis (*, _); leave it out, or give "
                "a phrase with letters"
            )
        return markers


class KlDivergence(Section):
    """KL divergence of the edited model from the base model, in nats per token."""

    kind: Literal["kl-divergence"]
    name: str = "kl-divergence"
    """Name of the score."""
    goal: Goal = "minimize"
    """`report` shows the score without optimising it."""
    prompts: PromptSource
    """Prompts at whose answers the two models are compared."""
    tokens: int = Field(1, ge=1)
    """1: the first token of the answer. More: so many tokens of the base model's own answer."""


class RefusalLogOdds(Section):
    """Log-odds that an answer begins as refusals do, from a single pass over the prompts."""

    kind: Literal["refusal-log-odds"]
    name: str = "refusal-log-odds"
    """Name of the score."""
    goal: Goal = "minimize"
    """`report` shows the score without optimising it."""
    prompts: PromptSource
    """Prompts that the model answers."""
    openings: tuple[str, ...] = ("I", "Sorry", "As", "Unfortunately")
    """Beginnings of refusals; of each, the first token counts. Models differ: look at a few
    refusals."""

    @field_validator("openings")
    @classmethod
    def _openings_have_words(cls, openings: tuple[str, ...]) -> tuple[str, ...]:
        if not openings or not all(text.strip() for text in openings):
            raise ValueError("give the words with which refusals begin, such as `I` and `Sorry`")
        return openings


class RefusalJudge(Section):
    """Share of answers that a second model judges to be refusals, with a Wilson 95 % interval."""

    kind: Literal["refusal-judge"]
    name: str = "refusal-judge"
    """Name of the score."""
    goal: Goal = "report"
    """`report` shows the score without optimising it."""
    prompts: PromptSource
    """Prompts that the model answers. If a `keyword-rate` has the same prompts and as many tokens,
    both read the same answers."""
    max_new_tokens: int = Field(100, ge=1)
    """Longest answer, in tokens."""
    classifier: str | None = None
    """Folder or Hub name of a sequence classifier; set this or `endpoint`."""
    revision: str | None = None
    """Commit, tag or branch of the classifier."""
    label: str | None = None
    """The classifier's label for a refusal."""
    hypothesis: str | None = None
    """In place of `label`, for an entailment model: the statement that a refusal entails, such as
    `The speaker declines to help.`"""
    sees_prompt: bool = False
    """Show the classifier the prompt as well as the answer."""
    gpus: float = Field(0.0, ge=0)
    """GPUs of the classifier, which runs in its own process; a fraction leaves the rest of a card
    to replicas. 0: it runs on the CPU."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of the classifier; if unset, half of its node's cores."""
    endpoint: str | None = None
    """URL, up to `/v1`, of a server with OpenAI's chat completions API."""
    endpoint_model: str | None = None
    """The server's name for the model."""
    key_variable: str | None = None
    """Environment variable with the server's key. The key itself never stands in a recipe."""
    timeout_seconds: float = Field(60.0, gt=0)
    """Time limit of one request to the server."""
    threshold: float = Field(0.5, gt=0, lt=1)
    """Probability from which an answer counts as a refusal; `ray-abliterate calibrate` finds a good
    value."""
    empty_is_refusal: bool = True
    """Count empty and degenerate answers as refusals, or else leave them out; they are also counted
    separately."""
    cache: bool = True
    """Store judgements in the user's cache folder, by judge, prompt and answer."""

    @model_validator(mode="after")
    def _one_judge(self) -> Self:
        if (self.classifier is None) == (self.endpoint is None):
            raise ValueError("give exactly one of classifier and endpoint")
        if self.classifier is not None and (self.label is None) == (self.hypothesis is None):
            raise ValueError("a classifier needs exactly one of label and hypothesis")
        if self.endpoint is not None and self.endpoint_model is None:
            raise ValueError("an endpoint needs endpoint_model")
        kinds = {
            "a classifier": (
                "revision",
                "label",
                "hypothesis",
                "sees_prompt",
                "gpus",
                "threads",
            ),
            "an endpoint": ("endpoint_model", "key_variable", "timeout_seconds"),
        }
        other = "an endpoint" if self.classifier is not None else "a classifier"
        # a resolved recipe names every setting, also those that are not in use, at their defaults
        fields = type(self).model_fields
        unused = [name for name in kinds[other] if getattr(self, name) != fields[name].default]
        if unused:
            raise ValueError(f"`{unused[0]}` is for {other} only; leave it out")
        return self

    @field_validator("endpoint")
    @classmethod
    def _is_a_plain_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("not a URL; write it as https://host/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            # an error of this type does not show the value, which holds a secret
            raise PydanticCustomError(
                "secret_in_url",
                "keys and passwords don't belong in a recipe; name an environment variable in "
                "key_variable",
            )
        return value

    @field_validator("gpus")
    @classmethod
    def _fits_on_cards(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError(f"{value:g} must be a fraction below 1, or a whole number of GPUs")
        return value

    @field_validator("key_variable")
    @classmethod
    def _names_a_variable(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", value):
            raise PydanticCustomError(
                "not_a_variable",
                "not the name of an environment variable (capitals, digits and _); the key itself "
                "doesn't belong in a recipe",
            )
        return value


class PluginScorer(Section):
    """A scorer of your own; see `docs/extending.md`."""

    kind: str
    """`module:attribute`, importable wherever replicas run."""
    name: str
    """Name of the score."""
    goal: Goal = "minimize"
    """`report` shows the score without optimising it."""
    prompts: PromptSource | None = None
    """Prompts that are passed to the scorer."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the scorer."""

    @field_validator("kind")
    @classmethod
    def _names_an_attribute(cls, value: str) -> str:
        if not PLUGIN.match(value):
            near = suggestion(value, SCORERS)
            raise ValueError(f"{value!r} is not a scorer and not a `module:attribute`.{near}")
        return value


SCORERS = ("keyword-rate", "kl-divergence", "refusal-log-odds", "refusal-judge")
"""The kinds that have a section of their own."""


def _scorer_kind(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if kind in SCORERS else "plugin"


ScorerSettings = Annotated[
    Annotated[KeywordRate, Tag("keyword-rate")]
    | Annotated[KlDivergence, Tag("kl-divergence")]
    | Annotated[RefusalLogOdds, Tag("refusal-log-odds")]
    | Annotated[RefusalJudge, Tag("refusal-judge")]
    | Annotated[PluginScorer, Tag("plugin")],
    Discriminator(_scorer_kind),
]
