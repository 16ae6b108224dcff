"""Streaming evaluation: loss and perplexity of texts of any length, in chunks, without Ray."""

from ray_abliterate.streaming.carries import Carry, Geometry
from ray_abliterate.streaming.choosing import Choice
from ray_abliterate.streaming.evaluator import StreamingEvaluator
from ray_abliterate.streaming.opening import open_source
from ray_abliterate.streaming.prefix import StateFiles
from ray_abliterate.streaming.results import ChunkResult, Progress, Totals
from ray_abliterate.streaming.runners import CarriesState
from ray_abliterate.streaming.sources import TokenSource
from ray_abliterate.streaming.stream import Stream

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
