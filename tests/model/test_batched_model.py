"""Memory that really runs out, by a limit on the process or on its share of a GPU.

Batches become smaller, the trial is not lost, and its answers are those it gave with room.
"""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, sys
from contextlib import contextmanager

import psutil, torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.data.prompts import Prompt
from ray_abliterate.recipe import ModelSettings

device, tokenizer, ROWS = sys.argv[1], AutoTokenizer.from_pretrained(sys.argv[2]), 32


@contextmanager
def at_most(more):
    "Little more memory than is in use."
    if device == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)
    else:
        used = psutil.Process().memory_info().vms
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    yield
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
    else:
        resource.setrlimit(resource.RLIMIT_AS, before)


torch.manual_seed(0)
torch.set_num_threads(1)
config = LlamaConfig(
    hidden_size=64, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, vocab_size=64, max_position_embeddings=512, bos_token_id=1,
    eos_token_id=2,
)
model = LanguageModel(
    LlamaForCausalLM(config).to(device), tokenizer, ModelSettings(name="m"), batch_size=ROWS
)
rows = {Prompt(str(i)): [3 + (i * 7 + j * 5 + i * j) % 60 for j in range(200)] for i in range(ROWS)}
model.encode = lambda prompts: [rows[prompt] for prompt in prompts]
prompts = tuple(rows)
sizes = []
real = model._engine.answer
model._engine.answer = lambda batch, *a: (sizes.append(len(batch.rows)), real(batch, *a))[1]
expected = model.continue_greedily(prompts, 8)
assert sizes == [ROWS], sizes
model._stored_batches.clear()
sizes.clear()

# one pass of all rows wants 32 * 200 tokens * 8192 values * 4 bytes = 210 MB, three times over
with at_most(150_000_000):
    assert model.continue_greedily(prompts, 8) == expected
first = list(sizes)
sizes.clear()
with at_most(150_000_000):
    assert model.continue_greedily(prompts, 8) == expected
assert first[0] == ROWS and min(first) < ROWS, first
assert max(sizes) < ROWS, "the next trial begins with the sizes that fit"

# 4 MB are too few for any row: an error that says so, and the process lives on
model._stored_batches.clear()
try:
    with at_most(4_000_000):
        model.continue_greedily(prompts, 8)
except (RuntimeError, MemoryError) as error:
    from ray_abliterate.model.devices import is_out_of_memory
    assert is_out_of_memory(error), error
else:
    raise AssertionError("there was room")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
assert model.continue_greedily(prompts, 8) == expected
print("sizes", first, sizes)
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_trial_that_runs_out_of_memory_goes_on_in_smaller_batches(
    device: str, planted: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, device, str(planted)], capture_output=True, text=True,
        env={"PATH": "/usr/bin", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1",
             "PYTHONPATH": str(Path(__file__).parents[2])}, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sizes [32, ")
