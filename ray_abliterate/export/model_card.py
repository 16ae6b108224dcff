"""Writes the model card of an export: what was edited, how, what it scored, and its limits.

The card holds no prompts, no answers, no paths and no names of the machine it was written on. Names
and settings may be any text: the card's metadata are written by a YAML library, and every value
that the template inserts is escaped unless this module made it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from ray_abliterate.data.hub import MODEL_NAME
from ray_abliterate.evaluation.suites.build import build_suites
from ray_abliterate.export.original_model import OriginalModel
from ray_abliterate.export.public_names import PublicName
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.suite_results import BASE, Finding, comparison_text, label
from ray_abliterate.recipe import SuiteFile
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.plan import Plan
from ray_abliterate.search.score import Score
from ray_abliterate.search.score_text import describe_score

NORMS = {
    "none": "no norm of the weights is kept",
    "row": "each matrix keeps the norm of its output rows",
    "column": "each matrix keeps the norm of its input columns",
}
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Metadata of the base model's card that also hold for the edited model."""
MARKDOWN = re.compile(r"([\\`*_\[\]<>|#~&$])")
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")

ExportKind = Literal["merged", "adapter"]


class Markdown(str):
    """Text that is Markdown already, and is never escaped again."""


def model_card(
    directory: RunDirectory, trial: Trial, original: OriginalModel, kind: ExportKind = "merged"
) -> str:
    """Return the card of the model that a trial's plan makes, as Markdown.

    Args:
        directory: The run.
        trial: The trial whose plan was written.
        original: The base model, whose own card states its licence.
        kind: Whether whole weights were written, or an adapter.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("ray_abliterate.export"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=escape_markdown,
        keep_trailing_newline=True,
    )
    pages.filters |= {"code": code_span, "cell": escape_markdown}
    carried, quantized = read_front_matter(original.folder / "README.md"), original.quantized
    return pages.get_template("model_card.md.jinja").render(
        front_matter=Markdown(_front_matter(original.base, carried, kind)),
        adapter=kind == "adapter",
        base=_model_facts(original.base),
        searched=_model_facts(quantized) if quantized else None,
        direction=_direction_facts(directory, trial.plan),
        norm={"mode": trial.plan.norm, "meaning": NORMS[trial.plan.norm]},
        number=trial.number,
        trials=len(directory.trials()),
        strengths=list(_strengths(directory, trial.plan)),
        plan=Markdown(json.dumps(json.loads(trial.plan.to_json()), indent=2)),
        pruned=trial.pruned,
        scores=list(_score_rows(directory, trial)),
        suites=list(_suite_rows(directory, trial)),
        licence=_joined(carried.get("license_name")) or _joined(carried.get("license")),
        licence_link=_joined(carried.get("license_link")),
        versions=_versions(directory),
        dtype=directory.read_environment()["model"]["dtype"],
        quantization=directory.read_environment()["model"].get("quantization", ""),
    )


def public_origin(origin: str) -> str | None:
    """Return where everybody can read a set's prompts, on the Hub or here; None if nowhere."""
    return origin.removeprefix("hub:") if origin.startswith(("hub:", "builtin:")) else None


# Escaping


def escape_markdown(value: Any) -> Any:
    """Escape a text so that Markdown shows it as it is, on one line; other values stay."""
    if isinstance(value, Markdown) or not isinstance(value, str):
        return value
    return Markdown(MARKDOWN.sub(r"\\\1", UNPRINTABLE.sub(" ", value)))


def code_span(value: str) -> Markdown:
    """Return a text as a span of code, whatever backticks it contains."""
    text = UNPRINTABLE.sub(" ", value).strip() or " "
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return Markdown(f"{fence}{space}{text}{space}{fence}")


# Metadata


def read_front_matter(readme: Path) -> dict[str, Any]:
    """Read the metadata at the head of a model card; empty if there are none, or damaged ones."""
    import yaml

    try:
        text = readme.read_text(encoding="utf-8")
        match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
        values = yaml.safe_load(match[1]) if match else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _front_matter(base: PublicName, carried: Mapping[str, Any], kind: ExportKind) -> str:
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
    """Return whether a value is a text or a list of texts, as these metadata may be."""
    parts = value if isinstance(value, list) else [value]
    return bool(parts) and all(isinstance(part, str) and part for part in parts)


def _joined(value: Any) -> str | None:
    return ", ".join(value if isinstance(value, list) else [value]) if _is_text(value) else None


# What the run knows


def _model_facts(model: PublicName) -> dict[str, Any]:
    name, hub = model.called, model.hub
    on_hub = hub is not None and MODEL_NAME.fullmatch(hub)
    text = escape_markdown(name)
    link = f"[{text}](https://huggingface.co/{hub})" if on_hub else f"**{text}**"
    return {"name": name, "link": Markdown(link), "revision": model.revision}


def _direction_facts(directory: RunDirectory, plan: Plan) -> dict[str, Any]:
    directions, settings = directory.directions(), directory.read_recipe().direction
    at_layer = f"one for all layers, taken at layer {plan.direction_layer:.2f}"
    offset = plan.source_offset
    per_layer = "each layer's own"
    per_layer += "" if offset is None else f", taken {offset:+.2f} layers from it"
    more = f", up to {directions.rank} per layer" if directions and directions.rank > 1 else ""
    more += ", found separately for each component" if directions and directions.components else ""
    environment = directory.read_environment()
    filtered = environment.get("filtered", {})
    sets = {
        name: {**facts, **_after_filter(filtered.get(name))}
        for name, facts in environment.get("prompts", {}).items()
    }
    return {
        "method": directions.method if directions else settings.method,
        "scope": (at_layer if plan.scope == "global" else per_layer) + more,
        "projected": settings.project_out_neutral,
        "quantile": settings.winsorize_quantile,
        "sets": [
            {
                "title": title,
                "prompts": sets[name]["prompts"],
                "origin": public_origin(sets[name]["origin"]),
                "fingerprint": sets[name]["fingerprint"][:16],
            }
            for name, title in (("behaviour", "With the behaviour"), ("neutral", "Without it"))
            if name in sets
        ],
    }


def _after_filter(filtered: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what the prompt filter changed of a set's facts: count and fingerprint, or nothing."""
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
        of_base = base.get(score.name)
        yield {
            "name": score.name,
            "goal": score.goal,
            "own": _score_text(score),
            "base": _score_text(of_base) if of_base else "not measured",
        }


def _score_text(score: Score) -> str:
    return f"{describe_score(score)} {score.unit}".rstrip()


def _suite_rows(directory: RunDirectory, trial: Trial) -> Iterator[dict[str, Any]]:
    """Yield a row for each suite that the trial was measured with, and the base model's result."""
    settings = SuiteFile.of(directory.read_environment().get("suites", ()))
    results = directory.suite_results(settings)
    if label(trial.number) not in results.labels:
        return
    for suite in build_suites(settings, directory.read_base()):
        finding, of_base = results.finding(label(trial.number), suite), results.finding(BASE, suite)
        if finding is None or finding.score is None:
            continue
        difference = comparison_text(finding.comparison) if finding.comparison else ""
        yield {
            "name": suite.name,
            "own": _finding_text(finding) + ("" if finding.whole else " *"),
            "base": _finding_text(of_base),
            "difference": difference or "not measured",
            "whole": finding.whole,
        }


def _finding_text(finding: Finding | None) -> str:
    return _score_text(finding.score) if finding and finding.score else "not measured"


def _versions(directory: RunDirectory) -> list[str]:
    versions = directory.read_environment().get("versions", {})
    libraries = ("ray-abliterate", "transformers", "torch", "python")
    return [f"{n} {versions[n]}" for n in libraries if str(versions.get(n, ""))[:1].isdigit()]
