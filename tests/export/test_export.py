"""Exports of tiny models, compared tensor by tensor with what they were made from."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from ray_abliterate.ablation.weight_cache import WeightCache
from ray_abliterate.errors import ExportError, PromptSourceError
from ray_abliterate.export import export, verification
from ray_abliterate.export.checkpoint import Checkpoint
from ray_abliterate.export.verification import Verifier, verify_score
from ray_abliterate.model.architecture import find_writers
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.search.score import Score, Scorecard

RUNS = ("planted_run", "mixtral_run", "mixtral_float32_run")
NOT_COPIED = {".gitattributes", "consolidated.safetensors"}


@pytest.fixture(scope="session")
def exported(tmp_path_factory, request):
    """The export of each run, made once."""
    folder = tmp_path_factory.mktemp("exports")
    made = {}

    def of(name):
        run = request.getfixturevalue(name)
        if name not in made:
            export.export_trial(run.directory, run.trial, folder / name, SilentProgress())
            made[name] = folder / name
        return run, made[name]

    return of


@pytest.fixture(params=RUNS)
def pair(request, exported):
    """A run, and the folder its trial was exported to."""
    return exported(request.param)


@pytest.fixture
def unloaded(monkeypatch):
    """Loading a model fails the test."""

    def refuse(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(export, "skeleton_of_folder", refuse)


@pytest.fixture
def copied_run(planted_run, tmp_path):
    """A copy of the planted model's run, to be changed."""
    path = tmp_path / "copy"
    shutil.copytree(planted_run.directory.path, path)
    return replace(planted_run, directory=RunDirectory(path))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor that transformers would find in a folder, by its name on disk."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def loaded(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


# What is written


def test_the_reloaded_export_answers_sure(exported):
    run, folder = exported("planted_run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "tell me about the cake"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    for place, answer in ((run.model, "sorry"), (folder, "sure")):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        new = loaded(place).generate(ids, max_new_tokens=1, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(new) == answer


def test_names_and_dtypes_are_those_of_the_checkpoint(pair):
    run, folder = pair
    before, after = tensors_of(run.model), tensors_of(folder)
    assert {k: v.dtype for k, v in before.items()} == {k: v.dtype for k, v in after.items()}


def test_exactly_the_writers_differ(pair):
    run, folder = pair
    before, after = tensors_of(run.model), tensors_of(folder)
    changed = {name for name in before if not same_bits(before[name], after[name])}
    endings = ("self_attn.o_proj.weight", "mlp.down_proj.weight", ".w2.weight")
    assert changed == {name for name in before if name.endswith(endings)}


def test_companion_files_are_byte_for_byte_the_originals(pair):
    run, folder = pair
    written = {path.name for path in folder.iterdir()}
    given = {path.name for path in run.model.iterdir()} - NOT_COPIED
    assert written == given | {"README.md", "verification.json", "reproduce"}
    for name in given - {"README.md"}:
        if not name.endswith(".safetensors"):
            assert (folder / name).read_bytes() == (run.model / name).read_bytes(), name
    assert "generation_config.json" in written


def test_tensors_that_no_class_loads_survive(exported):
    _, folder = exported("mixtral_run")
    draft = tensors_of(folder)["mtp.layers.0.proj.weight"]
    assert same_bits(draft, torch.arange(64.0).reshape(8, 8))


def test_tied_embeddings_stay_tied(exported):
    _, folder = exported("mixtral_run")
    assert "lm_head.weight" not in tensors_of(folder)
    model = loaded(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_two_exports_are_equal_files(exported, tmp_path):
    run, first = exported("planted_run")
    second = export.export_trial(run.directory, run.trial, tmp_path / "again", SilentProgress())
    assert files_of(first) == files_of(second)


def test_the_export_holds_the_bits_that_the_search_scored(exported):
    run, folder = exported("mixtral_run")
    directory = run.directory
    module = loaded(run.model)
    cache = WeightCache(module, find_writers(module))
    model = loaded(folder)
    with cache.edited(run.trial.plan, directory.directions()):
        for name, parameter in module.named_parameters():
            assert same_bits(parameter, model.get_parameter(name)), name


# Verification


@pytest.mark.parametrize(
    ("name", "reasons"), [("planted_run", 0), ("mixtral_run", 0), ("mixtral_float32_run", 1)]
)
def test_verification_json_holds_the_scores(exported, name, reasons):
    run, folder = exported(name)
    found = json.loads((folder / "verification.json").read_text())
    assert len(found["reasons"]) == reasons
    assert [s["name"] for s in found["scores"]] == ["keyword-rate", "kl-divergence"]
    for score, own in zip(found["scores"], run.trial.scorecard.scores, strict=True):
        assert score["trial"] == own.value
        assert score["within"]
        if not reasons:
            assert score["reloaded"] == pytest.approx(own.value, rel=1e-6, abs=1e-9)
    if reasons:
        assert "checkpoint is in bfloat16, the search ran in float32" in found["reasons"][0]


def spoiled(monkeypatch, spoil):
    """Do something to the written folder before it is verified."""
    verify = Verifier.verify

    def spoil_and_verify(self, folder):
        spoil(self.source, folder)
        return verify(self, folder)

    monkeypatch.setattr(Verifier, "verify", spoil_and_verify)


def test_an_export_that_does_not_score_as_the_trial_is_set_aside(
    planted_run, tmp_path, monkeypatch
):
    def undo(source, folder):
        shutil.copy(source / "model.safetensors", folder)

    spoiled(monkeypatch, undo)
    to = tmp_path / "out"
    with pytest.raises(ExportError, match="keyword-rate: 0 in the trial, 1 reloaded"):
        export.export_trial(planted_run.directory, planted_run.trial, to, SilentProgress())
    assert [path.name for path in tmp_path.iterdir()] == ["out.unverified"]
    found = json.loads((tmp_path / "out.unverified" / "verification.json").read_text())
    assert [score["within"] for score in found["scores"]] == [False, False]
    with pytest.raises(ExportError, match=r"out\.unverified is left"):
        export.export_trial(planted_run.directory, planted_run.trial, to, SilentProgress())


def test_an_export_that_answers_nothing_is_set_aside(planted_run, tmp_path, monkeypatch):
    def break_it(source, folder):
        tensors = tensors_of(folder) | {"model.norm.weight": torch.full((32,), torch.nan)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    spoiled(monkeypatch, break_it)
    to = tmp_path / "out"
    with pytest.raises(ExportError, match="logits are NaN"):
        export.export_trial(planted_run.directory, planted_run.trial, to, SilentProgress())
    assert [path.name for path in tmp_path.iterdir()] == ["out.unverified"]


def test_scores_are_held_to_what_can_be_expected():
    def rate(hits):
        return Score("r", hits / 100, 0.0, 1.0, detail={"hits": hits, "total": 100})

    def kl(value):
        return Score("k", value, 0.0, 1.0)

    assert verify_score(rate(10), rate(10), exact=True).within
    assert not verify_score(rate(10), rate(11), exact=True).within
    assert verify_score(rate(10), rate(13), exact=False).within
    assert not verify_score(rate(10), rate(14), exact=False).within
    assert verify_score(kl(0.5), kl(0.5 + 4e-7), exact=True).within
    assert not verify_score(kl(0.5), kl(0.5 + 6e-7), exact=True).within
    assert verify_score(kl(0.5), kl(0.55), exact=False).within
    assert not verify_score(kl(0.5), kl(0.56), exact=False).within


def test_without_verification_no_claim_is_made(planted_run, tmp_path):
    to = tmp_path / "an" / "empty folder"
    to.mkdir(parents=True)
    out = export.export_trial(
        planted_run.directory, planted_run.trial, to, SilentProgress(), verify=False
    )
    assert out == to
    assert not (out / "verification.json").exists()


# Refusals, all before a model is loaded


def test_an_occupied_target_is_refused(planted_run, tmp_path, unloaded):
    (tmp_path / "note.txt").write_text("mine")
    for to in (tmp_path, tmp_path / "note.txt"):
        with pytest.raises(ExportError, match="not an empty folder"):
            export.export_trial(planted_run.directory, planted_run.trial, to, SilentProgress())
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_a_target_inside_the_model_is_refused(planted_run, unloaded):
    to = planted_run.model / "out"
    with pytest.raises(ExportError, match="inside the base model's folder"):
        export.export_trial(planted_run.directory, planted_run.trial, to, SilentProgress())


def test_a_full_disk_is_refused(planted_run, tmp_path, unloaded, monkeypatch):
    usage = namedtuple("usage", "total used free")
    size = sum(path.stat().st_size for path in planted_run.model.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, size))
    with pytest.raises(ExportError, match="GB free"):
        export.export_trial(
            planted_run.directory, planted_run.trial, tmp_path / "o", SilentProgress()
        )
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_refused(planted_run, tmp_path, unloaded):
    (tmp_path / "file").write_text("")
    to = tmp_path / "file" / "out"
    with pytest.raises(ExportError, match="cannot be written"):
        export.export_trial(planted_run.directory, planted_run.trial, to, SilentProgress())


def test_other_prompts_than_the_runs_are_refused(copied_run, tmp_path, unloaded):
    prompts = copied_run.directory.read_environment()["prompts"]
    prompts["keyword-rate"]["fingerprint"] = "another"
    copied_run.directory.record_facts(prompts=prompts)
    with pytest.raises(PromptSourceError, match="keyword-rate"):
        export.export_trial(
            copied_run.directory, copied_run.trial, tmp_path / "o", SilentProgress()
        )


def test_a_model_folder_that_is_gone_is_explained(copied_run, tmp_path, unloaded):
    renamed(copied_run, "models/gone")
    with pytest.raises(ExportError, match="A relative folder counts from"):
        export.export_trial(
            copied_run.directory, copied_run.trial, tmp_path / "o", SilentProgress()
        )


def test_a_quantized_checkpoint_is_refused(planted_run, tmp_path):
    source = Checkpoint.open(planted_run.model)
    name = "model.layers.0.mlp.down_proj.weight"
    packed = replace(source.tensors[name], dtype="F8_E4M3")
    quantized = replace(source, tensors={**source.tensors, name: packed})
    with pytest.raises(ExportError, match="stored as F8_E4M3: the checkpoint is quantized"):
        quantized.read(name)


# The card, and the Hub


def test_the_card_holds_no_prompt_and_no_path(pair):
    run, folder = pair
    card = (folder / "README.md").read_text()
    assert f"# {run.model.name}, abliterated" in card
    assert str(run.model.parent) not in card
    assert str(run.directory.path) not in card
    assert "tell me about" not in card
    assert "base_model:" not in card
    baseline = run.directory.baseline().scorecard["keyword-rate"]
    assert f"{baseline.detail['hits']}/{baseline.detail['total']}" in card
    plan = card.partition("```json\n")[2].partition("```")[0]
    assert type(run.trial.plan).from_json(plan) == run.trial.plan


def renamed(run, name, revision=None):
    """Make a run's recipe name another model."""
    path = run.directory.path / "recipe.resolved.json"
    recipe = json.loads(path.read_text())
    recipe["model"]["name"] = name
    path.write_text(json.dumps(recipe))
    model = run.directory.read_environment()["model"]
    run.directory.record_facts(model={**model, "revision": revision})


def test_a_model_on_the_hub_is_read_at_the_runs_revision(copied_run, tmp_path, monkeypatch):
    renamed(copied_run, "owner/tiny", "abc123")
    asked = []

    def snapshot_download(name, revision, **patterns):
        asked.append((name, revision, patterns))
        return str(copied_run.model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    out = export.export_trial(
        copied_run.directory, copied_run.trial, tmp_path / "o", SilentProgress()
    )
    assert {(name, revision) for name, revision, _ in asked} == {("owner/tiny", "abc123")}
    assert "*.safetensors" in asked[0][2]["ignore_patterns"]
    assert asked[1][2] == {"allow_patterns": ["model.safetensors"]}
    card = (out / "README.md").read_text()
    assert "base_model: owner/tiny\nbase_model_relation: finetune" in card
    assert "revision `abc123`" in card


def test_the_response_prefix_of_the_run_is_used(copied_run):
    copied_run.directory.record_facts(response_prefix=[5, 6])
    model = verification._language_model(copied_run.directory, copied_run.model)
    assert model.response_prefix == (5, 6)
    assert model.batch_size == copied_run.directory.read_recipe().run.batch_size


def test_the_searchs_threads_are_used_and_then_given_back(copied_run, tmp_path, monkeypatch):
    replicas = {**copied_run.directory.read_environment()["replicas"], "threads": 3}
    copied_run.directory.record_facts(replicas=replicas)
    before, counts = torch.get_num_threads(), []

    def stop(*_):
        counts.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write_merged", stop)
    with pytest.raises(KeyboardInterrupt):
        export.export_trial(copied_run.directory, copied_run.trial, tmp_path / "o", verify=False)
    assert counts == [3]
    assert torch.get_num_threads() == before


def test_a_pruned_trial_is_written_unverified_or_not_at_all(planted_run, tmp_path):
    """Its plan is whole; its scores are no measure of what was written."""
    scores = planted_run.trial.scorecard.scores
    bounds = tuple(replace(score, bound=True) for score in scores)
    trial = replace(planted_run.trial, number=1, scorecard=Scorecard(bounds))
    with pytest.raises(ExportError, match=r"trial 1 was stopped early(?s:.*)--no-verify"):
        export.export_trial(planted_run.directory, trial, tmp_path / "out", SilentProgress())
    assert not (tmp_path / "out").exists()
    export.export_trial(
        planted_run.directory, trial, tmp_path / "out", SilentProgress(), verify=False
    )
    assert "| ≥ " in (tmp_path / "out" / "README.md").read_text()
