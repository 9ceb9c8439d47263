from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm")

# In a process of its own: the import changes vllm, and vllm changes the process.
SCRIPT = """
import torch
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu

torch.manual_seed(0)
rows, slots, rank, size = 6, 3, 4, 8
inputs, weights = torch.randn(rows, size), torch.randn(slots, 1, rank, size)
indices = torch.tensor([0, -1, 2, -1, 1, 2])
expected = torch.stack([0.5 * weights[slot, 0] @ row * (slot >= 0) for slot, row in zip(indices, inputs)])

def shrink(function):
    output = torch.full((rows, rank), 7.0)
    function(output)
    return torch.allclose(output, expected)

def decode(output):
    punica_cpu.bgmv_shrink(inputs, weights, output, indices, 0.5)

def prefill(output):
    once = torch.ones(rows, dtype=torch.long)
    punica_cpu.sgmv_shrink(inputs, weights, output, once, once, indices, rows, 1, rows, 0.5)

print(shrink(decode), shrink(prefill))
import serving.weights.cpu_lora
print(shrink(decode), shrink(prefill))
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    quiet = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=quiet)


def test_rows_of_the_base_get_no_adapter() -> None:
    result = run(SCRIPT)
    assert result.returncode == 0, result.stderr
    upstream, mended = result.stdout.strip().splitlines()[-2:]
    assert upstream == "False False", "vLLM mends this itself now: serving/weights/cpu_lora.py can go"
    assert mended == "True True"


PROMPT_SCRIPT = """
import types
import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

torch.manual_seed(0)
slots, rank, width, vocabulary = 3, 4, 8, 16
a, b = torch.randn(slots, 1, rank, width), torch.randn(slots, 1, vocabulary, rank)
tokens = torch.tensor([2, 2, 2, -1, -1, 0, 0, 0, 0])  # three requests: 3, 2 and 4 tokens
hidden = torch.randn(len(tokens), width)
expected = torch.stack([b[slot, 0] @ (a[slot, 0] @ row) * (slot >= 0) for slot, row in zip(tokens, hidden)])
wrapper = PunicaWrapperCPU(16, 4, torch.device("cpu"))
wrapper._token_lora_indices[: len(tokens)] = tokens
wrapper._sampler_indices[:3] = torch.tensor([2, -1, 0])
wrapper.indices_len[:2] = [len(tokens), 3]

def head(states):
    logits = torch.zeros(len(states), vocabulary)
    wrapper.add_lora_logits(logits, states, a, b, 1.0)
    return logits

def upstream(runner, hidden_states, scheduled):
    return [head(hidden_states[start:stop]) for start, stop in ((0, 3), (3, 5), (5, 9), (6, 9))]

try:
    upstream(None, hidden, {})
    print("upstream answers")
except RuntimeError:
    print("upstream fails")
GPUModelRunner._get_prompt_logprobs_dict = upstream
import serving.weights.cpu_lora

class Runner(GPUModelRunner):
    def __init__(self):
        pass

found = Runner()._get_prompt_logprobs_dict(hidden, {})
parts = [expected[0:3], expected[3:5], expected[5:9], expected[6:9]]
print([torch.allclose(logits, part, atol=1e-5) for logits, part in zip(found, parts)])
last = torch.tensor([2, 4, 8])
print(torch.allclose(head(hidden[last]), expected[last], atol=1e-5))  # as tokens are drawn, before and after
"""


def test_the_tokens_of_a_prompt_get_their_own_adapter_at_the_head() -> None:
    result = run(PROMPT_SCRIPT)
    assert result.returncode == 0, result.stderr
    upstream, prompts, drawn = result.stdout.strip().splitlines()[-3:]
    assert upstream == "upstream fails", "vLLM mends this itself now: this part of serving/weights/cpu_lora.py can go"
    assert prompts == "[True, True, True, True]"
    assert drawn == "True"
