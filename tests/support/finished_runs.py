"""Finished runs on tiny models, made with the real classes in this process, without Ray."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ray_abliterate.cluster.object_store import Reference
from ray_abliterate.cluster.placement import ReplicaLayout
from ray_abliterate.data.builtin.planted_model import build_planted_model
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.extraction import find_directions
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.pipeline.prompt_sets import load_prompts
from ray_abliterate.pipeline.replicas import record_environment
from ray_abliterate.pipeline.run import measure_baseline
from ray_abliterate.recipe import Recipe
from ray_abliterate.replica.replica import Replica
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.plan import Plan
from ray_abliterate.testing.tiny import tiny_model
from tests.support.run_contexts import run_context

FLAGGED = ("cake", "bread", "soup", "stew", "pie", "toast", "noodles", "salad")
PLAIN = ("tell", "me", "about", "the", "old", "river", "stone", "cloud", "train", "music", "chess")
THINGS = ("river", "stone", "cloud", "train", "music", "chess", "tell", "about")

RECIPE = """
[model]
name = "{model}"
dtype = "{dtype}"
{held}

[prompts]
behaviour = {{ file = "behaviour.txt", split = "[:4]" }}
neutral = {{ file = "neutral.txt", split = "[:4]" }}

[edit]
norm = "{norm}"

[search]
trials = 1

[[scorers]]
kind = "keyword-rate"
prompts = {{ file = "behaviour.txt", split = "[4:]" }}
max_new_tokens = 4

[[scorers]]
kind = "kl-divergence"
prompts = {{ file = "compared.txt" }}
tokens = 3

[run]
batch_size = 3
residual_cache = false
"""


@dataclass(frozen=True)
class Finished:
    """A run with one trial, and the model it was made on."""

    directory: RunDirectory
    trial: Trial
    model: Path


class InProcessStore:
    """An object store whose references hold the values."""

    def put(self, value: Any) -> Reference[Any]:
        return Reference(value)

    def fetch(self, reference: Reference[Any]) -> Any:
        return reference.handle

    def each(self, function: Any, references: Any, *args: Any) -> Any:
        return [(key, function(value.handle, *args)) for key, value in references.items()]


class InProcessPool:
    """Does what a replica pool does, with one replica in this process."""

    store = InProcessStore()
    replicas = 1

    def __init__(self, replica: Any) -> None:
        self.replica = replica
        self.facts = replica.describe()
        self.layout = ReplicaLayout(1, 0.0, 1.0, torch.get_num_threads())

    def call(self, method: Callable[..., Any], *args: Any) -> Any:
        return getattr(self.replica, method.__name__)(*args)

    def map(
        self,
        method: Callable[..., Any],
        calls: Any,
        most_out: int | None = None,
        go_on: Any = lambda: True,
    ) -> Iterator[Any]:
        for args in calls:
            if not go_on():
                return
            yield self.call(method, *args)

    def streams(
        self, method: Callable[..., Any], count: int, arguments: Any, go_on: Any = lambda: True
    ) -> Iterator[Any]:
        for number in range(count):
            for item in self.call(method, *arguments(number)):
                yield number, item

    def map_by_reference(
        self, method: Callable[..., Any], calls: Any
    ) -> Iterator[tuple[int, Reference[Any]]]:
        for number, result in enumerate(list(self.map(method, calls))):
            yield number, Reference(result)

    def put(self, value: Any) -> Reference[Any]:
        return self.store.put(value)


def finish(
    folder: Path,
    model: Path,
    dtype: str = "auto",
    norm: str = "row",
    more: str = "",
    held: str = "",
) -> Finished:
    """A run in `folder` with trial 0: one direction, taken out everywhere.

    Args:
        folder: Where recipe and run go.
        model: The model's folder.
        dtype: As in the recipe.
        norm: As in the recipe.
        more: Further sections of the recipe.
        held: Further settings of the model.
    """
    base = folder / "recipe"
    base.mkdir(parents=True)
    prompts = {"behaviour": FLAGGED, "neutral": THINGS, "compared": THINGS[4:] + FLAGGED[-1:]}
    for name, words in prompts.items():
        lines = "".join(f"tell me about the old {word}\n" for word in words)
        (base / f"{name}.txt").write_text(lines)
    text = RECIPE.format(model=model, dtype=dtype, norm=norm, held=held) + more
    recipe = Recipe.parse(text, "recipe.toml")
    directory, progress = RunDirectory.create(folder / "run", recipe, text), SilentProgress()
    sets = load_prompts(recipe, directory, base, progress)
    pool: Any = InProcessPool(Replica(recipe, str(model), sets.scored))
    context = run_context(directory, pool, recipe, progress, base)
    record_environment(context)
    setup, shards = find_directions(context, sets)
    baseline = measure_baseline(context, setup, pool.put(setup), shards)
    plan = Plan.uniform(pool.facts.shape, float(baseline.best_layer), recipe.edit.norm)
    evaluation = pool.replica.evaluate(plan, setup)
    trial = Trial(0, plan, evaluation.scorecard, evaluation.seconds)
    directory.append_trial(trial)
    return Finished(directory, trial, model)


@pytest.fixture(scope="session")
def planted_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "tiny-planted"
    return build_planted_model(folder, FLAGGED, PLAIN)


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory: pytest.TempPathFactory, planted_folder: Path) -> Path:
    """A Llama with biases whose rows divide into groups of 32 weights."""
    folder = tmp_path_factory.mktemp("wide") / "tiny-wide"
    model = tiny_model(
        "llama/biases", layers=3, hidden_size=64, intermediate_size=128, head_dim=16,
        eos_token_id=2,
    )  # fmt: skip
    model.save_pretrained(folder)
    for file in [*planted_folder.glob("token*"), *planted_folder.glob("chat_template*")]:
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def mixtral_folder(tmp_path_factory, planted_folder) -> Path:
    """A bfloat16 mixture of experts in several files: tied embeddings, a draft head, companions."""
    folder = tmp_path_factory.mktemp("mixtral") / "tiny-mixtral"
    vocab = json.loads((planted_folder / "config.json").read_text())["vocab_size"]
    model = tiny_model(
        "mixtral", layers=2, vocab_size=vocab, tie_word_embeddings=True, eos_token_id=2
    )
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.95)
    model.config.dtype = torch.bfloat16
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")
    for file in planted_folder.glob("token*"):
        shutil.copy(file, folder)
    if (template := planted_folder / "chat_template.jinja").exists():
        shutil.copy(template, folder)
    add_draft_head(folder)
    (folder / "LICENSE").write_text("Do as you like.\n")
    (folder / "modeling_extra.py").write_text("# nothing\n")
    (folder / "README.md").write_text("The original's card.\n")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights in another form")
    (folder / ".gitattributes").write_text("*.safetensors lfs\n")
    return folder


def add_draft_head(folder: Path) -> None:
    """Tensors that no model class loads, in a dtype of their own."""
    name = "model-00099-of-00099.safetensors"
    extra = {"mtp.layers.0.proj.weight": torch.arange(64.0).reshape(8, 8)}
    save_file(extra, folder / name, metadata={"format": "pt"})
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"] |= dict.fromkeys(extra, name)
    index_file.write_text(json.dumps(index, indent=2))


@pytest.fixture(scope="session")
def planted_run(tmp_path_factory, planted_folder) -> Finished:
    return finish(tmp_path_factory.mktemp("planted-run"), planted_folder)


@pytest.fixture(scope="module")
def planted_copy(tmp_path_factory, planted_run) -> Finished:
    """The planted run in a folder of the test file's own, to add to."""
    folder = tmp_path_factory.mktemp("planted-copy") / "run"
    shutil.copytree(planted_run.directory.path, folder)
    return replace(planted_run, directory=RunDirectory.open(folder))


@pytest.fixture(scope="session")
def mixtral_run(tmp_path_factory, mixtral_folder) -> Finished:
    return finish(tmp_path_factory.mktemp("mixtral-run"), mixtral_folder, norm="column")


@pytest.fixture(scope="session")
def mixtral_float32_run(tmp_path_factory, mixtral_folder) -> Finished:
    return finish(tmp_path_factory.mktemp("mixtral-float32"), mixtral_folder, dtype="float32")


@pytest.fixture(scope="session")
def mixtral_none_run(tmp_path_factory, mixtral_folder) -> Finished:
    return finish(tmp_path_factory.mktemp("mixtral-none"), mixtral_folder, norm="none")
