"""Rebuilds an export from its base model and its reproduction bundle, and checks every tensor.

Needs no search, no prompts and no run directory. With the same versions, device and threads the
edited tensors must be equal bit for bit; otherwise their norms and sampled values, which the bundle
records, must agree within what rounding explains.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ray_abliterate.directions.directions import Directions
from ray_abliterate.errors import ReproductionError
from ray_abliterate.export.adapter import ADAPTER_WEIGHTS, AdapterBase, AdapterEdit, write_adapter
from ray_abliterate.export.bundle import (
    DIRECTIONS,
    FILE,
    FOLDER,
    Bundle,
    ComputeEnvironment,
    compute_environment,
    read_bundle,
)
from ray_abliterate.export.checkpoint import DTYPES, Checkpoint, fetch_checkpoint
from ray_abliterate.export.checkpoint_writers import StoredModel, cpu_threads
from ray_abliterate.export.export import open_stored_model
from ray_abliterate.export.file_layout import choose_layout, file_stats
from ray_abliterate.export.merged import EditedTensors, write_merged
from ray_abliterate.export.model_card import ExportKind
from ray_abliterate.export.output_folder import (
    PartialExport,
    file_sha256,
    open_partial,
    refuse_unfit_target,
    rename_complete,
    unverified_path,
)
from ray_abliterate.export.public_names import EMBEDDED
from ray_abliterate.export.tensor_records import (
    WrittenTensor,
    record_edited_tensors,
    record_tensors,
    tensor_sha256,
)
from ray_abliterate.model.source import resolve_model
from ray_abliterate.pipeline.progress import Progress
from ray_abliterate.recipe import ModelSettings, Recipe
from ray_abliterate.search.plan import Plan

SETTINGS = ("writers", "weight_cache", "attention", "gpus_per_replica", "max_memory")
"""Model settings of the bundle that say what is edited, and where it is computed."""
ULPS = {"merged": 2.0, "adapter": 64.0}
"""How far a sampled value may be off where bits may differ, in units in the last place of the value
or of the tensor's typical value. An adapter's values are sums over a matrix, rather than a matrix
that changed a little."""
NORM = 1e-6
"""Relative difference of a tensor's norm that is allowed where bits may differ."""


@dataclass(frozen=True)
class Reproduction:
    """How a rebuilt export compares with what its bundle describes.

    Attributes:
        kind: Whether the whole model was rebuilt, or an adapter.
        bit_equal: How many tensors are equal bit for bit.
        tensors: How many were compared.
        reasons: Why bits may differ; empty if they may not.
        largest_norm_difference: Relative difference, of the tensors whose bits differ.
        largest_sample_difference: Of the sampled values of these, in units in the last place.
    """

    kind: ExportKind
    bit_equal: int
    tensors: int
    reasons: tuple[str, ...]
    largest_norm_difference: float
    largest_sample_difference: float


def rebuild_export(
    place: Path,
    to: Path,
    progress: Progress,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> Reproduction:
    """Write the export that a bundle describes into the folder `to`, and check it.

    Args:
        place: `reproduce.json`, its folder, or an export that has it.
        to: The folder to write; it must not exist, or be empty.
        progress: Is notified of what happens.
        base: Folder or Hub name of the base model; the bundle's if unset.
        trust_remote_code: Whether code that comes with the base model may run. A bundle cannot
            ask for it.

    Raises:
        ReproductionError: the bundle is damaged, the base model is another one, or what was written
            is not what the bundle describes and now lies under `<to>.unverified`.
        ExportError: the folder cannot be written.
    """
    bundle, directions, file = read_bundle(place)
    if bundle.kind == "adapter" and bundle.adapter is None:
        raise ReproductionError(
            f"{file} is of an adapter and records no hashes of its tensors: an older version wrote "
            "it.\n  What is rebuilt could not be checked: export the adapter again."
        )
    to = to.absolute()
    recipe, plan = _recipe(bundle, trust_remote_code), _plan(bundle)
    reasons = tuple(why_inexact(bundle.written, compute_environment(recipe.model)))
    for reason in reasons:
        progress.note(f"bits may differ: {reason}")
    source = Checkpoint.open(find_base_folder(bundle, base, progress))
    size = 0 if bundle.adapter else choose_layout(source, None).bytes
    refuse_unfit_target(to, source.folder, size)
    with progress.stage("base model"):
        refuse_other_base(bundle, source)
    identity = {"bundle": file_sha256(file), "files": file_stats(source)}
    with open_partial(to, identity) as partial, cpu_threads(bundle.written.threads):
        model = open_stored_model(recipe, source, directions, progress)
        written = _write_export(bundle, model, plan, directions, partial, progress)
        result, failures = compare_tensors(bundle, written, reasons)
        _add_bundle(partial.folder, file.parent, result)
        if failures:
            rename_complete(partial.folder, unverified_path(to))
            raise ReproductionError(
                "what was written is not what the bundle describes:\n"
                + "\n".join(f"  {line}" for line in failures[:5])
                + f"\n  It is in {unverified_path(to)} for inspection; don't use it."
            )
        if to.exists():
            to.rmdir()
        rename_complete(partial.folder, to)
    return result


def _write_export(
    bundle: Bundle,
    model: StoredModel,
    plan: Plan,
    directions: Directions,
    partial: PartialExport,
    progress: Progress,
) -> Mapping[str, WrittenTensor]:
    """Write the whole model or the adapter, and return the records of what was written."""
    if bundle.adapter is None:
        edited = EditedTensors(model.writers, plan, directions)
        write_merged(model.source, choose_layout(model.source, None), edited, partial, progress)
        with progress.stage("hashes"):
            return record_edited_tensors(model.source, Checkpoint.open(partial.folder))
    edits = AdapterEdit(model.module, model.writers, plan, directions)
    base = AdapterBase(bundle.base.called, bundle.base.revision)
    write_adapter(edits, base, math.inf, partial.folder, progress)
    return record_tensors(Checkpoint.of_file(partial.folder / ADAPTER_WEIGHTS))


# Before anything is written


def find_base_folder(bundle: Bundle, given: str | None, progress: Progress) -> Path:
    """Return the folder of the base model, fetching it from the Hub if need be.

    Args:
        bundle: The bundle.
        given: `--base`: a folder or a Hub name; the bundle's own base model if None.
        progress: Is notified of what happens.

    Raises:
        ReproductionError: nothing says where the model is, or it can't be fetched.
    """
    name = given or bundle.base.name
    if name is None:
        raise ReproductionError(
            f"the base model, {bundle.base.called}, was a folder.\n  Name its folder with --base."
        )
    if name in EMBEDDED:
        return Path(resolve_model(name, progress.note)).resolve()
    if Path(name).is_dir():
        return Path(name).resolve()
    revision = bundle.base.revision
    try:
        return fetch_checkpoint(name, revision)
    except (OSError, ValueError) as error:
        raise ReproductionError(
            f"{name} at revision {revision} cannot be read from the Hub or its cache.\n  {error}\n"
            "  If you have a copy, name its folder with --base."
        ) from error


def refuse_other_base(bundle: Bundle, source: Checkpoint) -> None:
    """Make sure that the base model has the tensors that were edited, bit for bit.

    Raises:
        ReproductionError: it does not.
    """
    expected = bundle.base_hashes
    other = [name for name, sha256 in expected.items() if tensor_sha256(source, name) != sha256]
    if other:
        revision = f" at revision {bundle.base.revision}" if bundle.base.revision else ""
        raise ReproductionError(
            f"{source.folder} is not the base model of the bundle ({bundle.base.called}{revision}):"
            f"\n  {len(other)} of {len(expected)} tensors to edit are missing or differ, such as "
            f"{other[0]}.\n  Name the right model with --base."
        )


def why_inexact(then: ComputeEnvironment, now: ComputeEnvironment) -> Iterator[str]:
    """Yield what differs from when the bundle was written, so that bits may differ too."""
    for library, version in then.versions.items():
        if now.versions.get(library) != version:
            yield f"{library} was {version}, and is {now.versions.get(library, 'not installed')}"
    if then.device != now.device:
        yield f"it was written on {then.device}, and this is {now.device}"


def _recipe(bundle: Bundle, trust_remote_code: bool) -> Recipe:
    try:
        recipe = Recipe.model_validate(bundle.recipe)
        taken_over = recipe.model.model_dump(include={*SETTINGS})
        settings = ModelSettings(
            name=bundle.base.called, trust_remote_code=trust_remote_code, **taken_over
        )
    except ValueError as error:
        raise ReproductionError(f"the bundle's recipe is damaged: {error}") from None
    return recipe.model_copy(update={"model": settings})


def _plan(bundle: Bundle) -> Plan:
    try:
        return Plan.from_json(json.dumps(bundle.plan))
    except (ValueError, KeyError, TypeError) as error:
        raise ReproductionError(f"the bundle's plan is damaged: {error}") from None


# What was written


def compare_tensors(
    bundle: Bundle, written: Mapping[str, WrittenTensor], reasons: tuple[str, ...]
) -> tuple[Reproduction, list[str]]:
    """Compare the written tensors with the bundle's records.

    Args:
        bundle: The bundle.
        written: Records of the written tensors, by name.
        reasons: Why bits may differ; without any, they must be equal.

    Returns:
        The comparison, and a line for each tensor that is not what it should be.
    """
    failures, norms, samples, equal = [], [0.0], [0.0], 0
    recorded, ulps = bundle.written_tensors, ULPS[bundle.kind]
    for name in sorted(recorded.keys() | written.keys()):
        then, now = recorded.get(name), written.get(name)
        if then is None or now is None:
            failures.append(
                f"{name} was not in the export" if then is None else f"{name} was not written"
            )
            continue
        if then.sha256 == now.sha256:
            equal += 1
            continue
        norm, sample = differences(then, now)
        norms.append(norm)
        samples.append(sample)
        if not reasons:
            failures.append(f"{name}: different bits, with the same versions and device")
        elif norm > NORM or sample > ulps:
            failures.append(
                f"{name}: norm {norm:.2g} off (allowed {NORM:g}), a sampled value {sample:.3g} "
                f"units in the last place (allowed {ulps:g})"
            )
    result = Reproduction(bundle.kind, equal, len(recorded), reasons, max(norms), max(samples))
    return result, failures


def differences(then: WrittenTensor, now: WrittenTensor) -> tuple[float, float]:
    """Return how far a written tensor is from its record where bits differ.

    Returns:
        The relative difference of the norms; and the largest difference of sampled values, in units
        in the last place of the value or of the tensor's root mean square, whichever is larger.
    """
    norm = abs(then.norm - now.norm) / max(then.norm, 1e-30)
    if len(then.sample) != len(now.sample) or not then.sample or then.dtype not in DTYPES:
        return norm, float("inf")
    eps = torch.finfo(DTYPES[then.dtype]).eps
    count = max(1, int(torch.tensor(then.shape).prod()))
    typical = then.norm / count**0.5  # root mean square
    pairs = zip(then.sample, now.sample, strict=True)
    return norm, max(abs(a - b) / (eps * max(abs(a), typical, 1e-30)) for a, b in pairs)


def _add_bundle(folder: Path, bundle: Path, result: Reproduction) -> None:
    """Copy the bundle and the model card into the folder, and write how it compares."""
    (folder / FOLDER).mkdir(exist_ok=True)
    for name in (FILE, DIRECTIONS):
        shutil.copyfile(bundle / name, folder / FOLDER / name)
    if bundle.name == FOLDER and (bundle.parent / "README.md").is_file():
        shutil.copyfile(bundle.parent / "README.md", folder / "README.md")
    text = json.dumps(asdict(result), indent=2)
    (folder / "reproduced.json").write_text(text + "\n", encoding="utf-8")
