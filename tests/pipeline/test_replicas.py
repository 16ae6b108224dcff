"""A model of the Hub stays the one that a run began with."""

from io import StringIO

import pytest
import torch

from ray_abliterate.cli import chat
from ray_abliterate.cli.terminal import console
from ray_abliterate.directions.directions import Directions
from ray_abliterate.evaluation.streaming.reader import TextRequest
from ray_abliterate.pipeline import evaluate as evaluating
from ray_abliterate.pipeline import replicas, run
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.pipeline.prompt_sets import PromptSets
from ray_abliterate.recipe import Recipe
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.plan import Plan
from ray_abliterate.search.score import Score, Scorecard

TEXT = """
[model]
name = "owner/model"
revision = "main"
[prompts]
behaviour = { file = "a.txt" }
neutral = { file = "b.txt" }
[[scorers]]
kind = "kl-divergence"
prompts = { file = "c.txt" }
"""
CARD = Scorecard((Score("kl-divergence", 0.25, 0.125, 0.5),))


class Asked(Exception):
    pass


def test_a_model_of_the_hub_is_loaded_at_the_commit_that_the_run_began_with(tmp_path, monkeypatch):
    """By whatever loads it again: a branch may have moved on."""

    def refuse(recipe, *_):
        raise Asked(recipe.model.revision)

    recipe = Recipe.parse(TEXT, "recipe.toml")
    directory = RunDirectory.create(tmp_path / "run", recipe, "")
    assert directory.pin_revision(recipe) == recipe
    directory.record_facts(model={"revision": "0123abc"}, response_prefix=[])
    directory.save_directions(Directions(torch.ones(1, 1), "mean-difference", {}))
    directory.append_trial(Trial(0, Plan.nothing(), CARD, 1.0))
    monkeypatch.setattr(run, "load_prompts", lambda *_: PromptSets(None, None, {}))
    for module in (replicas, evaluating):
        monkeypatch.setattr(module, "resolve_model", lambda *_: "")
        monkeypatch.setattr(module, "connect", lambda *_: "")
        monkeypatch.setattr(module.ReplicaPool, "start", refuse)
    monkeypatch.setattr(chat, "resolve_model", lambda *_: "")
    monkeypatch.setattr(chat, "Replica", refuse)
    reading, options = TextRequest("hub:owner/text"), chat.ChatOptions("one", 1, None)
    for load in (
        lambda: run.run(recipe, directory, tmp_path, SilentProgress()),
        lambda: evaluating.evaluate_run(directory, (), (), tmp_path, SilentProgress()),
        lambda: chat.converse(directory, directory.trial(0), options, console(), StringIO()),
        lambda: evaluating.read_with_run(directory, (), reading, tmp_path, SilentProgress()),
    ):
        with pytest.raises(Asked, match="0123abc"):
            load()
