"""The batch grid: how many rows go through the model at once, from a model of what they cost.

Each stage has its own size: rows that are only read (residuals, logits) cost activations, rows that
write answers also keep keys and values. The cost of a token is measured once, where the device
tells (CUDA), and calculated elsewhere. Sizes are found once per run, so that results don't depend
on who computes them; a batch that does not fit after all is halved and computed again.
"""

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_abliterate.recipe import SearchSettings

if TYPE_CHECKING:
    import torch

MOST_ROWS = {"cpu": 128, "mps": 256}
"""More rows save little: on two cores 64 rows reach 55 to 70 % of the rate of 2,048, and tensors
that outgrow the caches cost the rest (four trials of 64 rows a pass were slower than one)."""
MOST_ROWS_CUDA = 1024
SHARE_OF_FREE = {"cpu": 0.25, "cuda": 0.7}
"""Of free memory: other replicas and programs live beside us on the CPU."""
LEARNED_SHARE = 0.25
"""Of the model's own size that the base model's states may take, if as much memory is free."""
TRIALS_PER_PASS = (8, 4, 2)
"""What is tried if the run chooses how many trials share a pass."""
LEAST_TURNS = 10
"""A study holds what is in flight so many times, or more: the sampler learns from ended trials.
`docs/performance.md` says what more in flight costs."""


@dataclass(frozen=True)
class Tuning:
    """How a run computes; found once, by its first replica, so that all compute alike.

    Attributes:
        read_rows: Rows of a batch that is only read: residuals and logits.
        answer_rows: Rows of a batch that writes answers.
        state_every: Inputs of every so many blocks are kept of the base model.
        drafts: The base model's answers are checked as drafts.
        trials_per_pass: Trials that share a pass.
    """

    read_rows: int
    answer_rows: int
    state_every: int
    drafts: bool
    trials_per_pass: int = 1


@dataclass(frozen=True)
class Cost:
    """Bytes.

    Attributes:
        kept: Keys and values of one token, all layers.
        read: Activations of one token at the widest point of a pass.
        logits: One row of logits, with the copies made of it.
        state: The input of one block, one token.
        size: One number.
    """

    kept: int
    read: int
    logits: int
    state: int
    size: int

    @classmethod
    def of(cls, module: Any, kept: int) -> "Cost":
        """The cost of a model's tokens, from its shapes."""
        config = module.config.get_text_config(decoder=True)
        size = module.get_input_embeddings().weight.element_size()
        hidden = config.hidden_size
        wide = max(_intermediate(config), 4 * hidden)
        vocab = module.get_input_embeddings().weight.shape[0]
        return cls(kept, size * (6 * hidden + 3 * wide), vocab * (size + 8), size * hidden, size)

    def rows(self, free: int, prompt: int, answer: int, copies: int) -> int:
        """Rows of so many tokens that fit, for so many copies of each; 0 if not even one does."""
        tokens = self.read * prompt + self.kept * (prompt + answer)
        return int(free // (copies * (tokens + self.logits)))


def trials_per_pass(
    search: SearchSettings,
    replicas: int,
    most: int,
    device: "torch.device",
    free: int,
    cost: Cost,
    rows: int,
    prompt: int,
    answer: int,
) -> int:
    """How many trials share a pass, if the run chooses: the largest of 8, 4 and 2 that may, or 1.

    All their rows have to fit one batch, and the study has to hold a pass of every replica
    `LEAST_TURNS` times. 1 on a CPU, which waits for arithmetic, so that more rows a step save
    nothing; and where plans are judged batch by batch.

    Args:
        search: Says how many trials there are, and how many may be in flight.
        replicas: How many there are.
        most: Trials that can share a pass, by what the model is.
        device: Where the model computes.
        free: Bytes that a batch may take.
        cost: What rows cost.
        rows: Prompts that a trial asks about at once, in one batch.
        prompt: Tokens of the longest prompt.
        answer: Tokens of the longest answer.
    """
    if device.type == "cpu" or search.batch_synchronous:
        return 1
    in_flight = search.trials // LEAST_TURNS
    if search.concurrency is not None:
        in_flight = min(in_flight, search.concurrency)
    for count in TRIALS_PER_PASS:
        wanted = count <= most and count * replicas <= in_flight
        saves = count * rows <= most_rows(device)
        if wanted and saves and rows <= cost.rows(free, prompt, answer, count):
            return count
    return 1


def free_bytes(device: "torch.device") -> int:
    """Memory that batches may take on a device."""
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(SHARE_OF_FREE["cuda"] * free)
    if device.type == "mps":
        room = torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
        return int(SHARE_OF_FREE["cuda"] * room)
    import psutil

    return int(SHARE_OF_FREE["cpu"] * psutil.virtual_memory().available)


def even(count: int, most: int) -> int:
    """The batch size that cuts `count` rows into the fewest batches, all of nearly equal size."""
    batches = -(-count // max(most, 1))
    return -(-count // max(batches, 1))


def steady(rows: int) -> int:
    """Rows rounded down to a power of two, so that runs which find a little more or less memory
    free cut prompts into the same batches."""
    return 1 << (rows.bit_length() - 1)


def most_rows(device: "torch.device") -> int:
    """Rows beyond which nothing is saved."""
    return MOST_ROWS.get(device.type, MOST_ROWS_CUDA)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on any device."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


def forget_garbage() -> None:
    """Give memory back; only after it ran out, because it takes long."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _intermediate(config: Any) -> int:
    """The widest inner layer of a block, experts of one token together."""
    widths = [getattr(config, n, None) for n in ("intermediate_size", "n_inner", "ffn_dim")]
    experts = getattr(config, "moe_intermediate_size", None) or 0
    active = getattr(config, "num_experts_per_tok", None) or 1
    return max([w for w in widths if isinstance(w, int)] + [int(experts) * int(active), 1])
