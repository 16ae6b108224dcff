"""What every suite must do. Subclass the contract, define your suite, and run pytest.

class TestMySuite(SuiteContract):
    @pytest.fixture
    def suite(self):
        return MySuite("mine")
"""

import json
import pickle
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest

from ray_abliterate.data.prompts import Prompt
from ray_abliterate.evaluation.suites.build import run_chunk
from ray_abliterate.evaluation.suites.suite import Chunk, Suite, SuiteChunk
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.testing.tiny_language_model import tiny_language_model


class SuiteContract:
    """Held by every suite of this package, and by yours. A subclass defines the fixture `suite`."""

    most_chunks = 3
    """Chunks that a test runs, at most."""

    @pytest.fixture
    def suite(self) -> Suite:
        """Return a suite with two chunks or more."""
        raise NotImplementedError("define the fixture `suite`")

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
        """Return a model that it can measure; `tiny_language_model` unless you define another."""
        return tiny_language_model(tmp_path_factory.mktemp("suite") / "model")

    @pytest.fixture
    def chunks(self, suite: Suite) -> list[Chunk]:
        """Return the first few chunks of the suite."""
        chunks = list(islice(suite.chunks(), self.most_chunks))
        assert len(chunks) > 1, "the contract needs a suite with two chunks or more"
        return chunks

    @pytest.fixture
    def results(self, suite: Suite, model: LanguageModel, chunks: list[Chunk]) -> list[SuiteChunk]:
        """Return the results of these chunks."""
        return [run_chunk(suite, model, chunk) for chunk in chunks]

    def test_it_has_what_a_suite_has(self, suite: Suite) -> None:
        """It has a name, measures of different names, and the methods."""
        assert isinstance(suite, Suite)
        names = [measure.name for measure in suite.measures]
        assert suite.name
        assert names
        assert len(set(names)) == len(names)

    def test_the_same_chunks_are_listed_every_time(self, suite: Suite) -> None:
        """They have the same ids and items, which are JSON, and of which none occurs twice."""
        chunks = list(suite.chunks())
        assert chunks == list(suite.chunks())
        assert len({chunk.id for chunk in chunks}) == len(chunks)
        items = [item for chunk in chunks for item in chunk.item_ids]
        assert len(set(items)) == len(items)
        for chunk in chunks:
            assert chunk.suite == suite.name
            assert Chunk.from_dict(json.loads(json.dumps(chunk.to_dict()))) == chunk

    def test_a_chunk_gives_the_same_again_also_elsewhere(
        self, suite: Suite, model: LanguageModel, chunks: list[Chunk], results: list[SuiteChunk]
    ) -> None:
        """Also in another order, by a pickled copy of the suite, from a chunk that was JSON."""
        copy = pickle.loads(pickle.dumps(suite))
        again = {}
        for chunk in reversed(chunks):
            with model.without_storing():
                known = Chunk.from_dict(json.loads(json.dumps(chunk.to_dict())))
                again[chunk.id] = run_chunk(copy, model, known)
        assert [again[chunk.id] for chunk in chunks] == results

    def test_results_survive_json(self, results: list[SuiteChunk]) -> None:
        """They are stored so in a run directory."""
        for result in results:
            assert SuiteChunk.from_dict(json.loads(json.dumps(result.to_dict()))) == result

    def test_the_order_of_results_does_not_matter(
        self, suite: Suite, results: list[SuiteChunk]
    ) -> None:
        """Nor does a result that arrives twice; scores are equal to the last bit."""
        scores = suite.summary(results)
        assert scores
        assert suite.summary([*reversed(results), results[0]]) == scores
        restored = [SuiteChunk.from_dict(json.loads(json.dumps(r.to_dict()))) for r in results]
        assert suite.summary(restored) == scores

    def test_scores_have_names_of_their_own(self, suite: Suite, results: list[SuiteChunk]) -> None:
        """The main score has the suite's name."""
        names = [score.name for score in suite.summary(results)]
        assert names[0] == suite.name
        assert len(set(names)) == len(names)

    def test_a_model_does_not_differ_from_itself(
        self, suite: Suite, results: list[SuiteChunk]
    ) -> None:
        """Every measure has a difference of 0, and 0 is in its interval."""
        differences = suite.compare(results, list(reversed(results)))
        assert [one.name for one in differences] == [measure.name for measure in suite.measures]
        for one in differences:
            assert one.difference == 0
            assert one.low <= 0 <= one.high
            assert one.p in (None, 1.0)

    def test_the_model_is_left_as_it_was(
        self, suite: Suite, model: LanguageModel, chunks: list[Chunk]
    ) -> None:
        """Weights and response prefix do not change, and nothing is stored of what was asked."""
        before: dict[str, Any] = {k: v.clone() for k, v in model.module.state_dict().items()}
        asked = [Prompt("how do i write"), Prompt("tell me about the soup")]
        answers, prefix = model.answer(asked, 4), model.response_prefix
        with model.without_storing():
            run_chunk(suite, model, chunks[0])
        assert model.response_prefix == prefix
        assert model.answer(asked, 4) == answers
        assert all(bool((before[k] == v).all()) for k, v in model.module.state_dict().items())

    def test_a_chunk_of_another_suite_is_refused(
        self, suite: Suite, model: LanguageModel, chunks: list[Chunk]
    ) -> None:
        """`run_chunk` refuses it, whatever the suite does."""
        other = replace(chunks[0], suite=f"not-{suite.name}")
        with pytest.raises(Exception, match="is not for"):
            run_chunk(suite, model, other)
