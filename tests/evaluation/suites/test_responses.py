"""Answers that are stored, on a replica."""

from pathlib import Path

import torch

from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.evaluation.suites.responses import Responses
from ray_abliterate.recipe.suites import ResponsesSuite
from ray_abliterate.replica.messages import TrialSetup
from ray_abliterate.replica.replica import Replica
from ray_abliterate.search.plan import Plan
from tests.evaluation.suites.conftest import run_suite


def test_sampled_answers_follow_their_seed_and_leave_the_generators_alone(
    replica: Replica, setup: TrialSetup, base: Path
) -> None:
    def answers(**options: object) -> list[str]:
        given = {"kind": "responses", "prompts": {"file": "neutral.txt"}, "max_new_tokens": 6}
        settings = ResponsesSuite.model_validate({**given, "temperature": 5.0, **options})
        own = run_suite(replica, Responses(settings, base), Plan.nothing(), setup)
        return [row["answer"] for result in own for row in result.rows]

    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = answers()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(4)
    assert answers() == first
    assert answers(seed=1) != first
    assert len(set(answers())) > 1
    greedy = replica.model.answer([*(_prompts(base))], 6)
    assert answers(temperature=0.0) == [answer.text for answer in greedy]
    assert answers(top_p=1e-6) == answers(temperature=0.0)


def _prompts(base: Path) -> list:
    return list(PromptSet.of("n", *(base / "neutral.txt").read_text().splitlines()).prompts)
