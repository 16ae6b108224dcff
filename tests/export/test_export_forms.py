"""Exports of finished runs: adapters, other shards, what was interrupted, what cannot be had."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ray_abliterate.cli.app import app
from ray_abliterate.errors import ExportError
from ray_abliterate.export import export, merged
from ray_abliterate.export.checkpoint import INDEX
from ray_abliterate.export.export import ExportForm, export_trial
from ray_abliterate.export.output_folder import open_partial, partial_path
from ray_abliterate.export.verification import Verifier
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import SilentProgress

ADAPTER = ExportForm("adapter")


class Notes(SilentProgress):
    """Remembers what was noted."""

    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


def files_of(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}


def places_of(folder):
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in Path(folder).iterdir()}


# Adapters


def test_an_adapter_of_the_trial_is_verified_and_answers_as_the_merged_model(planted_run, tmp_path):
    notes = Notes()
    to = export_trial(planted_run.directory, planted_run.trial, tmp_path / "a", notes, form=ADAPTER)
    assert {path.name for path in to.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_errors.json",
        "adapter_model.safetensors",
        "reproduce",
        "verification.json",
    }
    found = json.loads((to / "verification.json").read_text())
    assert all(score["within"] for score in found["scores"])
    assert "an adapter is added to the layers' outputs" in found["reasons"][0]
    assert any("they are the edit exactly" in line for line in notes.lines)
    base = transformers.AutoModelForCausalLM.from_pretrained(planted_run.model, dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(planted_run.model)
    ids = tokenizer("tell me about the cake", return_tensors="pt")["input_ids"]
    whole = export_trial(planted_run.directory, planted_run.trial, tmp_path / "m", SilentProgress())
    edited = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype="auto")
    with torch.inference_mode():
        assert torch.allclose(
            PeftModel.from_pretrained(base, to)(ids).logits, edited(ids).logits, atol=1e-4
        )


def test_the_base_of_an_adapter_is_never_a_path(planted_run, tmp_path):
    to = export_trial(
        planted_run.directory, planted_run.trial, tmp_path / "a", SilentProgress(), False, ADAPTER
    )
    config = json.loads((to / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == planted_run.model.name
    for file in filter(Path.is_file, to.rglob("*")):
        assert str(planted_run.model.parent).encode() not in file.read_bytes(), file.name


def test_an_adapter_whose_base_is_in_reach_loads_by_itself(planted_run, tmp_path, monkeypatch):
    to = export_trial(
        planted_run.directory, planted_run.trial, tmp_path / "a", SilentProgress(), False, ADAPTER
    )
    monkeypatch.chdir(planted_run.model.parent)  # the name in the file is the folder's own
    assert AutoPeftModelForCausalLM.from_pretrained(to).peft_config["default"].use_dora


def test_an_adapter_that_peft_cannot_hold_leaves_nothing(mixtral_float32_run, tmp_path):
    run = mixtral_float32_run
    with pytest.raises(ExportError, match=r"experts\.down_proj cannot be edited by a PEFT adapter"):
        export_trial(run.directory, run.trial, tmp_path / "a", SilentProgress(), form=ADAPTER)
    assert list(tmp_path.iterdir()) == []


def test_column_edits_are_an_adapter_only_if_what_it_lacks_is_allowed(mixtral_run, tmp_path):
    run = mixtral_run
    with pytest.raises(ExportError, match=r"lack more than 1\.00% of the edit"):
        export_trial(run.directory, run.trial, tmp_path / "a", SilentProgress(), form=ADAPTER)
    allowed = replace(ADAPTER, adapter_error=0.5)
    notes = Notes()
    to = export_trial(run.directory, run.trial, tmp_path / "a", notes, False, allowed)
    assert any("the most that they lack of one is" in line for line in notes.lines)
    assert (to / "adapter_model.safetensors").exists()


def test_an_adapter_that_does_not_score_as_the_trial_is_set_aside(
    planted_run, tmp_path, monkeypatch
):
    verify = Verifier.verify

    def weaken(self, folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        save_file({n: t * 0 if "lora_B" in n else t for n, t in tensors.items()}, path)
        return verify(self, folder)

    monkeypatch.setattr(Verifier, "verify", weaken)
    with pytest.raises(ExportError, match="keyword-rate: 0 in the trial, 1 reloaded"):
        export_trial(
            planted_run.directory, planted_run.trial, tmp_path / "a", SilentProgress(), form=ADAPTER
        )
    assert [path.name for path in tmp_path.iterdir()] == ["a.unverified"]


# Other shards


def test_an_export_in_other_shards_is_verified(mixtral_run, tmp_path):
    run = mixtral_run
    form = ExportForm(shard_bytes=10_000)
    to = export_trial(run.directory, run.trial, tmp_path / "out", SilentProgress(), form=form)
    assert all(s["within"] for s in json.loads((to / "verification.json").read_text())["scores"])
    names = set(json.loads((to / INDEX).read_text())["weight_map"].values())
    assert names == {path.name for path in to.glob("*.safetensors")}
    assert len(names) > len(list(run.model.glob("model*.safetensors")))
    assert "mtp.layers.0.proj.weight" in json.loads((to / INDEX).read_text())["weight_map"]


# Interrupted

KILLED = """
import os, signal, sys
from pathlib import Path
from ray_abliterate.export.export import export_trial
from ray_abliterate.export.merged import EditedTensors
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.pipeline.directory import RunDirectory

pieces, asked = EditedTensors.pieces, []

def die_at_the_seventh(self, name):
    asked.append(name)
    for piece in pieces(self, name):
        yield piece
        if len(asked) == 7:
            os.kill(os.getpid(), signal.SIGKILL)

EditedTensors.pieces = die_at_the_seventh
directory = RunDirectory(Path(sys.argv[1]))
export_trial(directory, directory.trial(0), Path(sys.argv[2]), SilentProgress())
"""


def test_a_killed_export_resumes_where_it_was(mixtral_run, tmp_path):
    run, to = mixtral_run, tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(run.directory.path), str(to)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    left = partial_path(to)
    finished = json.loads((left / ".progress.json").read_text())["finished"]
    written = {path.name for path in left.glob("*.safetensors")}
    assert finished and written - set(finished), "it was killed between files"
    before = places_of(left)
    export_trial(run.directory, run.trial, to, SilentProgress())
    after = places_of(to)
    assert {name for name in before if after.get(name) == before[name]} == set(finished)
    clean = export_trial(run.directory, run.trial, tmp_path / "clean", SilentProgress())
    assert files_of(to) == files_of(clean)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean", "out"]


@pytest.fixture
def interrupted(mixtral_run, tmp_path, monkeypatch):
    """An export that was stopped when its weights were complete."""

    def interrupt(*_):
        raise KeyboardInterrupt

    to, notes = tmp_path / "out", Notes()
    with monkeypatch.context() as patch:
        patch.setattr(export, "model_card", interrupt)
        with pytest.raises(KeyboardInterrupt):
            export_trial(mixtral_run.directory, mixtral_run.trial, to, notes)
    assert str(partial_path(to)) in notes.lines[-1]
    assert "the same command resumes from there" in notes.lines[-1]
    return to


def rewritten(run, to, trial=None):
    """Weight files that the next attempt wrote anew."""
    before = places_of(partial_path(to))
    export_trial(run.directory, trial or run.trial, to, SilentProgress(), verify=False)
    after = places_of(to)
    return {n for n in after if n.endswith(".safetensors") and after[n] != before.get(n)}


def test_finished_files_are_not_written_again(mixtral_run, interrupted):
    assert rewritten(mixtral_run, interrupted) == set()


def test_a_finished_file_that_changed_is_written_again(mixtral_run, interrupted):
    path = sorted(partial_path(interrupted).glob("*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert rewritten(mixtral_run, interrupted) == {path.name}


def test_another_trial_does_not_take_up_what_is_left(mixtral_run, interrupted):
    weights = {path.name for path in partial_path(interrupted).glob("*.safetensors")}
    plan = mixtral_run.trial.plan
    other = replace(plan, profiles=plan.profiles[:1])
    assert rewritten(mixtral_run, interrupted, replace(mixtral_run.trial, plan=other)) == weights


def test_other_further_directions_do_not_take_up_what_is_left(
    mixtral_run, interrupted, monkeypatch
):
    directions = mixtral_run.directory.directions()
    more = torch.zeros(directions.layers, 1, 32)
    wider = replace(directions, further=more)
    monkeypatch.setattr(RunDirectory, "directions", lambda self: wider)
    weights = {path.name for path in partial_path(interrupted).glob("*.safetensors")}
    assert rewritten(mixtral_run, interrupted) == weights


def test_a_changed_base_model_is_read_again(mixtral_run, interrupted):
    path = next(mixtral_run.model.glob("model-00001*"))
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))
    weights = {path.name for path in partial_path(interrupted).glob("*.safetensors")}
    assert rewritten(mixtral_run, interrupted) == weights


def test_two_processes_do_not_write_one_export(planted_run, tmp_path):
    to = tmp_path / "out"
    with open_partial(to, {}), pytest.raises(ExportError, match="another process is writing"):
        export_trial(planted_run.directory, planted_run.trial, to, SilentProgress())


def test_space_is_counted_without_what_is_finished(mixtral_run, interrupted, monkeypatch):
    def usage(_):
        return type("usage", (), {"free": 40_000})

    size = sum(path.stat().st_size for path in mixtral_run.model.glob("model*.safetensors"))
    assert size > 2 * 40_000
    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert rewritten(mixtral_run, interrupted) == set()


def test_a_disk_that_fills_up_is_explained_and_the_export_resumes(mixtral_run, tmp_path):
    run, to, write, calls = mixtral_run, tmp_path / "out", merged._write_file, []

    def full(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return write(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merged, "_write_file", full)
        with pytest.raises(ExportError, match=r"No space left on device(?s:.*)If the disk is full"):
            export_trial(run.directory, run.trial, to, SilentProgress())
    assert len(json.loads((partial_path(to) / ".progress.json").read_text())["finished"]) == 2
    export_trial(run.directory, run.trial, to, SilentProgress(), verify=False)


# What cannot be had


def test_a_trial_that_is_not_there_is_named(planted_run):
    with pytest.raises(Exception, match="trial 7") as error:
        planted_run.directory.trial(7)
    assert type(error.value).__name__ == "TrialNotFound"


@pytest.mark.parametrize("kind", ["RevisionNotFoundError", "LocalEntryNotFoundError"])
def test_a_base_revision_that_is_gone_is_named(planted_run, tmp_path, monkeypatch, kind):
    from huggingface_hub import errors as hub

    answer = hub.Response(404, request=object())
    errors = {
        "RevisionNotFoundError": hub.RevisionNotFoundError("404: not found", response=answer),
        "LocalEntryNotFoundError": hub.LocalEntryNotFoundError("it is not in the cache"),
    }

    def gone(*_, **__):
        raise errors[kind]

    monkeypatch.setattr("huggingface_hub.snapshot_download", gone)
    copy = RunDirectory(tmp_path / "run")
    shutil.copytree(planted_run.directory.path, copy.path)
    file = copy.path / "recipe.resolved.json"
    recipe = json.loads(file.read_text())
    recipe["model"]["name"] = "owner/tiny"
    file.write_text(json.dumps(recipe))
    copy.record_facts(model={**copy.read_environment()["model"], "revision": "abc123"})
    with pytest.raises(ExportError, match=r"owner/tiny at revision abc123 cannot be read"):
        export_trial(copy, planted_run.trial, tmp_path / "out", SilentProgress())
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_stacked_experts_is_verified(mixtral_none_run, tmp_path):
    run = mixtral_none_run
    to = export_trial(run.directory, run.trial, tmp_path / "a", SilentProgress(), form=ADAPTER)
    config = json.loads((to / "adapter_config.json").read_text())
    assert len(config["target_parameters"]) == len(config["target_modules"]) == 2
    assert all(s["within"] for s in json.loads((to / "verification.json").read_text())["scores"])


def test_the_command_line_writes_what_it_is_asked_for(planted_run, tmp_path):
    command = ["export", str(planted_run.directory.path), "--trial", "0", "--no-verify"]
    for options, file in (
        (["--as", "adapter"], "adapter_model.safetensors"),
        (["--shard-size", "40KB"], "model-00004-of-00004.safetensors"),
        ([], "model.safetensors"),
    ):
        to = tmp_path / file
        done = CliRunner().invoke(app, [*command, "--to", str(to), *options])
        assert done.exit_code == 0, done.output
        assert (to / file).is_file(), sorted(path.name for path in to.iterdir())
