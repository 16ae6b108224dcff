"""Exports rebuilt from their bundle, and bundles that are not what they should be."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_abliterate.errors import ExportError, PushError, ReproductionError, TrialNotFound
from ray_abliterate.export import export
from ray_abliterate.export import reproduce as reproduction
from ray_abliterate.export.bundle import Bundle, public_recipe, read_bundle, write_bundle
from ray_abliterate.export.checkpoint import Checkpoint
from ray_abliterate.export.export import ExportForm
from ray_abliterate.export.find_export import find_or_export
from ray_abliterate.export.original_model import OriginalModel
from ray_abliterate.export.public_names import PublicName
from ray_abliterate.export.reproduce import compare_tensors, differences, rebuild_export
from ray_abliterate.export.tensor_records import TensorRecord
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.recipe import Recipe


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="session")
def exports(tmp_path_factory, request):
    """The export of each run, made once and not verified: that is tested elsewhere."""
    folder, made = tmp_path_factory.mktemp("exports"), {}

    def of(name):
        run = request.getfixturevalue(name)
        if name not in made:
            made[name] = export.export_trial(
                run.directory, run.trial, folder / name, SilentProgress(), verify=False
            )
        return run, made[name]

    return of


def moved(folder: Path, name: str) -> None:
    """Change one tensor of a model."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name] + 0.5}, file, metadata={"format": "pt"})


@pytest.fixture
def copied(exports, tmp_path):
    """A copy of the planted model's export, to be changed, and its base model."""
    run, folder = exports("planted_run")
    shutil.copytree(folder, tmp_path / "export")
    return tmp_path / "export", run.model


@pytest.fixture
def copied_run(planted_run, tmp_path):
    """A copy of the planted model's run, to be changed."""
    shutil.copytree(planted_run.directory.path, tmp_path / "copy")
    return replace(planted_run, directory=RunDirectory(tmp_path / "copy"))


def changed(folder: Path, **values: Any) -> None:
    file = folder / "reproduce" / "reproduce.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("name", ["planted_run", "mixtral_run", "mixtral_float32_run"])
def test_an_export_is_rebuilt_bit_for_bit(exports, tmp_path, name):
    run, folder = exports(name)
    progress = Notes()
    found = rebuild_export(
        folder / "reproduce" / "reproduce.json", tmp_path / "again", progress, run.model
    )
    assert found.bit_equal == found.tensors > 0 and found.reasons == () and not progress.notes
    assert weights(tmp_path / "again") == weights(folder)
    again = {p.relative_to(tmp_path / "again").as_posix() for p in (tmp_path / "again").rglob("*")}
    first = {p.relative_to(folder).as_posix() for p in folder.rglob("*")}
    assert again == first | {"reproduced.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_the_bundle_names_exactly_the_edited_tensors_and_their_bits(exports):
    run, folder = exports("mixtral_run")
    bundle, directions, _ = read_bundle(folder)
    before, after = Checkpoint.open(run.model), Checkpoint.open(folder)
    differ = {n for n in before.tensors if not torch.equal(before.read(n), after.read(n))}
    assert bundle.tensors.keys() == differ
    name = sorted(differ)[0]
    values = after.read(name)
    record = bundle.tensors[name]
    assert record.norm == pytest.approx(float(values.double().norm()), rel=1e-12)
    assert set(record.sample) <= set(values.double().flatten().tolist())
    assert len(record.sample) >= 8 and record.shape == tuple(values.shape)
    assert torch.equal(directions.vectors, run.directory.directions().vectors)
    assert bundle.trial == run.trial.number and bundle.plan["norm"] == "column"


def test_the_bundle_keeps_paths_and_prompts_to_itself(exports):
    run, folder = exports("planted_run")
    text = (folder / "reproduce" / "reproduce.json").read_text()
    for private in (str(run.model.parent), str(run.directory.path), "tell me", "behaviour.txt"):
        assert private not in text
    facts = run.directory.read_environment()["prompts"]["behaviour"]
    assert facts["fingerprint"] in text


def test_a_public_recipe_is_a_recipe_without_texts_paths_and_hosts():
    text = """
    [model]
    name = "/home/somebody/model"
    chat_template = "/home/somebody/t.jinja"
    [[model.writers]]
    pattern = 'mlp\\.down\\.weight'
    component = "mlp"
    [prompts]
    behaviour = { file = "mine/p.csv", column = "text", system = "You are SYSTEM", prefix = "PRE" }
    neutral = { dataset = "/home/somebody/set", column = "text" }
    [[scorers]]
    kind = "keyword-rate"
    prompts = { dataset = "owner/set", column = "text", suffix = "SUF" }
    [[scorers]]
    kind = "refusal-judge"
    prompts = { folder = "saved", column = "text" }
    endpoint = "http://host.internal:8000/v1"
    endpoint_model = "judge"
    key_variable = "MY_KEY"
    [[scorers]]
    kind = "my_module:Scorer"
    name = "own"
    options = { path = "x/secret", tokens = 7 }
    """
    recipe = Recipe.parse(text, "recipe.toml")
    told = json.dumps(public_recipe(recipe, "base"))
    for private in ("somebody", "SYSTEM", "PRE", "SUF", "mine", "internal", "MY_KEY", "secret"):
        assert private not in told, private
    again = Recipe.model_validate(json.loads(told))
    assert again.model.name == "base" and again.scorers[0].prompts.dataset == "owner/set"
    assert again.model.writers == recipe.model.writers
    assert again.scorers[2].options == {"tokens": 7}


# Adapters


@pytest.fixture(scope="session")
def adapters(tmp_path_factory, request):
    """The adapter of each run, made once and not verified: that is tested elsewhere."""
    folder, made = tmp_path_factory.mktemp("adapters"), {}

    def of(name):
        run, form = request.getfixturevalue(name), ExportForm("adapter", adapter_error=0.9)
        if name not in made:
            made[name] = export.export_trial(
                run.directory, run.trial, folder / name, SilentProgress(), False, form
            )
        return run, made[name]

    return of


@pytest.fixture
def copied_adapter(adapters, tmp_path):
    """A copy of the planted model's adapter, to be changed, and its base model."""
    run, folder = adapters("planted_run")
    shutil.copytree(folder, tmp_path / "adapter")
    return tmp_path / "adapter", run.model


@pytest.mark.parametrize("name", ["planted_run", "mixtral_run", "mixtral_none_run"])
def test_an_adapter_is_rebuilt_bit_for_bit(adapters, tmp_path, name):
    """DoRA, LoRA that lacks something of the edit, and LoRA of stacked experts that is exact."""
    run, folder = adapters(name)
    progress = Notes()
    found = rebuild_export(folder, tmp_path / "again", progress, run.model)
    assert found.bit_equal == found.tensors > 0 and found.reasons == () and found.kind == "adapter"
    for file in filter(Path.is_file, folder.rglob("*")):
        assert (tmp_path / "again" / file.relative_to(folder)).read_bytes() == file.read_bytes()
    assert (tmp_path / "again" / "reproduced.json").exists()


def test_the_bundle_of_an_adapter_holds_the_hashes_of_its_tensors_and_of_what_they_edit(adapters):
    run, folder = adapters("planted_run")
    bundle, source = read_bundle(folder)[0], Checkpoint.open(run.model)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert bundle.adapter.tensors.keys() == tensors.keys() and bundle.tensors == {}
    for name, record in bundle.adapter.tensors.items():
        data = tensors[name].contiguous().numpy().tobytes()
        assert record.sha256 == hashlib.sha256(data).hexdigest()
        assert record.norm == pytest.approx(float(tensors[name].double().norm()), rel=1e-12)
    merged = load_file(export_of(run, folder) / "model.safetensors")
    edited = {n for n in source.tensors if not torch.equal(source.read(n), merged[n])}
    assert bundle.adapter.base_sha256.keys() == edited
    name = sorted(edited)[0]
    data = source.read(name).numpy().tobytes()
    assert bundle.adapter.base_sha256[name] == hashlib.sha256(data).hexdigest()
    data = (folder / "adapter_model.safetensors").read_bytes()
    assert bundle.files == {"adapter_model.safetensors": hashlib.sha256(data).hexdigest()}


def export_of(run, beside: Path) -> Path:
    """The whole model of the same trial."""
    to = beside.with_name("whole")
    if not to.exists():
        export.export_trial(run.directory, run.trial, to, SilentProgress(), verify=False)
    return to


def test_an_adapter_of_another_base_or_with_other_values_is_refused(copied_adapter, tmp_path):
    folder, base = copied_adapter
    shutil.copytree(base, tmp_path / "other")
    name = "model.layers.1.mlp.down_proj.weight"
    moved(tmp_path / "other", name)
    with pytest.raises(ReproductionError, match=rf"not the base model.*\s.*1 of .*{name}"):
        rebuild_export(folder, tmp_path / "o", SilentProgress(), str(tmp_path / "other"))
    assert not (tmp_path / "o").exists()
    facts = json.loads((folder / "reproduce" / "reproduce.json").read_text())["adapter"]
    name = next(n for n in sorted(facts["tensors"]) if "lora_A" in n)
    facts["tensors"][name]["sha256"] = "0" * 64
    changed(folder, adapter=facts)
    with pytest.raises(ReproductionError, match=f"{name}: different bits, with the same versions"):
        rebuild_export(folder, tmp_path / "o", SilentProgress(), base)
    assert (tmp_path / "o.unverified" / "adapter_config.json").exists()
    written = json.loads((folder / "reproduce" / "reproduce.json").read_text())["written"]
    changed(folder, written={**written, "versions": {**written["versions"], "torch": "1.0"}})
    found = rebuild_export(folder, tmp_path / "p", SilentProgress(), base)
    assert found.bit_equal == found.tensors - 1 and found.largest_sample_difference == 0
    facts["tensors"][name]["sample"][0] += 0.01
    changed(folder, adapter=facts)
    with pytest.raises(ReproductionError, match=r"units in the last place \(allowed 64\)"):
        rebuild_export(folder, tmp_path / "q", SilentProgress(), base)


def test_an_adapters_bundle_of_an_earlier_version_cannot_be_checked(copied_adapter, tmp_path):
    folder, base = copied_adapter
    changed(folder, format=1, adapter=None)
    words = r"no hashes of its tensors(?s:.*)export the adapter again"
    with pytest.raises(ReproductionError, match=words):
        rebuild_export(folder, tmp_path / "o", SilentProgress(), base)


def test_a_merged_bundle_of_an_earlier_version_is_rebuilt(copied, tmp_path):
    folder, base = copied
    file = folder / "reproduce" / "reproduce.json"
    values = json.loads(file.read_text())
    del values["adapter"]
    file.write_text(json.dumps({**values, "format": 1}))
    found = rebuild_export(folder, tmp_path / "o", SilentProgress(), base)
    assert found.bit_equal == found.tensors > 0


# What is not right is said


def test_a_file_that_is_damaged_or_missing_is_named(copied, tmp_path):
    folder, base = copied
    file = folder / "reproduce" / "reproduce.json"
    whole = file.read_text()
    for text, words in (
        (whole[:500], "damaged"),
        ("[]", "damaged"),
        (whole.replace('"norm"', '"nrom"', 1), "damaged"),
        (whole.replace('"format": 2', '"format": 3'), "newer ray-abliterate"),
        (whole.replace('"merged"', '"adapter"'), "is of an adapter"),
    ):
        file.write_text(text)
        with pytest.raises(ReproductionError, match=words):
            rebuild_export(file, tmp_path / "o", SilentProgress(), base)
    with pytest.raises(ReproductionError, match=r"holds no reproduce\.json"):
        rebuild_export(tmp_path, tmp_path / "o", SilentProgress(), base)
    file.write_text(whole)
    directions = file.parent / "directions.safetensors"
    data = bytearray(directions.read_bytes())
    data[-1] ^= 1
    directions.write_bytes(data)
    with pytest.raises(ReproductionError, match="SHA-256 differs"):
        rebuild_export(file, tmp_path / "o", SilentProgress(), base)
    directions.unlink()
    with pytest.raises(ReproductionError, match="damaged"):
        rebuild_export(file, tmp_path / "o", SilentProgress(), base)
    assert not (tmp_path / "o").exists()


def test_another_base_model_is_refused_before_anything_is_written(copied, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduction, "write_merged", None)
    folder, base = copied
    shutil.copytree(base, tmp_path / "other")
    name = "model.layers.1.mlp.down_proj.weight"
    moved(tmp_path / "other", name)
    with pytest.raises(ReproductionError, match=rf"not the base model.*\s.*1 of .*{name}"):
        rebuild_export(folder, tmp_path / "o", SilentProgress(), str(tmp_path / "other"))
    with pytest.raises(ReproductionError, match="Name its folder with --base"):
        rebuild_export(folder, tmp_path / "o", SilentProgress())
    with pytest.raises(ExportError, match="not an empty folder"):
        rebuild_export(folder, tmp_path / "other", SilentProgress(), base)
    assert not (tmp_path / "o").exists()


def test_a_hub_model_is_fetched_at_its_revision(copied, tmp_path, monkeypatch):
    folder, base = copied
    facts = json.loads((folder / "reproduce" / "reproduce.json").read_text())["base"]
    changed(folder, base={**facts, "name": "owner/tiny", "revision": "abc"})
    asked = []

    def snapshot_download(name, revision, **patterns):
        asked.append((name, revision))
        return str(base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    rebuild_export(folder, tmp_path / "o", SilentProgress())
    assert set(asked) == {("owner/tiny", "abc")}

    def gone(name, revision, **patterns):
        raise OSError("Revision Not Found")

    monkeypatch.setattr("huggingface_hub.snapshot_download", gone)
    with pytest.raises(ReproductionError, match=r"owner/tiny at revision abc(?s:.*)--base"):
        rebuild_export(folder, tmp_path / "p", SilentProgress())


def test_a_bundle_cannot_ask_for_code_to_be_run(copied, tmp_path, monkeypatch):
    folder, base = copied
    recipe = json.loads((folder / "reproduce" / "reproduce.json").read_text())["recipe"]
    recipe["model"]["trust_remote_code"] = True
    changed(folder, recipe=recipe)
    asked = []
    find = reproduction.open_stored_model

    def noted(recipe, *rest):
        asked.append(recipe.model.trust_remote_code)
        return find(recipe, *rest)

    monkeypatch.setattr(reproduction, "open_stored_model", noted)
    rebuild_export(folder, tmp_path / "o", SilentProgress(), base)
    rebuild_export(folder, tmp_path / "p", SilentProgress(), base, trust_remote_code=True)
    assert asked == [False, True]


# Bits that differ


def with_other_bits(folder: Path, **values: Any) -> str:
    """Change what the bundle says of one tensor."""
    tensors = json.loads((folder / "reproduce" / "reproduce.json").read_text())["tensors"]
    name = sorted(tensors)[0]
    tensors[name] = {**tensors[name], "sha256": "0" * 64, **values}
    changed(folder, tensors=tensors)
    return name


def test_different_bits_with_the_same_versions_are_set_aside(copied, tmp_path):
    folder, base = copied
    name = with_other_bits(folder)
    with pytest.raises(ReproductionError, match=f"{name}: different bits, with the same versions"):
        rebuild_export(folder, tmp_path / "o", SilentProgress(), base)
    assert (tmp_path / "o.unverified" / "reproduced.json").exists()
    assert not (tmp_path / "o").exists()


def test_other_versions_are_warned_of_and_allow_for_rounding_only(copied, tmp_path):
    folder, base = copied
    written = json.loads((folder / "reproduce" / "reproduce.json").read_text())["written"]
    changed(folder, written={**written, "versions": {**written["versions"], "torch": "1.0"}})
    with_other_bits(folder)
    progress = Notes()
    found = rebuild_export(folder, tmp_path / "o", progress, base)
    assert found.bit_equal == found.tensors - 1
    assert any("torch was 1.0, and is" in note for note in progress.notes)
    with_other_bits(folder, norm=1e9)
    with pytest.raises(ReproductionError, match="norm 1 off"):
        rebuild_export(folder, tmp_path / "p", SilentProgress(), base)


@pytest.mark.parametrize("kind", ["edited tensors", "tensors of the adapter"])
def test_other_vector_instructions_are_named_and_stay_within_rounding(
    copied, copied_adapter, tmp_path, kind
):
    """The verb, in a process that may use none of them."""
    folder, base = copied if kind == "edited tensors" else copied_adapter
    command = [sys.executable, "-m", "ray_abliterate", "reproduce", str(folder)]
    done = subprocess.run(
        [*command, "--to", str(tmp_path / "o"), "--base", str(base)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]),
             "ATEN_CPU_CAPABILITY": "default", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{kind} are equal bit for bit" in done.stdout
    here = torch.backends.cpu.get_cpu_capability()
    if here != "DEFAULT" and not torch.cuda.is_available():
        assert f"it was written on cpu ({here}), and this is cpu (DEFAULT)" in done.stdout


def test_differences_are_in_units_of_the_last_place():
    def record(*values: float, dtype: str = "F32", sha: str = "a") -> TensorRecord:
        norm = float(torch.tensor(values, dtype=torch.float64).norm())
        return TensorRecord(
            dtype=dtype, shape=(len(values),), base_sha256="b", sha256=sha, norm=norm, sample=values
        )

    eps = torch.finfo(torch.float32).eps
    norm, sample = differences(record(1.0, -1.0), record(1.0 + eps, -1.0))
    assert sample == pytest.approx(1.0) and norm < 1e-6
    assert differences(record(1.0, 0.0), record(1.0, 0.1))[1] > 1e5
    assert differences(record(1.0), record(1.0, 2.0))[1] == float("inf")
    bfloat = differences(record(1.0, dtype="BF16"), record(1.0078125, dtype="BF16"))[1]
    assert bfloat == pytest.approx(1.0)


def test_a_tensor_more_or_less_fails(exports):
    _, folder = exports("planted_run")
    bundle: Bundle = read_bundle(folder)[0]
    found = dict(bundle.tensors)
    name = sorted(found)[0]
    found["another.weight"] = found.pop(name)
    _, failures = compare_tensors(bundle, found, ("other versions",))
    assert failures == [
        "another.weight was not in the export", f"{name} was not written",
    ]  # fmt: skip


# A run's trial on its way to the Hub


def test_a_runs_trial_is_exported_once_to_be_uploaded(copied_run):
    directory, progress = copied_run.directory, Notes()
    folder = find_or_export(directory.path, None, progress, unverified=False)
    assert folder == directory.path / "exports" / "trial-0"
    assert (folder / "verification.json").exists()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert find_or_export(directory.path, 0, progress, unverified=False) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert any("the frontier's knee" in note for note in progress.notes)
    assert find_or_export(folder, None, progress, unverified=False) == folder
    changed(folder, plan={**json.loads(copied_run.trial.plan.to_json()), "norm": "none"})
    with pytest.raises(ExportError, match="is not of trial 0"):
        find_or_export(directory.path, 0, progress, unverified=False)
    with pytest.raises(PushError, match="is an export, not a run"):
        find_or_export(folder, 3, progress, unverified=False)
    with pytest.raises(TrialNotFound):
        find_or_export(directory.path, 7, progress, unverified=False)


def test_two_bundles_of_a_trial_are_equal_files(planted_run, tmp_path):
    """Many times: what is written in no order of its own would differ some time."""
    save_file({"a": torch.ones(3), "b": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    names = sorted(Checkpoint.open(planted_run.model).tensors)
    found = set()
    for _ in range(16):
        directory, trial = planted_run.directory, planted_run.trial
        base = OriginalModel(planted_run.model, PublicName.searched(directory))
        write_bundle(directory, trial, base, tmp_path, names)
        files = sorted((tmp_path / "reproduce").iterdir())
        found.add(tuple(file.read_bytes() for file in files))
    assert len(found) == 1
