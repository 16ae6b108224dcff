"""What a replica reports: the evaluation of a plan, and facts about its model. Plain values."""

from dataclasses import dataclass, field
from typing import Any

from ray_abliterate.search.plan import ModelShape
from ray_abliterate.search.score import Scorecard


@dataclass(frozen=True)
class Evaluation:
    """What came of one plan."""

    scorecard: Scorecard
    seconds: float
    answers: tuple[dict[str, Any], ...] = ()
    """Rows of prompt, answer and verdict, if they are recorded."""
    shared: bool = False
    """Scored by virtual edits, in passes shared with other plans."""
    tokens: int = 0
    """Tokens of answers that were written for it."""
    replica: str = ""
    """Which one made it."""


@dataclass(frozen=True)
class ModelFacts:
    """What a replica knows of its model."""

    shape: ModelShape
    writers: int
    parameters: int
    model_bytes: int
    cache_bytes: int
    dtype: str
    device: str
    model_type: str
    revision: str | None
    fingerprint: str = ""
    """Of a sample of every parameter: tells whether the weights are the same."""
    template: str = ""
    """Of the chat template, its options and the tokenizer: what makes tokens of prompts."""
    computes: str = ""
    """Device, attention, and other choices of computing that change how results are rounded."""
    most_per_pass: int = 1
    """Plans that can share a pass: by what the model is, and by memory."""
    why_not_more: str = ""
    """What stands against one more."""
    quantization: str = ""
    """How its weights are quantized; empty if they are not."""
    offloaded: str = ""
    """Where weights rest that the device has no room for; empty if it has."""
    notes: tuple[str, ...] = field(default=())
