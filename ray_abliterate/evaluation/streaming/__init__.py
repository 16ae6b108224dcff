"""Streaming evaluation: loss and perplexity of texts of any length, in chunks, without Ray."""

from ray_abliterate.evaluation.streaming.carry import Carry, Geometry
from ray_abliterate.evaluation.streaming.carry_choice import Choice
from ray_abliterate.evaluation.streaming.evaluator import StreamingEvaluator
from ray_abliterate.evaluation.streaming.hidden_state_cache import StateFiles
from ray_abliterate.evaluation.streaming.open_source import open_source
from ray_abliterate.evaluation.streaming.results import ChunkResult, Progress, Totals
from ray_abliterate.evaluation.streaming.runners import CarriesState
from ray_abliterate.evaluation.streaming.stream import Stream
from ray_abliterate.evaluation.streaming.token_sources import TokenSource

__all__ = [
    "CarriesState",
    "Carry",
    "Choice",
    "ChunkResult",
    "Geometry",
    "Progress",
    "StateFiles",
    "Stream",
    "StreamingEvaluator",
    "TokenSource",
    "Totals",
    "open_source",
]
