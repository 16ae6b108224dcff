"""An exported model as ONNX, by optimum: elsewhere, because it wants transformers 4."""

import json
import os
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_abliterate.export.export import export_trial
from ray_abliterate.pipeline.progress import SilentProgress

PYTHON = os.environ.get("ONNX_PYTHON", "")
RUN = """
import json, sys, torch
from optimum.onnxruntime import ORTModelForCausalLM

model = ORTModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor(json.loads(sys.argv[2]))
print(json.dumps(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.tolist()))
"""


@pytest.mark.skipif(not PYTHON, reason="ONNX_PYTHON names no Python with optimum: make test-extras")
def test_an_export_becomes_onnx_with_the_same_logits(planted_run, tmp_path):
    """Transformers 4 reads it, too. The tolerance is float32's, for other orders of summing."""
    folder = export_trial(
        planted_run.directory, planted_run.trial, tmp_path / "out", SilentProgress()
    )
    task = ["--task", "text-generation-with-past"]
    command = [PYTHON, "-m", "optimum.commands.optimum_cli", "export", "onnx", "--model"]
    apart = {"cwd": tmp_path, "check": True, "capture_output": True, "text": True}
    subprocess.run([*command, str(folder), *task, "onnx"], **apart)
    ids = [[5, 6, 7, 8, 9]]
    done = subprocess.run([PYTHON, "-c", RUN, "onnx", json.dumps(ids)], **apart)
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    with torch.inference_mode():
        wanted = AutoModelForCausalLM.from_pretrained(folder)(input_ids=torch.tensor(ids)).logits
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-4)
