"""Streaming evaluation: loss and perplexity of texts of any length, in chunks, without Ray."""

from ray_abliterate.evaluation.streaming.carried_context import CarriedContext
from ray_abliterate.evaluation.streaming.carry_choice import CarryChoice
from ray_abliterate.evaluation.streaming.chunk_geometry import ChunkGeometry
from ray_abliterate.evaluation.streaming.evaluator import StreamingEvaluator
from ray_abliterate.evaluation.streaming.hidden_state_cache import HiddenStateCache
from ray_abliterate.evaluation.streaming.open_source import open_source
from ray_abliterate.evaluation.streaming.results import ChunkResult, ReadingProgress, Totals
from ray_abliterate.evaluation.streaming.runners import StatefulModel
from ray_abliterate.evaluation.streaming.stream import Stream
from ray_abliterate.evaluation.streaming.token_sources import TokenSource

__all__ = [
    "CarriedContext",
    "CarryChoice",
    "ChunkGeometry",
    "ChunkResult",
    "HiddenStateCache",
    "ReadingProgress",
    "StatefulModel",
    "Stream",
    "StreamingEvaluator",
    "TokenSource",
    "Totals",
    "open_source",
]
