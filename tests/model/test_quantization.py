"""Search on quantized models: hooks give what edited weights would give."""

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from ray_abliterate.ablation import layer_hooks, live_writers
from ray_abliterate.ablation.weight_cache import WeightCache
from ray_abliterate.cli.trial_view import print_trial
from ray_abliterate.directions.directions import Directions
from ray_abliterate.errors import ExportError, ModelError
from ray_abliterate.evaluation.streaming.reader import TextRequest
from ray_abliterate.export.export import export_trial
from ray_abliterate.export.merged import EditedTensors
from ray_abliterate.model import quantization
from ray_abliterate.model.architecture import find_writers
from ray_abliterate.model.float32_linears import Float32Linears
from ray_abliterate.model.loading import load_model
from ray_abliterate.model.skeleton import unquantized_skeleton
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.pipeline.prompt_sets import load_prompts
from ray_abliterate.recipe import ModelSettings
from ray_abliterate.replica.messages import TrialSetup
from ray_abliterate.replica.replica import Replica
from ray_abliterate.report.report import build_report
from ray_abliterate.search.plan import ModelShape, Plan
from ray_abliterate.testing.tiny import tiny_model
from tests.support.finished_runs import Finished, finish

HIDDEN, LAYERS, CPU = 64, 3, torch.device("cpu")
SEARCHED = ("nf4", "torchao-int8")
KINDS = ("nf4", "int8", "torchao-int8", "torchao-int4")
ROUNDING = {"nf4": 1e-5, "int8": 2e-2, "torchao-int8": 1e-5, "torchao-int4": 1e-5}
"""Relative error of a pass in float32: int8 rounds activations, too."""


def kinds(*names: str) -> Any:
    """Quantizations, each skipped without its package."""
    return pytest.mark.parametrize(
        "kind", [pytest.param(name, marks=needs(name)) for name in names]
    )


def package_of(kind: str) -> str:
    return "torchao" if kind.startswith("torchao") else "bitsandbytes"


def needs(kind: str) -> pytest.MarkDecorator:
    package = package_of(kind)
    reason = f"pip install 'ray-abliterate[{package}]'"
    return pytest.mark.skipif(find_spec(package) is None, reason=reason)


def loaded(folder: Path, kind: str | None, **more: Any) -> Any:
    settings = ModelSettings(name=str(folder), quantization=kind, **more)
    return load_model(str(folder), settings)[0]


def directions() -> Directions:
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(LAYERS, HIDDEN, generator=generator)
    return Directions(nn.functional.normalize(vectors, dim=-1), "random", {})


def plan(norm: str, strength: float = 0.8) -> Plan:
    return Plan.uniform(ModelShape(LAYERS, HIDDEN, ("attn", "mlp")), 1.3, norm, strength)


@kinds(*KINDS)
@pytest.mark.parametrize("norm", ["none", "row", "column"])
def test_a_hooked_edit_of_quantized_weights_is_the_edit_of_dequantized_ones(
    wide_folder: Path, kind: str, norm: str
) -> None:
    quantized = loaded(wide_folder, kind)
    writers = find_writers(unquantized_skeleton(quantized), in_memory=False)
    plain = loaded(wide_folder, None)
    for name, module in quantized.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            matrix = layer_hooks.matrix_of(module, module.in_features, torch.float32, CPU)
            plain.get_submodule(name).weight.data.copy_(matrix)
    cache, reference = WeightCache(quantized, writers), WeightCache(plain, writers)
    assert cache.has_hooked_writers and not reference.has_hooked_writers and cache.bytes == 0
    ids = torch.arange(3, 27).view(2, 12)
    with torch.inference_mode():
        before = quantized(ids).logits
        with cache.edited(plan(norm), directions()), reference.edited(plan(norm), directions()):
            found, expected = quantized(ids).logits, plain(ids).logits
            assert cache.differs() and cache.untouched == reference.untouched
        after, base = quantized(ids).logits, plain(ids).logits
    assert torch.equal(before, after) and not cache.differs()
    effect = (expected - base).norm()
    assert effect > 0.1 * base.norm()
    assert (found - expected).norm() < ROUNDING[kind] * expected.norm()


# A whole run


@pytest.fixture(scope="module", params=[pytest.param(k, marks=needs(k)) for k in SEARCHED])
def searched(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, wide_folder: Path
) -> Finished:
    """Return a finished run on quantized weights."""
    lines = f'quantization = "{request.param}"'
    return finish(tmp_path_factory.mktemp(f"run-{request.param}"), wide_folder, held=lines)


def replica_of(finished: Finished) -> tuple[Replica, TrialSetup]:
    directory = finished.directory
    sets = load_prompts(directory.read_recipe(), directory, directory.read_base(), SilentProgress())
    setup = TrialSetup(
        directory.directions(), tuple(directory.read_environment()["response_prefix"])
    )
    return Replica(directory.read_recipe(), str(finished.model), sets.scored), setup


def test_a_trial_reads_no_weights_and_scores_the_same_wherever_it_runs(
    searched: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def matrix_of(linear: Any, *rest: Any) -> Any:
        read.append(linear)
        return layer_hooks.matrix_of(linear, *rest)

    monkeypatch.setattr(live_writers, "matrix_of", matrix_of)
    replica, setup = replica_of(searched)
    base = replica.evaluate(Plan.nothing(), setup).scorecard
    assert len(read) == len(set(read)) == 2 * LAYERS
    plans = [plan("row", 0.9), searched.trial.plan, plan("row", 0.4)]
    cards = [replica.evaluate(one, setup).scorecard for one in plans]
    assert len(read) == 2 * LAYERS
    assert cards[1] == searched.trial.scorecard
    assert replica.evaluate(Plan.nothing(), setup).scorecard == base
    assert base["kl-divergence"].value == 0 < cards[2]["kl-divergence"].value
    together = replica.evaluate_in_shared_passes(plans, setup)
    for one, other in zip(cards, together, strict=True):
        assert not isinstance(other, Exception)
        apart = abs(one["kl-divergence"].value - other.scorecard["kl-divergence"].value)
        assert apart < 0.02 * one["kl-divergence"].value
    assert len(read) == 2 * LAYERS
    facts = replica.describe()
    assert facts.cache_bytes == 0 and facts.model_bytes < 4 * facts.parameters / 2
    assert facts.quantization in facts.computes and facts.fingerprint == fingerprint_of(searched)


def test_what_else_a_replica_does_sees_the_edit_and_the_base_model(
    searched: Finished, tmp_path: Path
) -> None:
    replica, setup = replica_of(searched)
    ids, edited = torch.arange(3, 15)[None], plan("row", 1.0)
    module = replica.model.module
    with torch.inference_mode():
        base = module(ids).logits
        with replica.cache.edited(edited, setup.directions):
            other = module(ids).logits
            with replica.cache.suspended():
                assert torch.equal(module(ids).logits, base)
            assert torch.equal(module(ids).logits, other) and not torch.equal(other, base)
    text = tmp_path / "text.txt"
    text.write_text("tell me about the old river " * 8)
    route = replica.plan_reading(TextRequest(str(text), carry="none", chunk_size=16), True)
    nats = [
        [piece.nats for piece in replica.read(route, 0, None, None, one, setup)]
        for one in (Plan.nothing(), edited, Plan.nothing())
    ]
    assert nats[0] == nats[2] != nats[1]
    turns = [{"role": "user", "content": "tell me about the river"}]
    assert isinstance(replica.respond(turns, edited, setup, 4), str)


def fingerprint_of(finished: Finished) -> str:
    return str(finished.directory.read_environment()["model"]["fingerprint"])


def test_an_export_is_that_of_the_same_plan_on_the_originals_and_its_scores_are_shown(
    searched: Finished, tmp_path: Path, wide_folder: Path
) -> None:
    directory, trial = searched.directory, searched.trial
    plain = finish(tmp_path / "plain", wide_folder)
    plain.directory.save_directions(directory.directions())
    same = replace(plain.trial, plan=trial.plan)
    expected = export_trial(plain.directory, same, tmp_path / "expected", SilentProgress(), False)
    notes = Notes()
    found = export_trial(directory, trial, tmp_path / "found", notes)
    assert read_all(found) == read_all(expected) != read_all(wide_folder)
    verification = json.loads((found / "verification.json").read_text())
    assert verification["reasons"] == []
    for score in verification["scores"]:
        assert score["within"] and score["trial"] == pytest.approx(score["reloaded"], rel=1e-6)
        assert score["quantized"] == trial.scorecard[score["name"]].value
    full = {score["name"]: score["reloaded"] for score in verification["scores"]}
    assert full["kl-divergence"] != trial.scorecard["kl-divergence"].value
    assert any("in full precision" in note for note in notes.said)
    shown = Console(record=True, width=150)
    print_trial(directory, trial, shown)
    text, page = shown.export_text(), build_report(directory)
    method = directory.read_environment()["model"]["quantization"]
    for value in (f"{full['kl-divergence']:.4g}", method):
        assert value in text and value in page
    assert "differs by" in page
    assert method in (found / "README.md").read_text()


class Notes(SilentProgress):
    """Remembers what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def read_all(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_files_that_are_not_the_plans_fail_although_the_search_was_quantized(
    searched: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = plan(searched.trial.plan.norm, 0.5)
    monkeypatch.setattr(
        "ray_abliterate.export.export.EditedTensors", lambda t, _, d: EditedTensors(t, other, d)
    )
    with pytest.raises(ExportError, match="do not score as the trial did"):
        export_trial(searched.directory, searched.trial, tmp_path / "out", SilentProgress())


# What can't be


@needs("torchao-int4")
def test_rows_that_do_not_divide_into_groups_are_refused(planted_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"takes 32 weights .*\n.*Choose nf4 or torchao-int8"):
        loaded(planted_folder, "torchao-int4")


@needs("nf4")
def test_the_state_of_4_bit_layers_can_be_asked_for_without_changing_them(
    wide_folder: Path,
) -> None:
    model, ids = loaded(wide_folder, "nf4"), torch.arange(3, 15)[None]
    with torch.inference_mode():
        before = model(ids).logits
        model.state_dict()
        assert torch.equal(model(ids).logits, before)


@needs("torchao-int8")
def test_unquantized_experts_are_written_to_in_place_next_to_quantized_attention(
    mixtral_folder: Path,
) -> None:
    quantized = loaded(mixtral_folder, "torchao-int8", dtype="float32")
    plain = loaded(mixtral_folder, None, dtype="float32")
    writers = find_writers(unquantized_skeleton(quantized), in_memory=False)
    attention = [writer for writer in writers if writer.component == "attn"]
    for writer in attention:
        owner = writer.parameter.removesuffix(".weight")
        matrix = layer_hooks.matrix_of(quantized.get_submodule(owner), 32, torch.float32, CPU)
        plain.get_parameter(writer.parameter).data.copy_(matrix)
    for name in ("q_proj", "k_proj", "v_proj"):
        for layer in range(2):
            owner = f"model.layers.{layer}.self_attn.{name}"
            matrix = layer_hooks.matrix_of(quantized.get_submodule(owner), 32, torch.float32, CPU)
            plain.get_parameter(f"{owner}.weight").data.copy_(matrix)
    caches = WeightCache(quantized, writers), WeightCache(plain, writers)
    assert 0 < caches[0].bytes < caches[1].bytes and "experts" in caches[0].stacked_experts
    some = Plan.uniform(ModelShape(2, 32, ("attn", "experts")), 1.0, "row", 0.9)
    vectors = nn.functional.normalize(torch.randn(2, 32), dim=-1)
    found = Directions(vectors, "random", {})
    ids = torch.arange(3, 15)[None]
    with torch.inference_mode(), caches[0].edited(some, found), caches[1].edited(some, found):
        torch.testing.assert_close(quantized(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


# Checkpoints that are quantized already


@needs("nf4")
def test_a_quantized_checkpoint_is_searched_and_not_exported_by_itself(
    wide_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "quantized"
    loaded(wide_folder, "nf4").save_pretrained(folder)
    for file in [*wide_folder.glob("token*"), *wide_folder.glob("chat_template*")]:
        shutil.copy(file, folder)
    made = finish(tmp_path / "made", wide_folder, held='quantization = "nf4"')
    given = finish(tmp_path / "given", folder)
    assert given.directory.read_environment()["model"]["quantization"] == "bitsandbytes nf4"
    assert given.trial.scorecard == made.trial.scorecard
    with pytest.raises(ExportError, match=r"is quantized \(bitsandbytes nf4\), and only"):
        export_trial(given.directory, given.trial, tmp_path / "out", SilentProgress())
    with pytest.raises(ModelError, match=r"'nf4', but .* is quantized already"):
        loaded(folder, "nf4")


@pytest.mark.parametrize(
    ("method", "install"), [("gptq", "gptqmodel optimum"), ("hqq", "hqq"), ("vptq", "vptq")]
)
def test_a_missing_package_is_named_before_weights_are_read(
    method: str, install: str, wide_folder: Path, tmp_path: Path
) -> None:
    for file in wide_folder.glob("*.json"):
        shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"\({method}\) needs .*\n  pip install {install}$"):
        loaded(tmp_path, None)


def test_the_extra_that_brings_a_missing_package_is_named(
    wide_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"'nf4' needs bitsandbytes.*\n.*ray-abliterate\[bits"):
        loaded(wide_folder, "nf4")


@kinds("nf4", "torchao-int8")
def test_in_bfloat16_hooked_edits_agree_as_closely_as_it_rounds(
    wide_folder: Path, kind: str
) -> None:
    model = loaded(wide_folder, kind, dtype="bfloat16")
    Float32Linears(model)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
    assert not any("forward" in vars(layer) for layer in layers)
    plain = loaded(wide_folder, None, dtype="bfloat16")
    for name, module in model.named_modules():
        if module in layers:
            matrix = layer_hooks.matrix_of(module, module.in_features, torch.bfloat16, CPU)
            plain.get_submodule(name).weight.data.copy_(matrix)
    writers = find_writers(unquantized_skeleton(model), in_memory=False)
    caches, ids = (WeightCache(model, writers), WeightCache(plain, writers)), torch.arange(3, 27)
    edits = [cache.edited(plan("row"), directions()) for cache in caches]
    with torch.inference_mode(), edits[0], edits[1]:
        found, expected = (m(ids.view(2, 12)).logits.float() for m in (model, plain))
    assert (found - expected).norm() < 0.03 * expected.norm()


class Packed(nn.Module):
    """A layer like GPTQ's and AWQ's: no `weight`, but codes and scales in buffers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 7
        self.register_buffer("scales", scales)
        self.register_buffer("codes", (linear.weight.detach() / scales).round().to(torch.int8).T)
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x @ self.codes.to(x.dtype)) * self.scales[:, 0]
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize("norm", ["none", "row", "column"])
def test_layers_without_a_weight_are_read_off_their_outputs(norm: str) -> None:
    packed, plain = (tiny_model("llama/biases", layers=LAYERS) for _ in range(2))
    for name, linear in list(packed.named_modules()):
        if name.endswith(("o_proj", "down_proj")):
            layer = Packed(linear)
            packed.set_submodule(name, layer)
            plain.get_submodule(name).weight.data.copy_(layer.codes.T * layer.scales)
    packed.hf_quantizer = object()  # as transformers marks quantized models
    writers = find_writers(unquantized_skeleton(packed), in_memory=False)
    assert writers == find_writers(plain)
    store = UntouchedStore()
    caches = WeightCache(packed, writers, "node", store), WeightCache(plain, writers)
    assert caches[0].bytes == 0
    vectors = nn.functional.normalize(torch.randn(LAYERS, 32), dim=-1)
    found, some = Directions(vectors, "random", {}), plan(norm)
    ids = torch.arange(3, 15)[None]
    with torch.inference_mode(), caches[0].edited(some, found), caches[1].edited(some, found):
        torch.testing.assert_close(packed(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


class UntouchedStore:
    """A node's store that must not be asked for anything."""

    def share(self, key: str, make: Any) -> Any:
        raise AssertionError(key)
