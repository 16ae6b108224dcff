"""Rebuilds an export from its base model and its reproduction bundle, and checks every tensor.

No search, no prompts, no run directory. With the same versions, device and threads the edited
tensors must be equal bit for bit; otherwise what the bundle keeps of them (norm, sampled values) is
compared, within what rounding explains.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ray_abliterate.directions.directions import Directions
from ray_abliterate.errors import ReproductionError
from ray_abliterate.export.adapter import WEIGHTS, AdapterEdit, Base, write_adapter
from ray_abliterate.export.bundle import (
    DIRECTIONS,
    FILE,
    FOLDER,
    Bundle,
    Computed,
    computed,
    read_bundle,
)
from ray_abliterate.export.checkpoint import DTYPES, Checkpoint, fetched
from ray_abliterate.export.export import find_targets
from ray_abliterate.export.file_layout import headers_fingerprint, layout_of
from ray_abliterate.export.merged import EditedTensors, write_merged
from ray_abliterate.export.model_card import Kind
from ray_abliterate.export.public_names import EMBEDDED
from ray_abliterate.export.scratch import Scratch, give_name, scratch
from ray_abliterate.export.target import check_target, unverified_name
from ray_abliterate.export.tensor_records import (
    WrittenTensor,
    base_sha256,
    edited_tensors,
    file_sha256,
    written_tensors,
)
from ray_abliterate.model.source import model_source
from ray_abliterate.pipeline.progress import Progress
from ray_abliterate.recipe import ModelSettings, Recipe
from ray_abliterate.search.plan import Plan

SETTINGS = ("writers", "weight_cache", "attention", "gpus_per_replica", "max_memory")
"""Of the bundle's model that say what is edited and where it is computed."""
ULPS = {"merged": 2.0, "adapter": 64.0}
"""Units in the last place, of a value or of the tensor's typical value, that a sampled value may
be off where bits may differ. An adapter's values are sums over a matrix, not a matrix that changed
a little."""
NORM = 1e-6
"""Relative difference of a tensor's norm that is allowed then."""


@dataclass(frozen=True)
class Reproduction:
    """What came of it. `reasons` say why bits may differ, if so."""

    kind: Kind
    bit_equal: int
    tensors: int
    reasons: tuple[str, ...]
    largest_norm_difference: float
    """Relative, of the tensors whose bits differ."""
    largest_sample_difference: float
    """In units of the last place, of the sampled values of these."""


def reproduce(
    place: Path, to: Path, progress: Progress, base: str | None = None, trust_remote_code: bool = False
) -> Reproduction:
    """Write the export that a bundle describes into the folder `to`, and check it.

    Args:
        place: `reproduce.json`, its folder, or an export that has it.
        to: Folder to write; must not exist, or be empty.
        progress: Receives what happens.
        base: Folder or Hub name of the base model; the bundle's if unset.
        trust_remote_code: Run code that comes with the base model. A bundle cannot ask for it.

    Raises:
        ReproductionError: the bundle is damaged, the base model is another one, or what was written
            is not what the bundle describes; that is kept under `<to>.unverified`.
        ExportError: the folder cannot be written.
    """
    bundle, directions, file = read_bundle(place)
    if bundle.kind == "adapter" and bundle.adapter is None:
        raise ReproductionError(
            f"{file} is of an adapter, and was written by a version that kept no hashes of its "
            "tensors.\n  What is rebuilt could not be checked: export it anew."
        )
    to = to.absolute()
    recipe, plan = _recipe(bundle, trust_remote_code), _plan(bundle)
    reasons = tuple(why_inexact(bundle.written, computed(recipe.model)))
    for reason in reasons:
        progress.note(f"bits may differ: {reason}")
    source = Checkpoint.open(base_folder(bundle, base, progress))
    check_target(to, source.folder, 0 if bundle.adapter else layout_of(source, None).bytes)
    with progress.stage("base model"):
        refuse_other_base(bundle, source)
    identity = {"bundle": file_sha256(file), "files": headers_fingerprint(source)}
    with scratch(to, identity) as work, _threads(bundle.written.threads):
        found = _rebuilt(bundle, recipe, plan, source, directions, work, progress)
        result, failures = compare(bundle, found, reasons)
        _complete(work.folder, file.parent, result)
        if failures:
            give_name(work.folder, unverified_name(to))
            raise ReproductionError(
                "what was written is not what the bundle describes:\n"
                + "\n".join(f"  {line}" for line in failures[:5])
                + f"\n  It is kept in {unverified_name(to)} for a look; don't use it."
            )
        if to.exists():
            to.rmdir()
        give_name(work.folder, to)
    return result


def _rebuilt(
    bundle: Bundle,
    recipe: Recipe,
    plan: Plan,
    source: Checkpoint,
    directions: Directions,
    work: Scratch,
    progress: Progress,
) -> Mapping[str, WrittenTensor]:
    """Write the whole model, or the adapter; what was written."""
    module, targets = find_targets(recipe, source, directions, progress)
    if bundle.adapter is None:
        edited = EditedTensors(targets, plan, directions)
        write_merged(source, layout_of(source, None), edited, work, progress)
        with progress.stage("hashes"):
            return edited_tensors(source, Checkpoint.open(work.folder))
    edit = AdapterEdit(module, targets, plan, directions)
    base = Base(bundle.base.called, bundle.base.revision)
    write_adapter(edit, base, math.inf, work.folder, progress)
    return written_tensors(Checkpoint.of_file(work.folder / WEIGHTS))


# Before anything is written


def base_folder(bundle: Bundle, given: str | None, progress: Progress) -> Path:
    """The folder of the base model: the one given, or the bundle's at its revision.

    Raises:
        ReproductionError: nobody says where it is, or it can't be fetched.
    """
    name = given or bundle.base.name
    if name is None:
        raise ReproductionError(
            f"the base model, {bundle.base.called}, was a folder.\n  Say where it is with --base."
        )
    if name in EMBEDDED:
        return Path(model_source(name, progress.note)).resolve()
    if Path(name).is_dir():
        return Path(name).resolve()
    revision = bundle.base.revision
    try:
        return fetched(name, revision)
    except (OSError, ValueError) as error:
        raise ReproductionError(
            f"{name} at revision {revision} cannot be read from the Hub or its cache.\n  {error}\n"
            "  If you have a copy, name its folder with --base."
        ) from error


def refuse_other_base(bundle: Bundle, source: Checkpoint) -> None:
    """Hold the base model's tensors against those that were edited.

    Raises:
        ReproductionError: they are not the same.
    """
    known = bundle.made_from
    other = [name for name, sha256 in known.items() if base_sha256(source, name) != sha256]
    if other:
        revision = f" at revision {bundle.base.revision}" if bundle.base.revision else ""
        raise ReproductionError(
            f"{source.folder} is not the base model of the bundle ({bundle.base.called}{revision}):"
            f"\n  {len(other)} of {len(known)} tensors to edit are missing or differ, "
            f"{other[0]} among them.\n  Name the right model with --base."
        )


def why_inexact(then: Computed, now: Computed) -> Iterator[str]:
    """What is not as it was when the bundle was written."""
    for library, known in then.versions.items():
        if now.versions.get(library) != known:
            yield f"{library} was {known}, and is {now.versions.get(library, 'not there')}"
    if then.device != now.device:
        yield f"it was written on {then.device}, and this is {now.device}"


def _recipe(bundle: Bundle, trust_remote_code: bool) -> Recipe:
    try:
        recipe = Recipe.model_validate(bundle.recipe)
        own = recipe.model.model_dump(include={*SETTINGS})
        settings = ModelSettings(
            name=bundle.base.called, trust_remote_code=trust_remote_code, **own
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


def compare(
    bundle: Bundle, found: Mapping[str, WrittenTensor], reasons: tuple[str, ...]
) -> tuple[Reproduction, list[str]]:
    """Hold the written tensors against the bundle's; a line for each that is not what it was."""
    failures, norms, samples, equal = [], [0.0], [0.0], 0
    made, ulps = bundle.made, ULPS[bundle.kind]
    for name in sorted(made.keys() | found.keys()):
        then, now = made.get(name), found.get(name)
        if then is None or now is None:
            failures.append(
                f"{name} was {'not ' if then is None else ''}written, and now is"
                f"{'' if then is None else ' not'}"
            )
            continue
        if then.sha256 == now.sha256:
            equal += 1
            continue
        norm, sample = differences(then, now)
        norms.append(norm)
        samples.append(sample)
        if not reasons:
            failures.append(f"{name}: other bits, with the same versions and device")
        elif norm > NORM or sample > ulps:
            failures.append(
                f"{name}: norm {norm:.2g} off (allowed {NORM:g}), a sampled value {sample:.3g} "
                f"units of the last place (allowed {ulps:g})"
            )
    result = Reproduction(bundle.kind, equal, len(made), reasons, max(norms), max(samples))
    return result, failures


def differences(then: WrittenTensor, now: WrittenTensor) -> tuple[float, float]:
    """Relative difference of the norms; largest difference of sampled values, in units of the last
    place of the value or of the tensor's root mean square, whichever is larger."""
    norm = abs(then.norm - now.norm) / max(then.norm, 1e-30)
    if len(then.sample) != len(now.sample) or not then.sample or then.dtype not in DTYPES:
        return norm, float("inf")
    eps = torch.finfo(DTYPES[then.dtype]).eps
    count = max(1, int(torch.tensor(then.shape).prod()))
    typical = then.norm / count**0.5
    pairs = zip(then.sample, now.sample, strict=True)
    return norm, max(abs(a - b) / (eps * max(abs(a), typical, 1e-30)) for a, b in pairs)


def _complete(work: Path, bundle: Path, result: Reproduction) -> None:
    """Put the bundle, its card and what was found into the folder."""
    (work / FOLDER).mkdir(exist_ok=True)
    for name in (FILE, DIRECTIONS):
        shutil.copyfile(bundle / name, work / FOLDER / name)
    if bundle.name == FOLDER and (bundle.parent / "README.md").is_file():
        shutil.copyfile(bundle.parent / "README.md", work / "README.md")
    text = json.dumps(asdict(result), indent=2)
    (work / "reproduced.json").write_text(text + "\n", encoding="utf-8")


@contextmanager
def _threads(wanted: int) -> Iterator[None]:
    """So many CPU threads: another number sums in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
