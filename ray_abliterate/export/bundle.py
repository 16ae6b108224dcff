"""The reproduction bundle of an export: all that rebuilds it from the base model without a search.

`reproduce/reproduce.json` holds the plan, recipe, seeds, versions, scores, and of every edited
tensor its SHA-256; `directions.safetensors` lies beside it. Both can be published: prompt sets are
told by their fingerprints, and nothing tells of the machine's paths or users.
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

from ray_abliterate.data.atomic_files import write_whole
from ray_abliterate.directions.directions import Directions
from ray_abliterate.errors import ReproductionError
from ray_abliterate.export.checkpoint import Checkpoint
from ray_abliterate.export.model_card import public_origin
from ray_abliterate.export.public_names import Original, Published
from ray_abliterate.export.tensor_records import (
    Record,
    TensorRecord,
    WrittenTensor,
    base_sha256,
    edited_tensors,
    file_sha256,
    written_tensors,
)
from ray_abliterate.model.loading import device_for
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.recipe import ModelSettings, Recipe
from ray_abliterate.search.frontier import Trial

FORMAT, READ = 2, (1, 2)
"""What is written, and what is read: adapters of the first hold no hashes of tensors."""
FOLDER, FILE, DIRECTIONS = "reproduce", "reproduce.json", "directions.safetensors"
ADAPTER = "adapter_model.safetensors"
LIBRARIES = ("ray-abliterate", "torch", "transformers", "safetensors")
TEXTS = ("system", "prefix", "suffix")
"""Settings that are parts of prompts."""
NOT_TOLD = "https://not-told.invalid/v1"


class BaseFacts(Record):
    """The model that was edited."""

    name: str | None
    """On the Hub, or of an embedded model; None for a folder."""
    called: str
    revision: str | None
    model_type: str
    layers: int
    hidden: int
    fingerprint: str
    """Of the weights as the search held them; see `ModelFacts`."""


class PromptFacts(Record):
    """A prompt set."""

    prompts: int
    fingerprint: str
    origin: str | None
    """Where everybody can read it, if anywhere."""


class DirectionFacts(Record):
    """The file of the directions."""

    file: str
    sha256: str
    method: str


class Computed(Record):
    """What made the bits."""

    versions: dict[str, str]
    device: str
    threads: int


class AdapterFacts(Record):
    """The tensors of an adapter, and the base model's that they were made from."""

    tensors: dict[str, WrittenTensor]
    base_sha256: dict[str, str]


class Bundle(Record):
    """What `reproduce.json` holds."""

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
    written: Computed
    tensors: dict[str, TensorRecord]
    """Those of the whole model that were edited."""
    files: dict[str, str] = Field(description="SHA-256 of an adapter's files.")
    adapter: AdapterFacts | None = None

    @property
    def made(self) -> Mapping[str, WrittenTensor]:
        """What a rebuilt export must hold."""
        return self.tensors if self.adapter is None else self.adapter.tensors

    @property
    def made_from(self) -> dict[str, str]:
        """SHA-256 of the base model's tensors that were edited."""
        if self.adapter is not None:
            return self.adapter.base_sha256
        return {name: record.base_sha256 for name, record in self.tensors.items()}


def write_bundle(
    directory: RunDirectory,
    trial: Trial,
    original: Original,
    folder: Path,
    adapted: Iterable[str] | None = None,
) -> None:
    """Write the bundle into the folder of an export.

    Args:
        directory: The run.
        trial: Whose plan was written.
        original: The base model.
        folder: Of the export, whose weights are written already.
        adapted: Of an adapter, the base model's tensors that it edits; None of a whole model.
    """
    data = directory.directions_file()
    assert data is not None and trial.scorecard is not None
    recipe, baseline = directory.read_recipe(), directory.baseline()
    source, file = Checkpoint.open(original.folder), folder / ADAPTER
    bundle = Bundle(
        format=FORMAT,
        kind="merged" if adapted is None else "adapter",
        base=_base(directory, original.base),
        trial=trial.number,
        plan=json.loads(trial.plan.to_json()),
        scores=tuple(trial.scorecard.to_list()),
        base_scores=tuple(baseline.scorecard.to_list()) if baseline else (),
        seed=recipe.search.seed,
        recipe=public_recipe(recipe, Published.searched(directory).called),
        prompts=_prompts(directory),
        directions=DirectionFacts(
            file=DIRECTIONS,
            sha256=hashlib.sha256(data).hexdigest(),
            method=Directions.from_bytes(data).method,
        ),
        searched=_searched(directory),
        written=computed(recipe.model),
        tensors=edited_tensors(source, Checkpoint.open(folder)) if adapted is None else {},
        files={} if adapted is None else {ADAPTER: file_sha256(file)},
        adapter=None if adapted is None else _adapter(source, file, adapted),
    )
    text = json.dumps(bundle.model_dump(mode="json"), indent=1, ensure_ascii=False)
    write_whole(folder / FOLDER / DIRECTIONS, data)
    write_whole(folder / FOLDER / FILE, (text + "\n").encode())


def _adapter(source: Checkpoint, file: Path, adapted: Iterable[str]) -> AdapterFacts:
    hashes = {name: base_sha256(source, name) for name in adapted}
    return AdapterFacts(
        tensors=written_tensors(Checkpoint.of_file(file)),
        base_sha256={name: sha256 for name, sha256 in hashes.items() if sha256 is not None},
    )


def read_bundle(place: Path) -> tuple[Bundle, Directions, Path]:
    """The bundle in a file, in its folder or in an export, its directions, and the file.

    Raises:
        ReproductionError: it is not there, damaged, or of a newer version.
    """
    candidates = (place, place / FILE, place / FOLDER / FILE)
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise ReproductionError(
            f"{place} is not there, or holds no {FILE}.\n"
            f"  Exports of this version have it under {FOLDER}/."
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
        where = ".".join(map(str, first["loc"]))
        raise ReproductionError(f"{file} is damaged: {where}: {first['msg']}") from None
    except (ValueError, OSError) as error:
        raise ReproductionError(f"{file} or the file beside it is damaged: {error}") from None
    if hashlib.sha256(data).hexdigest() != bundle.directions.sha256:
        raise ReproductionError(
            f"{file.parent / bundle.directions.file} is not the file that {file.name} was written "
            "with (its SHA-256 differs).\n  Fetch both anew."
        )
    return bundle, Directions.from_bytes(data), file


# Facts that can be published


def computed(settings: ModelSettings) -> Computed:
    """Versions, device and threads of this process, which the last bits depend on."""
    on_gpu = device_for(settings) in ("cuda", "auto") and torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else device_for(settings)
    if device in ("cpu", "auto"):
        device = f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    versions = {library: _version(library) for library in LIBRARIES}
    return Computed(versions=versions, device=device, threads=torch.get_num_threads())


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:  # a checkout that was not installed
        return "not installed"


def public_recipe(recipe: Recipe, base: str) -> dict[str, Any]:
    """The recipe as a recipe, without paths, hosts and texts of prompts.

    A text is told by its SHA-256, a file by its kind; of options, which may be anything, only
    numbers are.
    """
    values: dict[str, Any] = _public("", recipe.model_dump(mode="json"))
    values["model"]["name"] = base
    return values


def _public(key: str, value: Any) -> Any:
    if key == "options":
        return {name: own for name, own in value.items() if isinstance(own, int | float)}
    if isinstance(value, Mapping):
        return {name: _public(name, own) for name, own in value.items()}
    if isinstance(value, list):
        return [_public(key, own) for own in value]
    return _public_text(key, value) if isinstance(value, str) else value


def _public_text(key: str, text: str) -> str:
    if key in TEXTS and text:
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    if key == "endpoint":
        return NOT_TOLD
    if key == "key_variable":
        return "NOT_TOLD"
    if key == "file" or (key == "chat_template" and text != "plain"):
        return f"not-told{Path(text).suffix}"
    local = text.startswith(("/", "~", "./", "../")) or os.path.exists(text)
    return "not-told" if key == "folder" or ("/" in text and local) else text


def _base(directory: RunDirectory, base: Published) -> BaseFacts:
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


def _prompts(directory: RunDirectory) -> dict[str, PromptFacts]:
    return {
        name: PromptFacts(
            prompts=facts["prompts"],
            fingerprint=facts["fingerprint"],
            origin=public_origin(facts["origin"]),
        )
        for name, facts in directory.read_environment().get("prompts", {}).items()
    }


def _searched(directory: RunDirectory) -> dict[str, Any]:
    known, model = directory.read_environment(), Published.searched(directory)
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
