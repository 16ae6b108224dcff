"""Batch sizes: how many rows go through the model at once, from a model of what they cost.

Each stage has its own size: rows that are only read (residuals, logits) cost activations, rows that
write answers need keys and values as well. The cost of a token is calculated from the model's
shapes, that of its keys and values is measured. Sizes are chosen once per run, so that results
don't depend on who computes them; a batch that does not fit after all is halved and computed again.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_abliterate.recipe import SearchSettings

if TYPE_CHECKING:
    import torch

MOST_ROWS = {"cpu": 128, "mps": 256}
"""More rows save little: on two cores 64 rows reach 55 to 70 % of the rate of 2,048, and tensors
that outgrow the caches cost the rest (four trials of 64 rows a pass were slower than one)."""
MOST_ROWS_CUDA = 1024
LEARNED_SHARE = 0.25
"""The base model's states may take this share of the model's own size, if as much memory is
free."""
TRIALS_PER_PASS = (8, 4, 2)
"""What is tried if the run chooses how many trials share a pass."""
LEAST_TURNS = 10
"""A study has at least this many times as many trials as are in flight, because the sampler learns
from ended trials. `docs/performance.md` says what more in flight costs."""


@dataclass(frozen=True)
class Tuning:
    """How a run computes; chosen once, by its first replica, so that all compute alike.

    Attributes:
        read_rows: Rows of a batch that is only read: residuals and logits.
        answer_rows: Rows of a batch that writes answers.
        state_every: Inputs of every `state_every`-th block are stored of the base model.
        drafts: Whether speculative decoding is used: the base model's answers are the drafts.
        trials_per_pass: Trials that share a pass.
    """

    read_rows: int
    answer_rows: int
    state_every: int
    drafts: bool
    trials_per_pass: int = 1


@dataclass(frozen=True)
class MemoryCost:
    """What tokens and rows cost, in bytes.

    Attributes:
        kv: Keys and values of one token, all layers.
        activations: Activations of one token at the widest point of a pass.
        logits: One row of logits, with the copies made of it.
        state: The input of one block, one token.
        element: One number.
    """

    kv: int
    activations: int
    logits: int
    state: int
    element: int

    @classmethod
    def of(cls, module: Any, kv: int) -> "MemoryCost":
        """Return the cost of a model's tokens, from its shapes.

        Args:
            module: The transformers model.
            kv: Bytes of the keys and values of one token.
        """
        config = module.config.get_text_config(decoder=True)
        table = module.get_input_embeddings().weight  # (vocab, hidden)
        element, hidden = table.element_size(), config.hidden_size
        widest = max(_intermediate_size(config), 4 * hidden)
        return cls(
            kv,
            element * (6 * hidden + 3 * widest),
            table.shape[0] * (element + 8),  # two float32 copies
            element * hidden,
            element,
        )

    def rows(self, free: int, prompt: int, answer: int, copies: int) -> int:
        """Return how many rows fit; 0 if not even one does.

        Args:
            free: Bytes that a batch may take.
            prompt: Tokens of a prompt.
            answer: Tokens of an answer.
            copies: Copies of each row, one for each trial that shares the pass.
        """
        tokens = self.activations * prompt + self.kv * (prompt + answer)
        return int(free // (copies * (tokens + self.logits)))


@dataclass(frozen=True)
class BatchMemory:
    """The memory that batches have on one device.

    Attributes:
        device: Where the model computes.
        free: Bytes that a batch may take.
        cost: What rows cost.
    """

    device: "torch.device"
    free: int
    cost: MemoryCost


@dataclass(frozen=True)
class TrialRows:
    """What one trial asks of a model at once.

    Attributes:
        rows: Prompts, in one batch.
        prompt: Tokens of the longest prompt.
        answer: Tokens of the longest answer.
    """

    rows: int
    prompt: int
    answer: int


def choose_trials_per_pass(
    search: SearchSettings, replicas: int, most: int, memory: BatchMemory, trial: TrialRows
) -> int:
    """Return how many trials share a pass, if the run chooses: the largest of 8, 4 and 2, or 1.

    All their rows have to fit into one batch, and the study has to have `LEAST_TURNS` times as many
    trials as all replicas' passes. 1 on a CPU, where more rows a step save nothing because
    arithmetic is the limit; and where plans are judged batch by batch.

    Args:
        search: Says how many trials there are, and how many may be in flight.
        replicas: How many replicas there are.
        most: Trials that can share a pass, given the model's architecture.
        memory: What a batch may take.
        trial: What each trial asks.
    """
    if memory.device.type == "cpu" or search.batch_synchronous:
        return 1
    in_flight = search.trials // LEAST_TURNS
    if search.concurrency is not None:
        in_flight = min(in_flight, search.concurrency)
    for count in TRIALS_PER_PASS:
        allowed = count <= most and count * replicas <= in_flight
        saves_time = count * trial.rows <= most_rows(memory.device)
        fitting = memory.cost.rows(memory.free, trial.prompt, trial.answer, count)
        if allowed and saves_time and trial.rows <= fitting:
            return count
    return 1


def even_batch_size(count: int, most: int) -> int:
    """Return the size that cuts `count` rows into the fewest batches, all of nearly equal size."""
    batches = -(-count // max(most, 1))
    return -(-count // max(batches, 1))


def largest_power_of_two(rows: int) -> int:
    """Return the largest power of two that is not above `rows`.

    Runs that find a little more or less free memory then cut prompts into the same batches.
    """
    return 1 << (rows.bit_length() - 1)


def most_rows(device: "torch.device") -> int:
    """Return the number of rows beyond which a larger batch saves nothing."""
    return MOST_ROWS.get(device.type, MOST_ROWS_CUDA)


def _intermediate_size(config: Any) -> int:
    """Return the width of the widest inner layer of a block, experts of one token together."""
    widths = [getattr(config, n, None) for n in ("intermediate_size", "n_inner", "ffn_dim")]
    experts = getattr(config, "moe_intermediate_size", None) or 0
    active = getattr(config, "num_experts_per_tok", None) or 1
    return max([w for w in widths if isinstance(w, int)] + [int(experts) * int(active), 1])
