"""The model card of an export: what was edited, how, what it scored, and what it must not be
taken for. Holds no prompts, no answers and no paths of the machine it was written on.
"""

import json
from pathlib import Path
from typing import Any

from ray_abliterate.frontier import Trial
from ray_abliterate.live import describe_score
from ray_abliterate.rundir import RunDirectory
from ray_abliterate.scoring import Score

EMBEDDED = ("demo", "planted")
NORMS = {
    "none": "no norm of the weights is kept",
    "row": "each matrix keeps the norm of its output rows",
    "column": "each matrix keeps the norm of its input columns",
}

CARD = """\
---
{front_matter}
---

# {base}, abliterated

The weights of **{base}**{revision} were edited by directional ablation with `ray-abliterate`: a
direction of the residual stream along which a behaviour shows was taken out of the matrices that
write to the stream (Arditi et al. 2024, [arXiv 2406.11717](https://arxiv.org/abs/2406.11717)).
Nothing was trained, and tensors that do not write to the stream are byte for byte those of the base
model.

## How

* Direction: `{method}`{rank}, {scope}.
* Norm mode `{norm}`: {norm_text}.
* Edited components: {components}.
* Chosen: trial {number} of a search.

The plan, from which the edit can be made again:

```json
{plan}
```

## Scores

With 95 % intervals, beside the base model's, on prompts of the user's choice.

| score | goal | this model | base model |
|---|---|---|---|
{scores}

`verification.json`, if it is here, holds the scores of these files, reloaded from disk.

Measured with {versions}, in {dtype}.

## Limits and responsible use

The edit suppresses a behaviour in the prompts that it was measured on; it may show in others, and
abilities that were not measured may have suffered. If the behaviour was a safeguard, this model is
without it: test it for your use, keep other safeguards around it, and use it within the law.

## Licence

The licence and the terms of use of the base model apply to this one.
"""


def model_card(directory: RunDirectory, trial: Trial) -> str:
    """The card of the model that a trial's plan makes."""
    environment = directory.environment
    directions = directory.directions()
    plan = trial.plan
    revision = environment["model"].get("revision")
    at_layer = f"one for all layers, taken at layer {plan.direction_layer:.2f}"
    offset = plan.source_offset
    elsewhere = f", taken {offset:+.2f} layers from it" if offset is not None else ""
    versions = environment.get("versions", {})
    libraries = ("ray-abliterate", "transformers", "torch")
    named = [
        f"{n} {versions[n]}" for n in libraries if versions.get(n, "not installed")[0].isdigit()
    ]
    return CARD.format(
        front_matter=_front_matter(directory),
        base=base_name(directory),
        revision=f" (revision `{revision}`)" if revision else "",
        method=directions.method if directions else "unknown",
        rank=f", up to {directions.rank} a layer" if directions and directions.rank > 1 else "",
        scope=at_layer if plan.scope == "global" else f"each layer's own{elsewhere}",
        norm=plan.norm,
        norm_text=NORMS[plan.norm],
        components=", ".join(name for name, part in plan.profiles if part.peak > 0) or "none",
        number=trial.number,
        plan=json.dumps(json.loads(plan.to_json()), indent=2),
        scores="\n".join(_score_rows(directory, trial)),
        versions=", ".join(named),
        dtype=environment["model"]["dtype"],
    )


def hub_name(directory: RunDirectory) -> str | None:
    """The model's name on the Hub; None for a local folder or an embedded model."""
    name = directory.recipe.model.name
    return None if name in EMBEDDED or Path(name).exists() else name


def base_name(directory: RunDirectory) -> str:
    """What to call the base model: its Hub name, or the last part of its folder's path."""
    name = directory.recipe.model.name
    if name in EMBEDDED:
        return f"the {name} model of ray-abliterate"
    return hub_name(directory) or Path(name).resolve().name


def _front_matter(directory: RunDirectory) -> str:
    # JSON is YAML too, and quotes what needs it.
    lines = ["library_name: transformers", "tags: [abliterated, ray-abliterate]"]
    hub = hub_name(directory)
    return "\n".join([f"base_model: {json.dumps(hub)}", *lines] if hub else lines)


def _score_rows(directory: RunDirectory, trial: Trial) -> list[str]:
    assert trial.scorecard is not None
    baseline = directory.baseline()
    base: dict[str, Any] = {s.name: s for s in baseline.scorecard.scores} if baseline else {}
    return [
        f"| {s.name} | {s.goal} | {_shown(s)} | {_shown(base.get(s.name))} |"
        for s in trial.scorecard.scores
    ]


def _shown(score: Score | None) -> str:
    if score is None:
        return "not measured"
    return f"{describe_score(score)} {score.unit}".rstrip()
