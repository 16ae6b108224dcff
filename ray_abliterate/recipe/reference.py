"""The recipe's reference, `docs/recipe.md`, generated from the recipe's types and docstrings.

`python -m ray_abliterate.recipe.reference > docs/recipe.md` writes it; a test compares the two.
"""

import json
import sys
from collections.abc import Mapping
from inspect import getdoc
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ray_abliterate.recipe.direction import DirectionSettings, EnsembleMember
from ray_abliterate.recipe.model import COMPONENT_NAMES, ModelSettings, WriterSettings
from ray_abliterate.recipe.run import EvaluationSettings, RunSettings
from ray_abliterate.recipe.scorers import (
    KeywordRate,
    KlDivergence,
    PluginScorer,
    RefusalJudge,
    RefusalLogOdds,
)
from ray_abliterate.recipe.search import EditSettings, SearchSettings
from ray_abliterate.recipe.sources import PromptSettings, PromptSource, TableSource
from ray_abliterate.recipe.space import ComponentSpace, Interval, SpaceSettings
from ray_abliterate.recipe.suites import (
    KlSuite,
    LmEvalSuite,
    MultipleChoiceSuite,
    OverRefusalSuite,
    PerplexitySuite,
    PluginSuite,
    ResponsesSuite,
)

INTRO = """\
# The recipe

A recipe is a TOML file that says what a run does: which model it edits, which behaviour it removes,
what it measures and what it searches. `ray-abliterate init` writes one to start from. It is read
once and checked before anything is loaded: an unknown or impossible setting is refused by name. A
run never changes it; the run directory holds it as given (`recipe.toml`) and with all defaults
filled in (`recipe.resolved.json`).

A recipe needs `[model]`, two prompt sets and one scorer:

```toml
[model]
name = "demo"

[prompts.behaviour]
builtin = "cooking-train"

[prompts.neutral]
builtin = "other-train"

[[scorers]]
kind = "keyword-rate"
prompts = { builtin = "cooking-heldout" }

[[scorers]]
kind = "kl-divergence"
prompts = { builtin = "other-heldout" }
```

## Overrides on the command line

`KEY=VALUE` after the recipe changes one setting for one run. The key is the setting's full name,
with a number from 0 for an entry of a list; the value is written as in TOML, but text needs no
quotes:

```sh
ray-abliterate run recipe.toml search.trials=50 scorers.1.tokens=4
ray-abliterate run recipe.toml model.name=Qwen/Qwen3-0.6B "search.space.peak=[0.5, 2.0]"
ray-abliterate run recipe.toml "prompts.neutral.split=[:200]"
```

Of two values for one key the later one counts.
"""

SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("`[model]`", ModelSettings),
    ("`[[model.writers]]`", WriterSettings),
    ("`[prompts]`", PromptSettings),
    ("A prompt set", PromptSource),
    ("`[direction]`", DirectionSettings),
    ("`[[direction.ensemble]]`", EnsembleMember),
    ("`[edit]`", EditSettings),
    ("`[search]`", SearchSettings),
    ("`[search.space]`", SpaceSettings),
    ("`[search.space.components.NAME]`", ComponentSpace),
    ('`[[scorers]]` with `kind = "keyword-rate"`', KeywordRate),
    ('`[[scorers]]` with `kind = "kl-divergence"`', KlDivergence),
    ('`[[scorers]]` with `kind = "refusal-log-odds"`', RefusalLogOdds),
    ('`[[scorers]]` with `kind = "refusal-judge"`', RefusalJudge),
    ("`[[scorers]]` of your own", PluginScorer),
    ('`[[suites]]` with `kind = "multiple-choice"`', MultipleChoiceSuite),
    ('`[[suites]]` with `kind = "over-refusal"`', OverRefusalSuite),
    ('`[[suites]]` with `kind = "kl"`', KlSuite),
    ('`[[suites]]` with `kind = "perplexity"`', PerplexitySuite),
    ('`[[suites]]` with `kind = "responses"`', ResponsesSuite),
    ('`[[suites]]` with `kind = "lm-eval"`', LmEvalSuite),
    ("`[[suites]]` of your own", PluginSuite),
    ("A table", TableSource),
    ("`[evaluation]`", EvaluationSettings),
    ("`[run]`", RunSettings),
)

NOTES: Mapping[type[BaseModel], str] = {
    PromptSource: (
        "It stands under `prompts.behaviour`, `prompts.neutral`, and `prompts` of a scorer. "
        "Relative paths are looked up in the recipe's folder, then in the working folder. A slice "
        "counts the non-blank lines of a text file, and the rows of a table."
    ),
    ComponentSpace: f"NAME is one of {', '.join(f'`{name}`' for name in COMPONENT_NAMES)}.",
}

WORDS: Mapping[Any, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "`true` or `false`",
    Interval: "`[low, high]`",
    Any: "any value",
    PromptSource: "a prompt set",
    TableSource: "a table",
    SpaceSettings: "section",
    ComponentSpace: "section",
    WriterSettings: "section",
    EnsembleMember: "section",
}

BOUNDS = (("ge", "from {}"), ("gt", "above {}"), ("le", "up to {}"), ("lt", "below {}"))


def recipe_markdown() -> str:
    """Return the reference as Markdown: per section a heading and a table of its settings."""
    return "\n".join([INTRO, *(_section(title, model) for title, model in SECTIONS)])


def _section(title: str, model: type[BaseModel]) -> str:
    rows = [_row(name, field) for name, field in model.model_fields.items()]
    paragraphs = [f"## {title}", getdoc(model) or "", NOTES.get(model, "")]
    head = "| setting | type | default | meaning |\n|---|---|---|---|"
    return "\n\n".join([*(p for p in paragraphs if p), "\n".join([head, *rows])]) + "\n"


def _row(name: str, field: FieldInfo) -> str:
    cells = (f"`{name}`", _type(field), _default(field), _meaning(name, field))
    return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"


def _meaning(name: str, field: FieldInfo) -> str:
    if field.description is None and name in SpaceSettings.model_fields:
        return f"`search.space.{name}` for this component; that range if unset."
    return field.description or "Selects this section."


def _type(field: FieldInfo) -> str:
    bounds = [
        words.format(getattr(limit, name))
        for limit in field.metadata
        for name, words in BOUNDS
        if hasattr(limit, name)
    ]
    return (
        ", ".join([_words(field.annotation), " ".join(bounds)])
        if bounds
        else _words(field.annotation)
    )


def _words(annotation: Any) -> str:
    """Return a type in words."""
    if annotation in WORDS:
        return WORDS[annotation]
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _either([f"`{value}`" for value in parts])
    if origin in (Union, UnionType):
        return _either([_words(part) for part in parts if part is not NoneType])
    if origin is tuple:
        return f"list of {_words(parts[0])}".replace("section", "sections")
    if origin is dict:
        return (
            "table"
            if parts[1] is Any
            else f"table of {_words(parts[1])}".replace("section", "sections")
        )
    raise TypeError(f"recipe/reference.py has no words for {annotation}; add them to WORDS")


def _either(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "unset"
    if isinstance(value, BaseModel):
        return "its own defaults"
    return f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    """Return a value as TOML on one line."""
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_none=True)
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key} = {_toml(part)}" for key, part in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(_toml(part) for part in value)}]"
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    sys.stdout.write(recipe_markdown())
