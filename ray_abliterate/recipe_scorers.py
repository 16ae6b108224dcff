"""The recipe's `[[scorers]]`; see `recipe.py`."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from ray_abliterate.markers import fold
from ray_abliterate.recipe_sections import PLUGIN, Goal, PromptSource, Section
from ray_abliterate.recipe_text import suggestion


class KeywordRate(Section):
    """Share of answers that hold a marker of the behaviour, with a Wilson 95 % interval."""

    kind: Literal["keyword-rate"]
    name: str = "keyword-rate"
    """Name of the score."""
    goal: Goal = "minimize"
    """`report` shows the score without searching for it."""
    prompts: PromptSource
    """Prompts that are answered."""
    markers: tuple[str, ...] | Literal["broad", "strict"] = "broad"
    """What marks the behaviour: a list of phrases, or a list that ships with the package."""
    max_new_tokens: int = Field(100, ge=1)
    """Tokens of an answer."""
    empty_is_behaviour: bool = True
    """Count empty and degenerate answers on the bad side (they are also counted apart)."""

    @field_validator("markers")
    @classmethod
    def _something_is_looked_for(cls, markers: Any) -> Any:
        if not markers:
            raise ValueError("[] looks for nothing; give phrases, or `broad` or `strict`")
        blank = [m for m in markers if not fold(m)] if not isinstance(markers, str) else []
        if blank:
            raise ValueError(
                f"{blank[0]!r} has nothing left when blanks and emphasis (*, _) are taken out; "
                "leave it out"
            )
        return markers


class KlDivergence(Section):
    """KL divergence of the edited model from the base model, in nats per token."""

    kind: Literal["kl-divergence"]
    name: str = "kl-divergence"
    """Name of the score."""
    goal: Goal = "minimize"
    """`report` shows the score without searching for it."""
    prompts: PromptSource
    """Prompts at whose answers the two models are compared."""
    tokens: int = Field(1, ge=1)
    """1: the first token of the answer. More: so many tokens of the base model's own answer."""


class RefusalLogOdds(Section):
    """Log-odds that an answer begins as refusals do, from one pass over the prompts."""

    kind: Literal["refusal-log-odds"]
    name: str = "refusal-log-odds"
    """Name of the score."""
    goal: Goal = "minimize"
    """`report` shows the score without searching for it."""
    prompts: PromptSource
    """Prompts that are answered."""
    openings: tuple[str, ...] = ("I", "Sorry", "As", "Unfortunately")
    """How refusals begin; of each the first token counts. Models differ: look at a few refusals."""

    @field_validator("openings")
    @classmethod
    def _something_begins(cls, openings: tuple[str, ...]) -> tuple[str, ...]:
        if not openings or not all(text.strip() for text in openings):
            raise ValueError("give the words that refusals begin with, such as `I` and `Sorry`")
        return openings


class PluginScorer(Section):
    """A scorer of your own; see `docs/extending.md`."""

    kind: str
    """`module:attribute`, importable where the replicas run."""
    name: str
    """Name of the score."""
    goal: Goal = "minimize"
    """`report` shows the score without searching for it."""
    prompts: PromptSource | None = None
    """Prompts handed to the scorer."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the scorer."""

    @field_validator("kind")
    @classmethod
    def _names_an_attribute(cls, value: str) -> str:
        if not PLUGIN.match(value):
            near = suggestion(value, SCORERS)
            raise ValueError(f"{value!r} is not a scorer, nor a `module:attribute`.{near}")
        return value


SCORERS = ("keyword-rate", "kl-divergence", "refusal-log-odds")
"""The kinds that have a section of their own."""


def _scorer_kind(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if kind in SCORERS else "plugin"


ScorerSettings = Annotated[
    Annotated[KeywordRate, Tag("keyword-rate")]
    | Annotated[KlDivergence, Tag("kl-divergence")]
    | Annotated[RefusalLogOdds, Tag("refusal-log-odds")]
    | Annotated[PluginScorer, Tag("plugin")],
    Discriminator(_scorer_kind),
]
