"""Streaming evaluation: loss and perplexity of texts of any length, chunk by chunk, without Ray.

A library of its own. `StreamingEvaluator` is where to begin; docs/evaluation.md says what each
number means, and what may be carried from one chunk to the next.
"""

from ray_abliterate.evaluation.streaming.capability_check import Capabilities
from ray_abliterate.evaluation.streaming.carried_context import CarriedContext
from ray_abliterate.evaluation.streaming.carry_choice import CarryChoice
from ray_abliterate.evaluation.streaming.chunk_geometry import ChunkGeometry, TokenSpan
from ray_abliterate.evaluation.streaming.evaluator import StreamingEvaluator
from ray_abliterate.evaluation.streaming.hidden_state_cache import HiddenStateCache
from ray_abliterate.evaluation.streaming.open_source import open_source
from ray_abliterate.evaluation.streaming.results import ChunkResult, ReadingProgress, Totals
from ray_abliterate.evaluation.streaming.runners import StatefulModel
from ray_abliterate.evaluation.streaming.stream import Stream
from ray_abliterate.evaluation.streaming.token_sources import TokenSource

__all__ = [
    "Capabilities",
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
    "TokenSpan",
    "Totals",
    "open_source",
]
