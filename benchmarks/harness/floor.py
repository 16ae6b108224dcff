"""What a trial must cost at least on a machine: arithmetic, and the two rates it needs.

Counted are the linear layers and the output head. Every real token of both prompt sets goes
through the linears once, a beginning that all prompts of a set share once per set; the head is
needed at each prompt's last token. Then each written token but the first of an answer goes through
both, in steps of as many rows as there are prompts. Attention, norms and the vocabulary's softmax
are left out, so it is a lower bound of this schedule. A program that ends answers early or takes
layers from the base model does less than the schedule.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Work:
    """What a pass of `trials` trials computes.

    Attributes:
        prefill_tokens: Real tokens of both sets, per trial.
        prompts: Prompts of both sets, per trial: rows of the head in the prefill.
        decode_tokens: Tokens fed back, per trial: an answer of n tokens feeds n - 1.
        decode_steps: Steps that the longest answer takes.
        linear_parameters: Weights of the linears without the head.
        head_parameters: Weights of the head.
        bytes_per_parameter: 4 for float32, 2 for bfloat16.
        trials: Trials that share a pass.
    """

    prefill_tokens: int
    prompts: int
    decode_tokens: int
    decode_steps: int
    linear_parameters: int
    head_parameters: int
    bytes_per_parameter: int
    trials: int = 1

    @property
    def prefill_flop(self) -> int:
        """Of the pass; a multiplication and an addition per weight and token."""
        each = self.prefill_tokens * self.linear_parameters + self.prompts * self.head_parameters
        return 2 * each * self.trials

    @property
    def decode_flop(self) -> int:
        """Of the pass."""
        weights = self.linear_parameters + self.head_parameters
        return 2 * self.decode_tokens * weights * self.trials

    @property
    def weight_bytes(self) -> int:
        """Read once per step, and once for the prefill."""
        return (self.linear_parameters + self.head_parameters) * self.bytes_per_parameter

    @property
    def bytes(self) -> int:
        """Weights read in the pass, at least."""
        return self.weight_bytes * (1 + self.decode_steps)

    @property
    def decode_rows(self) -> int:
        """Rows of a step on average, all trials of the pass together."""
        return round(self.decode_tokens * self.trials / max(self.decode_steps, 1))


def seconds(work: Work, prefill_rate: float, decode_rate: float, bandwidth: float) -> float:
    """The floor of one trial: each half takes its arithmetic or its reading, what is longer.

    Args:
        work: Of a pass.
        prefill_rate: FLOP per second at the prefill's rows.
        decode_rate: FLOP per second at a step's rows.
        bandwidth: Bytes read per second.
    """
    prefill = max(work.prefill_flop / prefill_rate, work.weight_bytes / bandwidth)
    reading = work.weight_bytes * work.decode_steps / bandwidth
    decode = max(work.decode_flop / decode_rate, reading)
    return (prefill + decode) / work.trials


def summary(work: Work, rates: dict[int, float], bandwidth: float) -> dict[str, Any]:
    """The floor with what it comes from. `rates` are FLOP per second by rows."""
    prefill_rows, decode_rows = max(rates), nearest(rates, work.decode_rows)
    return {
        "flop_per_trial": (work.prefill_flop + work.decode_flop) // work.trials,
        "bytes_per_trial": work.bytes // work.trials,
        "decode_rows": work.decode_rows,
        "prefill_gflop_per_s": round(rates[prefill_rows] / 1e9, 1),
        "decode_gflop_per_s": round(rates[decode_rows] / 1e9, 1),
        "read_gb_per_s": round(bandwidth / 1e9, 1),
        "floor_seconds": round(
            seconds(work, rates[prefill_rows], rates[decode_rows], bandwidth), 4
        ),
    }


def nearest(rates: dict[int, float], rows: int) -> int:
    """The measured row count that is nearest to `rows` in ratio."""
    return min(rates, key=lambda measured: max(measured / max(rows, 1), max(rows, 1) / measured))
