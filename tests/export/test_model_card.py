"""The card of an export: what it says, what it keeps to itself, and names that mean mischief."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from ray_abliterate.directions.directions import Directions
from ray_abliterate.evaluation.suites.suite import SuiteChunk
from ray_abliterate.export.model_card import (
    ExportKind,
    code_span,
    escape_markdown,
    model_card,
    read_front_matter,
)
from ray_abliterate.export.original_model import OriginalModel
from ray_abliterate.export.public_names import PublicName
from ray_abliterate.pipeline.directory import Baseline, RunDirectory
from ray_abliterate.recipe import Recipe, SuiteFile
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.plan import Plan
from ray_abliterate.search.score import Score, Scorecard

RECIPE = """
[model]
name = "owner/some-model"

[prompts]
behaviour = { file = "/home/somebody/secret-prompts.txt" }
neutral = { dataset = "owner/set", column = "text" }

[[scorers]]
kind = "keyword-rate"
prompts = { file = "/home/somebody/held-out.txt" }
"""

NASTY = [
    "a\n---\nlicense: mit\n---\n# Injected",
    "x: [y, {z: !!python/object/apply:os.system ['true']}]",
    "</script><script>alert(1)</script>",
    "[click](javascript:alert(1)) ![img](http://x/y.png)",
    "`code` ``` fence\n```\n| a | b |\n|---|---|",
    "*bold* _it_ ~~no~~ <b>html</b> &amp; $x$ | bar",
    'quote " and \\ back',
    "# heading",
    "emoji 🦀 control \x07 \x85 \u2028 end",
    "'single' {{ 7*7 }} {% raw %}",
    "yes",
    "- item",
    "%TAG & *alias !tag @at",
]


def plan(norm: str = "row") -> Plan:
    params = {
        "direction_scope": "global", "direction_layer": 2.4, "attn.peak": 1.2,
        "attn.peak_layer": 2.0, "attn.floor": 0.5, "attn.reach": 1.5, "mlp.peak": -0.1,
        "mlp.peak_layer": 2.0, "mlp.floor": 0.5, "mlp.reach": 1.5,
    }  # fmt: skip
    return Plan.from_params(params, norm)  # type: ignore[arg-type]


def a_run(folder: Path, name: str = "owner/some-model", **model: Any) -> tuple[RunDirectory, Trial]:
    import torch

    recipe = Recipe.parse(RECIPE, "recipe.toml")
    settings = recipe.model.model_copy(update={"name": name})
    directory = RunDirectory.create(folder, recipe.model_copy(update={"model": settings}), "")
    scores = (
        Score("keyword-rate", 0.25, 0.1, 0.5, detail={"hits": 5, "total": 20}),
        Score("kl-divergence", 0.1, 0.05, 0.2, unit="nats per token"),
    )
    trial = Trial(7, plan(), Scorecard(scores), 1.0)
    directory.append_trial(trial)
    base = (Score("keyword-rate", 0.9, 0.7, 1.0, detail={"hits": 18, "total": 20}),)
    directory.save_baseline(Baseline(Scorecard(base), (), 2))
    vectors = torch.nn.functional.normalize(torch.ones(4, 8), dim=1)
    directory.save_directions(Directions(vectors, "mean-difference", {"behaviour": "b"}))
    facts = {"layers": 4, "hidden": 8, "components": ["attn", "mlp"], "dtype": "bfloat16"}
    directory.record_facts(
        model={**facts, "revision": "0123abc", **model},
        versions={"ray-abliterate": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "x": "9"},
        prompts={
            "behaviour": {
                "origin": "file:/home/somebody/secret-prompts.txt",
                "prompts": 64,
                "fingerprint": "b" * 64,
            },
            "neutral": {"origin": "hub:owner/set@12 text", "prompts": 65, "fingerprint": "n" * 64},
        },
        base=str(folder),
    )
    return directory, trial


def metadata(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    values: dict[str, Any] = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    return values


def base_of(directory: RunDirectory, folder: Path | None = None) -> OriginalModel:
    """The model that a run searched on; its folder holds nothing if none is given."""
    return OriginalModel(folder or directory.path, PublicName.searched(directory))


def with_licence(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


def test_the_card_says_what_was_edited_how_and_what_it_scored(tmp_path: Path) -> None:
    directory, trial = a_run(tmp_path / "run")
    card = model_card(directory, trial, base_of(directory))
    assert "[owner/some-model](https://huggingface.co/owner/some-model)" in card
    assert "(revision `0123abc`)" in card
    assert "Direction: `mean-difference`, one for all layers, taken at layer 2.40" in card
    assert "Norm mode `row`: each matrix keeps the norm of its output rows." in card
    assert "| attn | 1.200 | 2.0 | 0.50 | 1.5 | 1 to 3 |" in card
    assert "| mlp | off | 2.0 | 0.50 | 1.5 | none |" in card
    row = r"| keyword-rate | minimize | 0.25 5/20 \[0.1, 0.5\] | 0.9 18/20 \[0.7, 1\] |"
    assert row in card
    assert r"| kl-divergence | minimize | 0.1 \[0.05, 0.2\] nats per token | not measured |" in card
    assert "neutral" not in metadata(card) and "65 prompts of `owner/set@12 text`" in card
    assert "Made with ray-abliterate 0.1.0, torch 2.13.0, python 3.11.7; searched in bfloat16." in (
        card
    )
    assert "ray-abliterate reproduce" in card
    written = card.partition("```json\n")[2].partition("```")[0]
    assert Plan.from_json(json.dumps(json.loads(written))) == trial.plan
    assert "\n\n\n" not in card and card.endswith(".\n")


def test_the_card_keeps_paths_prompts_and_users_to_itself(tmp_path: Path) -> None:
    directory, trial = a_run(tmp_path / "run", name=str(tmp_path))
    card = model_card(directory, trial, base_of(directory))
    assert f"**{escape_markdown(tmp_path.name)}**" in card
    for private in ("somebody", "secret-prompts", "held-out", "/home", str(tmp_path.parent)):
        assert private not in card
    assert "base_model" not in metadata(card)


def test_the_card_of_originals_names_the_quantized_form_that_was_searched(tmp_path: Path) -> None:
    directory, trial = a_run(tmp_path / "run", "owner/some-model-w4", quantization="gptq int4")
    quantized = PublicName.searched(directory)
    base = PublicName("owner/some-model", "owner/some-model", "fff111")
    card = model_card(directory, trial, OriginalModel(tmp_path, base, quantized))
    assert metadata(card)["base_model"] == "owner/some-model"
    assert (
        "weights of [owner/some-model](https://huggingface.co/owner/some-model) (revision `fff111`)"
        in card
    )
    assert (
        "[owner/some-model-w4](https://huggingface.co/owner/some-model-w4) (revision `0123abc`)"
        in card
    )
    assert "on its weights (`gptq int4`)" in card and "were edited" in card
    alone = model_card(directory, trial, OriginalModel(tmp_path, quantized))
    assert "quantized form of the base model" not in alone and "`gptq int4`" in alone


@pytest.mark.parametrize(
    ("kind", "relation", "library"),
    [("merged", "finetune", "transformers"), ("adapter", "adapter", "peft")],
)
def test_metadata_name_the_base_model_and_what_became_of_it(
    tmp_path: Path, kind: ExportKind, relation: str, library: str
) -> None:
    directory, trial = a_run(tmp_path / "run")
    card = model_card(directory, trial, base_of(directory), kind)
    assert metadata(card) == {
        "base_model": "owner/some-model",
        "base_model_relation": relation,
        "library_name": library,
        "tags": ["abliterated", "ray-abliterate"],
    }
    assert ("This is an adapter" in card) == (kind == "adapter")


def test_the_base_models_licence_is_carried_over(tmp_path: Path) -> None:
    directory, trial = a_run(tmp_path / "run")
    text = (
        "---\nlicense: other\nlicense_name: some-terms\nlicense_link: LICENSE\n"
        "language: [en, de]\ntags: [chat]\nextra_gated_prompt: no\n---\n# Card\n"
    )
    base = base_of(directory, with_licence(tmp_path / "base", text))
    card = model_card(directory, trial, base)
    found = metadata(card)
    assert found["license"] == "other" and found["license_name"] == "some-terms"
    assert found["license_link"] == "LICENSE" and found["language"] == ["en", "de"]
    assert "extra_gated_prompt" not in found and "chat" not in found["tags"]
    assert "That of the base model: `some-terms` (`LICENSE`)." in card


@pytest.mark.parametrize(
    "text",
    ["", "# no metadata", "---\n[broken\n---\n", "---\n- a\n- list\n---\n",
     "---\nlicense: {a: b}\n---\n", "---\nlicense: !!python/object/apply:os.getcwd []\n---\n"],
)  # fmt: skip
def test_without_a_readable_licence_the_card_refers_to_the_base_models(
    tmp_path: Path, text: str
) -> None:
    directory, trial = a_run(tmp_path / "run")
    base = base_of(directory, with_licence(tmp_path / "base", text))
    card = model_card(directory, trial, base)
    assert "license" not in metadata(card)
    assert "The licence and the terms of use of the base model apply to this one." in card
    assert read_front_matter(tmp_path / "missing.md") == {}


def tags(card: str) -> Counter[str]:
    """What a reader of Markdown with tables and raw HTML makes of the text: tags, and how many."""
    page = MarkdownIt("commonmark").enable("table").render(card.partition("\n---\n")[2])
    return Counter(re.findall(r"<(\w+)", page))


@pytest.mark.parametrize("name", NASTY)
def test_a_nasty_name_stays_a_name(tmp_path: Path, name: str) -> None:
    """In the metadata, the heading, the text and the tables."""
    cards = []
    for number, given in enumerate(("a harmless name", name)):
        directory, trial = a_run(tmp_path / f"{number}", name=given, revision=given)
        scores = (Score(given, 0.5, 0.0, 1.0, unit=given),)
        readme = "---\n" + yaml.safe_dump({"license": given}) + "---\n"
        base = base_of(directory, with_licence(tmp_path / f"base-{number}", readme))
        cards.append(model_card(directory, Trial(7, trial.plan, Scorecard(scores), 1.0), base))
    found = metadata(cards[1])
    assert found["base_model"] == name and found["license"] == name
    assert found["tags"] == ["abliterated", "ray-abliterate"]
    assert tags(cards[1]) == tags(cards[0])


def test_escapes_are_exact() -> None:
    assert escape_markdown("a*b_c[d](e)<f>|g#h") == r"a\*b\_c\[d\](e)\<f\>\|g\#h"
    assert code_span("a`b``c") == "``` a`b``c ```"
    assert code_span("") == "` `"
    assert escape_markdown("x\ny|z") == r"x y\|z"


def test_validation_is_compared_with_the_base_model_by_paired_difference(tmp_path: Path) -> None:
    directory, trial = a_run(tmp_path / "run")
    settings = SuiteFile.of([{"kind": "over-refusal", "name": "harmless"}])
    assert "## Validation" not in model_card(directory, trial, base_of(directory))
    directory.record_facts(suites=[setting.model_dump(mode="json") for setting in settings])
    kept = directory.suite_results(settings)
    for model, values in (("base", [1.0, 1.0, 1.0, 0.0]), ("trial-7", [0.0, 0.0, 1.0, 0.0])):
        items = tuple(f"i{n}" for n in range(4))
        chunk = SuiteChunk(
            "harmless", "c", "fp", "", items, {"refused": tuple(values)}, {}, {}, ()
        )  # fmt: skip
        kept.add(model, chunk)
    card = model_card(directory, trial, base_of(directory))
    assert "## Validation" in card and "was not measured" not in card
    row = next(line for line in card.splitlines() if line.startswith("| harmless |"))
    assert r"| 0.25 \[0.0456" in row and r"| 0.75 \[0.301" in row and r" \* |" in row
    assert r"| -0.5 \[-0.79, +0.14\], p 0.5 |" in row
    assert "Not all of its items were measured" in card
