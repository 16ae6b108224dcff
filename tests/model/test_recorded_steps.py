"""Recorded decode steps against steps one by one: the tokens are the same.

On a CPU the recorder is one of tensor operations, which repeats what a GPU's graph would: Python
does not run again, and tensors are read where they lay.
"""

from collections.abc import Iterator

import pytest
import torch

from ray_abliterate.engine import Techniques
from ray_abliterate.recorded_steps import RecordedSteps
from ray_abliterate.virtual import VirtualEdits
from tests.model.test_engine import FAMILIES, LIMIT, Case
from tests.recorder import Recordings

READ_VALUES = {"mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text"}
"""Experts: which there are tokens for is looked up."""


class Recorded(Case):
    """A case whose steps are recorded, and how."""

    def __init__(self, family: str, device: str) -> None:
        super().__init__(family)
        self.recordings = Recordings()
        self.recorded = RecordedSteps(self.packed, self.recordings)
        self.engine.decoder.recorded = self.recorded
        self.engine.decoder.stride = 3

    def one_by_one(self, *args: object) -> list[list[list[int]]]:
        self.engine.techniques = Techniques(recorded_steps=False)
        try:
            return self.answers(self.engine.batch(self.rows), *args)
        finally:
            self.engine.techniques = Techniques()


@pytest.fixture(params=[f for f in FAMILIES if f not in READ_VALUES])
def case(request: pytest.FixtureRequest) -> Recorded:
    return Recorded(request.param, "cpu")


def test_steps_are_replayed_and_no_token_changes(case: Recorded) -> None:
    expected = case.plain_answers()
    assert case.one_by_one()[0] == expected
    assert not case.recordings.made
    for _ in range(3):
        assert case.answers(case.engine.batch(case.rows))[0] == expected
    assert not case.recorded.off
    assert case.recordings.made == 1
    assert case.recordings.replayed >= 3 * (LIMIT - 1)
