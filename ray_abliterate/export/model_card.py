"""The model card of an export: what was edited, how, what it scored, and what it must not be
taken for. Holds no prompts, no answers, no paths and no names of the machine it was written on.

Names and settings may hold anything: the card's metadata are written by a YAML library, and every
value that the template puts into the text is escaped unless this module made it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from ray_abliterate.search.score_text import describe_score
from ray_abliterate.data.hub import MODEL_NAME
from ray_abliterate.evaluation.suites.build import build_suites
from ray_abliterate.export.public_names import Original, Published
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.suite_results import BASE, Finding, comparison_text, label
from ray_abliterate.recipe import SuiteFile
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.plan import Plan
from ray_abliterate.search.score import Score

NORMS = {
    "none": "no norm of the weights is kept",
    "row": "each matrix keeps the norm of its output rows",
    "column": "each matrix keeps the norm of its input columns",
}
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Metadata of the base model's card that hold for the edited model, too."""
MARKDOWN = re.compile(r"([\\`*_\[\]<>|#~&$])")
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")

Kind = Literal["merged", "adapter"]


class Markdown(str):
    """Text that is Markdown already, and is not escaped again."""


def model_card(
    directory: RunDirectory, trial: Trial, original: Original, kind: Kind = "merged"
) -> str:
    """The card of the model that a trial's plan makes.

    Args:
        directory: The run.
        trial: Whose plan was written.
        original: The base model, whose own card tells its licence.
        kind: Whether whole weights were written, or an adapter.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("ray_abliterate.export"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=escaped,
        keep_trailing_newline=True,
    )
    pages.filters |= {"code": code, "cell": escaped}
    carried, quantized = front_matter_of(original.folder / "README.md"), original.quantized
    return pages.get_template("model_card.md.jinja").render(
        front_matter=Markdown(_front_matter(original.base, carried, kind)),
        adapter=kind == "adapter",
        base=_named(original.base),
        searched=_named(quantized) if quantized else None,
        direction=_direction(directory, trial.plan),
        norm={"mode": trial.plan.norm, "meaning": NORMS[trial.plan.norm]},
        number=trial.number,
        trials=len(directory.trials()),
        strengths=list(_strengths(directory, trial.plan)),
        plan=Markdown(json.dumps(json.loads(trial.plan.to_json()), indent=2)),
        pruned=trial.pruned,
        scores=list(_score_rows(directory, trial)),
        suites=list(_suite_rows(directory, trial)),
        licence=_one(carried.get("license_name")) or _one(carried.get("license")),
        licence_link=_one(carried.get("license_link")),
        versions=_versions(directory),
        dtype=directory.read_environment()["model"]["dtype"],
        quantization=directory.read_environment()["model"].get("quantization", ""),
    )


def public_origin(origin: str) -> str | None:
    """Where prompts came from, if everybody can read them there: the Hub, or this package."""
    return origin.removeprefix("hub:") if origin.startswith(("hub:", "builtin:")) else None


# Escaping


def escaped(value: Any) -> Any:
    """A value as Markdown shows it as it is, on one line; Markdown stays."""
    if isinstance(value, Markdown) or not isinstance(value, str):
        return value
    return Markdown(MARKDOWN.sub(r"\\\1", UNPRINTABLE.sub(" ", value)))


def code(value: str) -> Markdown:
    """A value in a span of code, whatever backticks it has."""
    text = UNPRINTABLE.sub(" ", value).strip() or " "
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return Markdown(f"{fence}{space}{text}{space}{fence}")


# Metadata


def front_matter_of(readme: Path) -> dict[str, Any]:
    """The metadata at the head of a model card; empty if there are none that can be read."""
    import yaml

    try:
        text = readme.read_text(encoding="utf-8")
        found = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
        values = yaml.safe_load(found[1]) if found else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _front_matter(base: Published, carried: Mapping[str, Any], kind: Kind) -> str:
    import yaml

    values: dict[str, Any] = {key: carried[key] for key in CARRIED if _is_text(carried.get(key))}
    if base.hub is not None:
        relation = "adapter" if kind == "adapter" else "finetune"
        values |= {"base_model": base.hub, "base_model_relation": relation}
    values["library_name"] = "peft" if kind == "adapter" else "transformers"
    values["tags"] = ["abliterated", "ray-abliterate"]
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)
    return text.rstrip("\n")


def _is_text(value: Any) -> bool:
    """A text, or a list of texts: what these metadata may be."""
    parts = value if isinstance(value, list) else [value]
    return bool(parts) and all(isinstance(part, str) and part for part in parts)


def _one(value: Any) -> str | None:
    return ", ".join(value if isinstance(value, list) else [value]) if _is_text(value) else None


# What the run knows


def _named(model: Published) -> dict[str, Any]:
    name, hub = model.called, model.hub
    on_hub = hub is not None and MODEL_NAME.fullmatch(hub)
    link = f"[{escaped(name)}](https://huggingface.co/{hub})" if on_hub else f"**{escaped(name)}**"
    return {"name": name, "link": Markdown(link), "revision": model.revision}


def _direction(directory: RunDirectory, plan: Plan) -> dict[str, Any]:
    found, settings = directory.directions(), directory.read_recipe().direction
    at_layer = f"one for all layers, taken at layer {plan.direction_layer:.2f}"
    offset = plan.source_offset
    own = "each layer's own" + ("" if offset is None else f", taken {offset:+.2f} layers from it")
    many = f", up to {found.rank} a layer" if found and found.rank > 1 else ""
    many += ", of each component's own" if found and found.components else ""
    known = directory.read_environment().get("prompts", {})
    filtered = directory.read_environment().get("filtered", {})
    known = {name: {**facts, **_kept(filtered.get(name))} for name, facts in known.items()}
    return {
        "method": found.method if found else settings.method,
        "scope": (at_layer if plan.scope == "global" else own) + many,
        "projected": settings.project_out_neutral,
        "quantile": settings.winsorize_quantile,
        "sets": [
            {
                "title": title,
                "prompts": known[name]["prompts"],
                "origin": public_origin(known[name]["origin"]),
                "fingerprint": known[name]["fingerprint"][:16],
            }
            for name, title in (("behaviour", "With the behaviour"), ("neutral", "Without it"))
            if name in known
        ],
    }


def _kept(filtered: Mapping[str, Any] | None) -> dict[str, Any]:
    """Of a set, what is said of the prompts that were kept, if others were left out."""
    if filtered is None:
        return {}
    return {"prompts": filtered["kept"], "fingerprint": filtered["fingerprint"]}


def _strengths(directory: RunDirectory, plan: Plan) -> Iterator[dict[str, Any]]:
    layers = directory.read_environment()["model"]["layers"]
    for component, profile in plan.profiles:
        edited = [n for n, strength in enumerate(profile.strengths(layers)) if strength > 0]
        yield {
            "component": component,
            "peak": f"{profile.peak:.3f}" if edited else "off",
            "layer": f"{profile.peak_layer:.1f}",
            "floor": f"{profile.floor:.2f}",
            "reach": f"{profile.reach:.1f}",
            "edited": f"{edited[0]} to {edited[-1]}" if edited else "none",
        }


def _score_rows(directory: RunDirectory, trial: Trial) -> Iterator[dict[str, Any]]:
    assert trial.scorecard is not None
    baseline = directory.baseline()
    base: dict[str, Score] = {s.name: s for s in baseline.scorecard.scores} if baseline else {}
    for score in trial.scorecard.scores:
        was = base.get(score.name)
        yield {
            "name": score.name,
            "goal": score.goal,
            "own": _shown(score),
            "base": _shown(was) if was else "not measured",
        }


def _shown(score: Score) -> str:
    return f"{describe_score(score)} {score.unit}".rstrip()


def _suite_rows(directory: RunDirectory, trial: Trial) -> Iterator[dict[str, Any]]:
    """What suites found of the trial, each beside the base model."""
    settings = SuiteFile.of(directory.read_environment().get("suites", ()))
    kept = directory.suite_results(settings)
    if label(trial.number) not in kept.labels:
        return
    for suite in build_suites(settings, directory.read_base()):
        found, base = kept.finding(label(trial.number), suite), kept.finding(BASE, suite)
        if found is None or found.score is None:
            continue
        compared = comparison_text(found.comparison) if found.comparison else ""
        yield {
            "name": suite.name,
            "own": _finding(found) + ("" if found.whole else " *"),
            "base": _finding(base),
            "difference": compared or "not measured",
            "whole": found.whole,
        }


def _finding(found: Finding | None) -> str:
    return _shown(found.score) if found and found.score else "not measured"


def _versions(directory: RunDirectory) -> list[str]:
    versions = directory.read_environment().get("versions", {})
    libraries = ("ray-abliterate", "transformers", "torch", "python")
    return [f"{n} {versions[n]}" for n in libraries if str(versions.get(n, ""))[:1].isdigit()]
