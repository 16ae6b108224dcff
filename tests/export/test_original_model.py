"""Exports after a search on a quantized checkpoint: the plan on what that was made of."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ray_abliterate.cli.app import app
from ray_abliterate.errors import ExportError, ModelError, PushError
from ray_abliterate.export.export import ExportForm, export_trial
from ray_abliterate.export.find_export import find_or_export
from ray_abliterate.export.reproduce import rebuild_export
from ray_abliterate.model.loading import load_model
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.recipe import ModelSettings
from tests.support.finished_runs import Finished, finish

pytestmark = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="pip install 'ray-abliterate[bitsandbytes]'"
)


class Notes(SilentProgress):
    """Remembers what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, wide_folder: Path) -> Path:
    """The wide model as a checkpoint of 4-bit weights."""
    folder = tmp_path_factory.mktemp("quantized") / "tiny-wide-nf4"
    settings = ModelSettings(name=str(wide_folder), quantization="nf4")
    load_model(str(wide_folder), settings)[0].save_pretrained(folder)
    for file in [*wide_folder.glob("token*"), *wide_folder.glob("chat_template*")]:
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, quantized: Path) -> Finished:
    """A finished run on it."""
    return finish(tmp_path_factory.mktemp("run"), quantized)


@pytest.fixture
def search(searched: Finished, tmp_path: Path) -> Finished:
    """A copy of that run, to add to."""
    shutil.copytree(searched.directory.path, tmp_path / "run")
    return replace(searched, directory=RunDirectory.open(tmp_path / "run"))


def written(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_the_plan_is_applied_to_the_originals_and_verified_there(
    search: Finished, wide_folder: Path, tmp_path: Path
) -> None:
    directory, trial, notes = search.directory, search.trial, Notes()
    found = export_trial(directory, trial, tmp_path / "found", notes, originals=str(wide_folder))
    plain = finish(tmp_path / "plain", wide_folder)
    plain.directory.save_directions(directory.directions())
    same = replace(plain.trial, plan=trial.plan)
    expected = export_trial(plain.directory, same, tmp_path / "expected", SilentProgress(), False)
    assert written(found) == written(expected) != written(wide_folder)
    verification = json.loads((found / "verification.json").read_text())
    assert verification["quantization"] == "bitsandbytes nf4" and verification["reasons"] == []
    for score in verification["scores"]:
        assert score["within"] and score["trial"] == pytest.approx(score["reloaded"], rel=1e-6)
        assert score["quantized"] == trial.scorecard[score["name"]].value
    assert any("originals: tiny-wide; the search ran on tiny-wide-nf4" in n for n in notes.said)
    assert any("bitsandbytes nf4 in the search" in note for note in notes.said)
    assert "full_precision" in directory.read_environment()


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_what_is_published_names_the_originals_and_no_path(
    search: Finished, wide_folder: Path, quantized: Path, tmp_path: Path, kind: Any
) -> None:
    form = ExportForm(kind)
    to = export_trial(
        search.directory,
        search.trial,
        tmp_path / "out",
        SilentProgress(),
        False,
        form,
        str(wide_folder),
    )
    bundle = json.loads((to / "reproduce" / "reproduce.json").read_text())
    assert bundle["base"]["called"] == "tiny-wide" and bundle["base"]["name"] is None
    assert bundle["searched"]["model"] == "tiny-wide-nf4"
    assert bundle["searched"]["quantization"] == "bitsandbytes nf4"
    card = (to / "README.md").read_text()
    assert "# tiny-wide, abliterated" in card
    assert r"quantized form of the base model**, **tiny-wide-nf4**" in card
    if kind == "adapter":
        config = json.loads((to / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "tiny-wide"
    for file in filter(Path.is_file, to.rglob("*")):
        for private in (wide_folder.parent, quantized.parent, search.directory.path):
            assert str(private).encode() not in file.read_bytes(), file.name


@pytest.fixture
def hub(wide_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A Hub's cache with the originals; what is asked of it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "cache" / "models--owner--wide" / "snapshots" / commit
    shutil.copytree(wide_folder, folder)
    asked: list[Any] = []

    def snapshot_download(name: str, revision: str | None = None, **patterns: Any) -> str:
        asked.append((name, revision))
        if name != "owner/wide":
            raise OSError("Repository Not Found")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def test_originals_of_the_hub_are_named_with_their_commit_and_rebuilt_from_there(
    search: Finished, tmp_path: Path, hub: list[Any]
) -> None:
    command = ["export", str(search.directory.path), "--trial", "0", "--no-verify"]
    out = CliRunner().invoke(
        app, [*command, "--to", str(tmp_path / "out"), "--originals", "owner/wide@main"]
    )
    assert out.exit_code == 0, out.output
    assert set(hub) == {("owner/wide", "main")}
    commit = "0123456789abcdef0123456789abcdef01234567"
    bundle = json.loads((tmp_path / "out" / "reproduce" / "reproduce.json").read_text())
    assert (bundle["base"]["name"], bundle["base"]["revision"]) == ("owner/wide", commit)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: owner/wide\n" in card and f"(revision `{commit}`)" in card
    hub.clear()
    result = rebuild_export(tmp_path / "out", tmp_path / "again", SilentProgress())
    assert result.bit_equal == result.tensors > 0 and set(hub) == {("owner/wide", commit)}
    assert written(tmp_path / "again") == written(tmp_path / "out")


# What is refused


def refused(search: Finished, to: Path, originals: Any) -> str:
    """The error, before anything was written."""
    with pytest.raises((ExportError, ModelError)) as caught:
        export_trial(
            search.directory, search.trial, to / "o", SilentProgress(), False, originals=originals
        )
    assert not [path for path in to.iterdir() if path.name in ("o", ".o.partial")]
    return str(caught.value)


def test_without_originals_the_option_is_named(search: Finished, tmp_path: Path) -> None:
    text = refused(search, tmp_path, None)
    assert "tiny-wide-nf4 is quantized (bitsandbytes nf4)" in text
    assert f"export {search.directory.path} --to FOLDER --originals FOLDER_OR_HUB_NAME" in text


def test_a_run_on_full_precision_takes_no_originals(
    planted_run: Finished, planted_folder: Path, tmp_path: Path, wide_folder: Path
) -> None:
    for run in (planted_run, finish(tmp_path / "run", wide_folder, held='quantization = "nf4"')):
        text = refused(run, tmp_path, str(planted_folder))
        assert "did not search on a quantized checkpoint" in text and "leave --originals" in text


def reconfigured(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def other_stream(folder: Path) -> None:
    """The same model with the axes of the residual stream turned round."""
    tensors = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name].flip(1).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (reconfigured(model_type="mistral", architectures=["MistralForCausalLM"]),
         "its model type is mistral, the checkpoint's llama"),
        (reconfigured(num_hidden_layers=2), "its number of layers is 2, the checkpoint's 3"),
        (reconfigured(hidden_size=32), "its hidden size is 32, the checkpoint's 64"),
        (reconfigured(intermediate_size=96),
         "its model.layers.0.mlp.down_proj.weight is (64, 96), the checkpoint's (64, 128)"),
        (other_stream, "another residual stream:\n  its token embeddings differ by 1"),
    ],
)  # fmt: skip
def test_another_model_is_refused_with_what_differs(
    search: Finished, wide_folder: Path, tmp_path: Path, change: Any, words: str
) -> None:
    shutil.copytree(wide_folder, tmp_path / "other")
    change(tmp_path / "other")
    assert words in refused(search, tmp_path, str(tmp_path / "other"))


def test_originals_that_are_quantized_or_nowhere_are_refused(
    search: Finished, quantized: Path, tmp_path: Path, hub: list[Any]
) -> None:
    text = refused(search, tmp_path, str(quantized))
    assert "quantized (bitsandbytes), and only full-precision weights" in text
    assert "is not a folder, and not the name" in refused(search, tmp_path, "not/a/model")
    assert "owner/gone cannot be read from the Hub" in refused(search, tmp_path, "owner/gone")


def test_rounded_embeddings_are_those_of_the_originals(
    search: Finished, wide_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(wide_folder, tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name].to(torch.bfloat16).float()
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    other = str(tmp_path / "other")
    export_trial(
        search.directory, search.trial, tmp_path / "o", SilentProgress(), False, originals=other
    )


def test_a_push_exports_the_originals_once(
    search: Finished, wide_folder: Path, planted_folder: Path
) -> None:
    place, given = search.directory.path, str(wide_folder)
    with pytest.raises(ExportError, match="--originals FOLDER_OR_HUB_NAME"):
        find_or_export(place, 0, SilentProgress(), True)
    folder = find_or_export(place, 0, SilentProgress(), True, given)
    assert folder == find_or_export(place, 0, SilentProgress(), True, given)
    assert folder == find_or_export(place, 0, SilentProgress(), True)
    with pytest.raises(
        ExportError, match=r"was made of tiny-wide, not of --originals .*tiny-planted"
    ):
        find_or_export(place, 0, SilentProgress(), True, str(planted_folder))
    with pytest.raises(PushError, match="leave --originals out"):
        find_or_export(folder, None, SilentProgress(), True, given)
