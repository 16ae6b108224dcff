"""A suite as another package would have it; the one of docs/extending.md."""

from ray_abliterate.evaluation.suites.aggregation import AggregatedSuite
from ray_abliterate.evaluation.suites.chunks import chunked, prompt_items, prompts_of
from ray_abliterate.evaluation.suites.suite import Measure, SuiteChunk


class AnswerLength(AggregatedSuite):
    measures = (Measure("length", "mean", "minimize", "tokens"),)

    def __init__(self, name: str, prompts, tokens: int = 64) -> None:
        self.name, self._prompts, self._tokens = name, prompts, tokens

    def chunks(self):
        return chunked(self.name, prompt_items(self._prompts), size=2)

    def run(self, model, chunk):
        answers = model.answer(prompts_of(chunk), self._tokens)
        return SuiteChunk.of(chunk, {"length": [float(answer.tokens) for answer in answers]})
