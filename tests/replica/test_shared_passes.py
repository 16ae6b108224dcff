"""Trials that share passes, memory that runs out, models that the engine does not serve."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_abliterate.ablation.weight_cache import WeightCache
from ray_abliterate.cluster.residual_shards import ResidualShards
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.directions.directions import Directions
from ray_abliterate.errors import ModelError, ScoreError
from ray_abliterate.model.architecture import find_writers
from ray_abliterate.model.batch_size import Tuning
from ray_abliterate.model.float32_linears import Float32Linears
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.extraction import find_directions
from ray_abliterate.pipeline.prompt_sets import PromptSets
from ray_abliterate.pipeline.search_stage import resolve_trials_per_pass, search
from ray_abliterate.recipe import ModelSettings, Recipe
from ray_abliterate.replica.messages import TrialSetup
from ray_abliterate.replica.replica import Replica
from ray_abliterate.replica.shared_passes import SharedPasses
from ray_abliterate.search.dominance import ThresholdSet
from ray_abliterate.search.plan import ModelShape, Plan
from ray_abliterate.search.score import Score
from ray_abliterate.testing.tiny import tiny_model
from tests.support.finished_runs import FLAGGED, THINGS, InProcessPool
from tests.support.run_contexts import run_context


@pytest.fixture(scope="module")
def replica(planted_run: Any) -> tuple[Replica, TrialSetup]:
    recipe = planted_run.directory.read_recipe()
    sets = {
        "keyword-rate": PromptSet.of("k", *(f"tell me about the old {w}" for w in FLAGGED)),
        "kl-divergence": PromptSet.of("n", *(f"tell me about the old {w}" for w in THINGS)),
    }
    made = Replica(recipe, str(planted_run.model), sets)
    return made, TrialSetup(planted_run.directory.directions())


def plans(replica: Replica, *strengths: float) -> list[Plan]:
    shape = replica.describe().shape
    return [Plan.uniform(shape, 2.0, "row", strength) for strength in strengths]


def test_trials_in_shared_passes_have_the_scores_they_have_alone(
    replica: tuple[Replica, TrialSetup],
) -> None:
    """To float32 rounding; refusals exactly."""
    made, setup = replica
    tried = plans(made, 0.2, 1.0, 0.5)
    alone = [made.evaluate(plan, setup) for plan in tried]
    together = made.evaluate_in_shared_passes(tried, setup)
    for one, other in zip(alone, together, strict=True):
        assert not isinstance(other, Exception) and other.shared and not one.shared
        rate, kl = one.scorecard["keyword-rate"], one.scorecard["kl-divergence"]
        assert other.scorecard["keyword-rate"] == rate
        assert other.scorecard["kl-divergence"].value == pytest.approx(kl.value, rel=1e-4, abs=1e-8)
    values = {e.scorecard["keyword-rate"].value for e in alone}
    assert len(values) > 1, "plans that all score the same show nothing"
    assert not made.cache.differs()


def test_a_trial_that_is_stopped_early_does_not_affect_the_others(
    replica: tuple[Replica, TrialSetup],
) -> None:
    made, setup = replica
    weak, strong = plans(made, 0.1, 1.0)
    full = made.evaluate(weak, setup).scorecard
    assert full["keyword-rate"].value > 0
    thresholds = ThresholdSet(((0.0, full["kl-divergence"].value * 0.5),))
    stopped, whole = made.evaluate_in_shared_passes([weak, strong], setup, thresholds)
    assert not isinstance(stopped, Exception) and not isinstance(whole, Exception)
    assert stopped.scorecard.pruned
    expected = made.evaluate(strong, setup, thresholds).scorecard
    assert whole.scorecard.pruned == expected.pruned
    assert whole.scorecard["keyword-rate"].value == expected["keyword-rate"].value


class Fails:
    """A scorer that fails for one of the trials."""

    name, goal = "fails", "minimize"

    def __init__(self, broken: list[int]) -> None:
        self.broken = broken

    def prepare(self, model: Any) -> None: ...

    def score(self, model: Any) -> Score:
        texts = [a.text for a in model.answer(PROMPTS.prompts, 3)]
        if self.broken and self.broken.pop():
            raise ScoreError("this one is broken")
        return Score(self.name, float(len(texts)), 0.0, 99.0)


PROMPTS = PromptSet.of("p", "tell me about the old river", "tell me about the old cake")


def test_a_scorer_that_fails_fails_its_own_trial(replica: tuple[Replica, TrialSetup]) -> None:
    made, setup = replica
    made.evaluate_in_shared_passes(plans(made, 0.5, 1.0), setup)
    assert made.trial_scorer._virtual is not None
    scorer = Fails([0, 1])
    with made.trial_scorer._virtual.applied(plans(made, 0.5, 1.0), setup.directions):
        found = SharedPasses[Score](made.model).run([copy.copy(scorer).score] * 2)
    assert sorted(type(result).__name__ for result in found) == ["Score", "ScoreError"]


def test_batches_that_do_not_fit_are_halved_and_nothing_is_lost(
    planted: Path, behaviour: PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LanguageModel.load(str(planted), ModelSettings(name="planted"), batch_size=7)
    expected = model.answer(behaviour.prompts, 4)
    logits = model.next_token_logits(behaviour.prompts)
    model._stored_batches.clear()
    assert model._engine is not None
    tried: list[int] = []

    def short_of_memory(real: Any) -> Any:
        def work(batch: Any, *args: Any) -> Any:
            tried.append(len(batch.rows))
            if len(batch.rows) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(batch, *args)

        return work

    for name in ("answer", "logits"):
        monkeypatch.setattr(model._engine, name, short_of_memory(getattr(model._engine, name)))
    assert model.answer(behaviour.prompts, 4) == expected
    assert max(tried) == 7 and tried.count(7) == 1
    tried.clear()
    assert model.answer(behaviour.prompts, 4) == expected
    assert max(tried) <= 2, "the next trial begins with the sizes that fit"
    torch.testing.assert_close(model.next_token_logits(behaviour.prompts), logits)


def test_one_row_that_does_not_fit_is_an_error(
    planted: Path, behaviour: PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LanguageModel.load(str(planted), ModelSettings(name="planted"))

    def never(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model._engine, "answer", never)
    with pytest.raises(torch.OutOfMemoryError):
        model.answer(behaviour.prompts, 4)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_fewer_stored_states_give_the_same_scores(
    replica: tuple[Replica, TrialSetup], every: int
) -> None:
    made, setup = replica
    tuning = Tuning(3, 3, every, True)
    plan = plans(made, 0.5)[0]
    expected = made.evaluate(plan, setup).scorecard["kl-divergence"].value
    found = made.evaluate(plan, TrialSetup(setup.directions, (), tuning)).scorecard
    assert found["kl-divergence"].value == pytest.approx(expected, rel=1e-4)


def test_more_trials_a_pass_than_fit_are_refused_before_the_search(
    planted_run: Any, tmp_path: Path
) -> None:
    recipe = planted_run.directory.read_recipe()
    many = recipe.search.model_copy(update={"trials_per_pass": 10**9})
    greedy = recipe.model_copy(update={"search": many})
    directory = RunDirectory.create(tmp_path / "run", greedy, "")
    pool: Any = InProcessPool(Replica(recipe, str(planted_run.model), {}))
    baseline = planted_run.directory.baseline()
    with pytest.raises(ModelError, match=r"trials_per_pass = 1000000000 is more than the \d+"):
        search(run_context(directory, pool, greedy), None, baseline)


def halt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_the_run_chooses_once_how_many_trials_share_a_pass_and_keeps_to_it(
    planted_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that is taken for a GPU: what the first replica finds out is noted, resumed, and
    makes a batch of so many trials."""
    recipe = planted_run.directory.read_recipe()
    assert recipe.search.trials_per_pass == "auto"
    assert planted_run.directory.read_environment()["tuning"]["trials_per_pass"] == 1, "on a CPU"
    longer = recipe.search.model_copy(update={"trials": 40})
    own = recipe.model_copy(update={"search": longer})
    sets = {"keyword-rate": PromptSet.of("k", *(f"tell me about the old {w}" for w in FLAGGED))}
    replica = Replica(own, str(planted_run.model), sets)
    assert replica.tune(1).trials_per_pass == 1
    monkeypatch.setattr(type(replica.model), "device", torch.device("mps"))
    monkeypatch.setattr("ray_abliterate.model.batched_model.free_bytes", lambda device: 1 << 30)
    found = [replica.tune(count).trials_per_pass for count in (1, 2, 3)]
    assert found == [4, 2, 1]
    quarter = own.model.model_copy(update={"gpus_per_replica": 0.25})
    sharing = LanguageModel(replica.model.module, replica.model.chat.tokenizer, quarter)
    assert (sharing.free_bytes, replica.model.free_bytes) == (1 << 28, 1 << 30)
    directory = RunDirectory.create(tmp_path / "run", own, "")
    pool: Any = InProcessPool(replica)
    pool.layout = replace(pool.layout, replicas=2)
    both = PromptSets(PROMPTS, PROMPTS, sets)
    monkeypatch.setattr(ResidualShards, "extract", halt)
    with pytest.raises(KeyboardInterrupt):
        find_directions(run_context(directory, pool, own), both)
    context = run_context(RunDirectory.open(tmp_path / "run"), pool)
    assert resolve_trials_per_pass(context) == 2
    given = own.model_copy(update={"search": longer.model_copy(update={"trials_per_pass": 3})})
    assert resolve_trials_per_pass(replace(context, recipe=given)) == 3
    pool.facts = replace(pool.facts, most_per_pass=1)
    assert resolve_trials_per_pass(context) == 1


def test_stacked_experts_share_no_passes_and_the_facts_say_so(mixtral_run: Any) -> None:
    recipe = mixtral_run.directory.read_recipe()
    facts = Replica(recipe, str(mixtral_run.model), {}).describe()
    assert facts.most_per_pass == 1 and "experts" in facts.why_not_more


def test_half_precision_in_float32_sees_edits_and_restores_every_bit() -> None:
    module = tiny_model("llama/biases").to(torch.bfloat16).eval()
    ids = torch.arange(3, 19)[None]
    with torch.inference_mode():
        plain = module(ids).logits
    cache = WeightCache(module, find_writers(module))
    float32_linears = Float32Linears(module)
    cache.on_write = float32_linears.refresh
    vectors = torch.nn.functional.normalize(torch.randn(4, 32), dim=-1)
    directions = Directions(vectors, "random", {})
    plan = Plan.uniform(ModelShape(4, 32, ("attn", "mlp")), 2.0, "none")
    with torch.inference_mode():
        before = module(ids).logits
        torch.testing.assert_close(before, plain, rtol=0.05, atol=0.05)
        with cache.edited(plan, directions):
            edited = module(ids).logits
        assert (edited - before).abs().max() > 0.2
        assert torch.equal(module(ids).logits, before)


def test_recipes_of_older_runs_have_no_tuning(tmp_path: Path, recipe: Recipe) -> None:
    directory = RunDirectory.create(tmp_path / "run", recipe, "")
    assert directory.tuning() is None
    directory.record_facts(
        tuning={"read_rows": 3, "answer_rows": 2, "state_every": 1, "drafts": False}
    )
    assert directory.tuning() == Tuning(3, 2, 1, False)
