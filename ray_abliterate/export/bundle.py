"""The reproduction bundle of an export: what rebuilds it from the base model, without a search.

`reproduce/reproduce.json` holds the plan, recipe, seeds, versions, scores, and of every edited
tensor its SHA-256; `directions.safetensors` lies beside it. Both can be published: prompt sets are
identified by their fingerprints, and nothing reveals the machine's paths or users.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError

from ray_abliterate.data.atomic_files import write_atomically
from ray_abliterate.directions.directions import Directions
from ray_abliterate.errors import ReproductionError
from ray_abliterate.export.checkpoint import Checkpoint
from ray_abliterate.export.model_card import public_origin
from ray_abliterate.export.original_model import OriginalModel
from ray_abliterate.export.output_folder import file_sha256
from ray_abliterate.export.public_names import PublicName
from ray_abliterate.export.tensor_records import (
    BundleRecord,
    TensorRecord,
    WrittenTensor,
    record_edited_tensors,
    record_tensors,
    tensor_sha256,
)
from ray_abliterate.model.loading import device_for
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.recipe import ModelSettings, Recipe
from ray_abliterate.search.frontier import Trial

FORMAT, READ = 2, (1, 2)
"""The format that is written, and those that are read: adapters of the first hold no hashes."""
FOLDER, FILE, DIRECTIONS = "reproduce", "reproduce.json", "directions.safetensors"
ADAPTER = "adapter_model.safetensors"
LIBRARIES = ("ray-abliterate", "torch", "transformers", "safetensors")
TEXTS = ("system", "prefix", "suffix")
"""Settings that are parts of prompts; the bundle holds their SHA-256 only."""
UNDISCLOSED_ENDPOINT = "https://not-told.invalid/v1"


class BaseFacts(BundleRecord):
    """The model that was edited."""

    name: str | None
    """Its name on the Hub, or that of an embedded model; None for a folder."""
    called: str
    """The name to show; see `PublicName`."""
    revision: str | None
    model_type: str
    layers: int
    hidden: int
    fingerprint: str
    """Fingerprint of the weights as the search held them."""


class PromptFacts(BundleRecord):
    """A prompt set that directions came from, without its prompts."""

    prompts: int
    fingerprint: str
    origin: str | None
    """Where everybody can read it; None if nowhere."""


class DirectionFacts(BundleRecord):
    """The file beside the bundle that holds the directions."""

    file: str
    sha256: str
    method: str


class ComputeEnvironment(BundleRecord):
    """What the last bits of the export depend on."""

    versions: dict[str, str]
    device: str
    threads: int


class AdapterFacts(BundleRecord):
    """Records of an adapter's tensors, and hashes of the base model's that it edits."""

    tensors: dict[str, WrittenTensor]
    base_sha256: dict[str, str]


class Bundle(BundleRecord):
    """The content of `reproduce.json`; its fields are the file's keys."""

    format: Literal[1, 2]
    kind: Literal["merged", "adapter"]
    base: BaseFacts
    trial: int
    plan: dict[str, Any]
    scores: tuple[dict[str, Any], ...]
    base_scores: tuple[dict[str, Any], ...]
    seed: int
    recipe: dict[str, Any]
    prompts: dict[str, PromptFacts]
    directions: DirectionFacts
    searched: dict[str, Any] = Field(description="Model, versions, device and dtype of the search.")
    written: ComputeEnvironment
    tensors: dict[str, TensorRecord]
    """Records of the edited tensors of a whole model; empty for an adapter."""
    files: dict[str, str] = Field(description="SHA-256 of an adapter's files.")
    adapter: AdapterFacts | None = None

    @property
    def written_tensors(self) -> Mapping[str, WrittenTensor]:
        """Records of the tensors that a rebuilt export must hold, by name."""
        return self.tensors if self.adapter is None else self.adapter.tensors

    @property
    def base_hashes(self) -> dict[str, str]:
        """SHA-256 of the base model's tensors that the plan edits, by name."""
        if self.adapter is not None:
            return self.adapter.base_sha256
        return {name: record.base_sha256 for name, record in self.tensors.items()}


def write_bundle(
    directory: RunDirectory,
    trial: Trial,
    original: OriginalModel,
    folder: Path,
    adapted: Iterable[str] | None = None,
) -> None:
    """Write the bundle into the folder of an export.

    Args:
        directory: The run.
        trial: The trial whose plan was written.
        original: The base model.
        folder: The export's folder, in which the weights are written already.
        adapted: Names of the base model's tensors that an adapter edits; None for a whole model.
    """
    data = directory.directions_bytes()
    assert data is not None and trial.scorecard is not None
    recipe, baseline = directory.read_recipe(), directory.baseline()
    source, file = Checkpoint.open(original.folder), folder / ADAPTER
    bundle = Bundle(
        format=FORMAT,
        kind="merged" if adapted is None else "adapter",
        base=_base_facts(directory, original.base),
        trial=trial.number,
        plan=json.loads(trial.plan.to_json()),
        scores=tuple(trial.scorecard.to_list()),
        base_scores=tuple(baseline.scorecard.to_list()) if baseline else (),
        seed=recipe.search.seed,
        recipe=public_recipe(recipe, PublicName.searched(directory).called),
        prompts=_prompt_facts(directory),
        directions=DirectionFacts(
            file=DIRECTIONS,
            sha256=hashlib.sha256(data).hexdigest(),
            method=Directions.from_bytes(data).method,
        ),
        searched=_search_facts(directory),
        written=compute_environment(recipe.model),
        tensors=record_edited_tensors(source, Checkpoint.open(folder)) if adapted is None else {},
        files={} if adapted is None else {ADAPTER: file_sha256(file)},
        adapter=None if adapted is None else _adapter_facts(source, file, adapted),
    )
    text = json.dumps(bundle.model_dump(mode="json"), indent=1, ensure_ascii=False)
    write_atomically(folder / FOLDER / DIRECTIONS, data)
    write_atomically(folder / FOLDER / FILE, (text + "\n").encode())


def _adapter_facts(source: Checkpoint, file: Path, adapted: Iterable[str]) -> AdapterFacts:
    hashes = {name: tensor_sha256(source, name) for name in adapted}
    return AdapterFacts(
        tensors=record_tensors(Checkpoint.of_file(file)),
        base_sha256={name: sha256 for name, sha256 in hashes.items() if sha256 is not None},
    )


def read_bundle(place: Path) -> tuple[Bundle, Directions, Path]:
    """Read a bundle and its directions.

    Args:
        place: `reproduce.json`, its folder, or an export.

    Returns:
        The bundle, its directions, and the path of `reproduce.json`.

    Raises:
        ReproductionError: it is not there, damaged, or of a newer version.
    """
    candidates = (place, place / FILE, place / FOLDER / FILE)
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise ReproductionError(
            f"{place} is not there, or holds no {FILE}.\n"
            f"  Exports of this version hold it in {FOLDER}/."
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.get("format") not in (*READ, None):
            raise ReproductionError(
                f"{file} has the format {values['format']!r}; this version reads up to {FORMAT}.\n"
                "  Install a newer ray-abliterate."
            )
        bundle = Bundle.model_validate(values)
        data = (file.parent / Path(bundle.directions.file).name).read_bytes()
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ReproductionError(f"{file} is damaged: {field}: {first['msg']}") from None
    except (ValueError, OSError) as error:
        raise ReproductionError(f"{file} or the file beside it is damaged: {error}") from None
    if hashlib.sha256(data).hexdigest() != bundle.directions.sha256:
        raise ReproductionError(
            f"{file.parent / bundle.directions.file} is not the file that {file.name} was written "
            "with (its SHA-256 differs).\n  Download both again."
        )
    return bundle, Directions.from_bytes(data), file


# Facts that can be published


def compute_environment(settings: ModelSettings) -> ComputeEnvironment:
    """Return versions, device and threads of this process."""
    on_gpu = device_for(settings) in ("cuda", "auto") and torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else device_for(settings)
    if device in ("cpu", "auto"):
        device = f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    versions = {library: _version(library) for library in LIBRARIES}
    return ComputeEnvironment(versions=versions, device=device, threads=torch.get_num_threads())


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:  # a checkout that was not installed
        return "not installed"


def public_recipe(recipe: Recipe, base: str) -> dict[str, Any]:
    """Return a recipe's values without paths, hosts and texts of prompts; it is still a recipe.

    A text becomes its SHA-256 and a file its suffix; of options, which may be anything, only
    numbers stay.

    Args:
        recipe: The recipe.
        base: The model's public name.
    """
    values: dict[str, Any] = _public("", recipe.model_dump(mode="json"))
    values["model"]["name"] = base
    return values


def _public(key: str, value: Any) -> Any:
    if key == "options":
        return {name: part for name, part in value.items() if isinstance(part, int | float)}
    if isinstance(value, Mapping):
        return {name: _public(name, part) for name, part in value.items()}
    if isinstance(value, list):
        return [_public(key, part) for part in value]
    return _public_text(key, value) if isinstance(value, str) else value


def _public_text(key: str, text: str) -> str:
    if key in TEXTS and text:
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    if key == "endpoint":
        return UNDISCLOSED_ENDPOINT
    if key == "key_variable":
        return "NOT_TOLD"
    if key == "file" or (key == "chat_template" and text != "plain"):
        return f"not-told{Path(text).suffix}"
    local = text.startswith(("/", "~", "./", "../")) or os.path.exists(text)
    return "not-told" if key == "folder" or ("/" in text and local) else text


def _base_facts(directory: RunDirectory, base: PublicName) -> BaseFacts:
    facts = directory.read_environment()["model"]
    return BaseFacts(
        name=base.name,
        called=base.called,
        revision=base.revision,
        model_type=facts["model_type"],
        layers=facts["layers"],
        hidden=facts["hidden"],
        fingerprint=facts["fingerprint"],
    )


def _prompt_facts(directory: RunDirectory) -> dict[str, PromptFacts]:
    return {
        name: PromptFacts(
            prompts=facts["prompts"],
            fingerprint=facts["fingerprint"],
            origin=public_origin(facts["origin"]),
        )
        for name, facts in directory.read_environment().get("prompts", {}).items()
    }


def _search_facts(directory: RunDirectory) -> dict[str, Any]:
    known, model = directory.read_environment(), PublicName.searched(directory)
    return {
        "model": model.called,
        "revision": model.revision,
        "versions": known.get("versions", {}),
        "machine": known.get("machine", ""),
        "device": known["model"]["device"],
        "dtype": known["model"]["dtype"],
        "quantization": known["model"].get("quantization", ""),
        "replicas": known.get("replicas", {}).get("replicas"),
    }
