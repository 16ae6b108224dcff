"""What a device can do, and the least time that a trial's arithmetic and reading take on it.

Counted are the linear layers and the output head. Every real token of both prompt sets goes
through the linear layers once, a prefix that all prompts of a set share once per set; the head is
needed at each prompt's last token. Then each written token but the first of an answer goes through
both, in steps of as many rows as there are prompts. Attention, norms and the vocabulary's softmax
are left out, so this is a lower bound of this schedule. A program that ends answers early or takes
layers from the base model does less than the schedule.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SAMPLE_FLOP = 3e11
"""About as many operations as one measurement of the arithmetic does."""


@dataclass(frozen=True)
class TrialWork:
    """What one pass of `trials` trials computes.

    Attributes:
        prefill_tokens: Real tokens of both prompt sets, per trial.
        prompts: Prompts of both sets, per trial: rows of the head in the prefill.
        decode_tokens: Tokens fed back, per trial: an answer of n tokens feeds n - 1.
        decode_steps: Steps that the longest answer takes.
        linear_parameters: Weights of the linear layers without the head.
        head_parameters: Weights of the head.
        bytes_per_parameter: 4 for float32, 2 for bfloat16.
        trials: Trials that share the pass.
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
        """Operations of the prefill: a multiplication and an addition per weight and token."""
        each = self.prefill_tokens * self.linear_parameters + self.prompts * self.head_parameters
        return 2 * each * self.trials

    @property
    def decode_flop(self) -> int:
        """Operations of all decode steps of the pass."""
        weights = self.linear_parameters + self.head_parameters
        return 2 * self.decode_tokens * weights * self.trials

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights, which are read once per step, and once for the prefill."""
        return (self.linear_parameters + self.head_parameters) * self.bytes_per_parameter

    @property
    def bytes(self) -> int:
        """Bytes of weights that the pass reads at least."""
        return self.weight_bytes * (1 + self.decode_steps)

    @property
    def decode_rows(self) -> int:
        """Rows of a step on average, all trials of the pass together."""
        return round(self.decode_tokens * self.trials / max(self.decode_steps, 1))


def floor_seconds(
    work: TrialWork, prefill_rate: float, decode_rate: float, bandwidth: float
) -> float:
    """Return the least seconds of one trial: each half takes its arithmetic or its reading.

    Args:
        work: Work of a pass.
        prefill_rate: FLOP per second at the prefill's number of rows.
        decode_rate: FLOP per second at a step's number of rows.
        bandwidth: Bytes read per second.
    """
    prefill = max(work.prefill_flop / prefill_rate, work.weight_bytes / bandwidth)
    reading = work.weight_bytes * work.decode_steps / bandwidth
    decode = max(work.decode_flop / decode_rate, reading)
    return (prefill + decode) / work.trials


def floor_figures(work: TrialWork, rates: dict[int, float], bandwidth: float) -> dict[str, Any]:
    """Return the floor of a trial with what it is computed from.

    Args:
        work: Work of a pass.
        rates: FLOP per second by the number of rows.
        bandwidth: Bytes read per second.
    """
    prefill_rows, decode_rows = max(rates), nearest_rows(rates, work.decode_rows)
    floor = floor_seconds(work, rates[prefill_rows], rates[decode_rows], bandwidth)
    return {
        "flop_per_trial": (work.prefill_flop + work.decode_flop) // work.trials,
        "bytes_per_trial": work.bytes // work.trials,
        "decode_rows": work.decode_rows,
        "prefill_gflop_per_s": round(rates[prefill_rows] / 1e9, 1),
        "decode_gflop_per_s": round(rates[decode_rows] / 1e9, 1),
        "read_gb_per_s": round(bandwidth / 1e9, 1),
        "floor_seconds": round(floor, 4),
    }


def nearest_rows(rates: dict[int, float], rows: int) -> int:
    """Return the measured number of rows that is nearest to `rows` in ratio."""
    return min(rates, key=lambda measured: max(measured / max(rows, 1), max(rows, 1) / measured))


def synchronize(device: "torch.device") -> None:
    """Wait until the device has finished its queue."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_bandwidth(device: "torch.device", rounds: int = 3) -> float:
    """Return bytes read per second: the best of some rounds over 512 MiB, which no cache holds."""
    import torch

    block = torch.ones(2**27, device=device)
    rates = []
    for _ in range(rounds):
        synchronize(device)
        started = time.perf_counter()
        block.sum()
        synchronize(device)
        rates.append(block.numel() * 4 / (time.perf_counter() - started))
    return max(rates)


def measure_flop_rate(weights: Sequence["torch.Tensor"], rows: int) -> float:
    """Return FLOP per second of `rows` rows through some of a model's weight matrices.

    Every n-th matrix is used, n such that the products stay near `SAMPLE_FLOP`.
    """
    import torch

    total = 2 * rows * sum(weight.numel() for weight in weights)
    sample = weights[:: max(1, round(total / SAMPLE_FLOP))]
    inputs = {weight.shape[1]: weight.new_ones(rows, weight.shape[1]) for weight in sample}
    synchronize(sample[0].device)
    started = time.perf_counter()
    for weight in sample:
        torch.nn.functional.linear(inputs[weight.shape[1]], weight)
    synchronize(sample[0].device)
    seconds = time.perf_counter() - started
    return 2 * rows * sum(weight.numel() for weight in sample) / seconds
