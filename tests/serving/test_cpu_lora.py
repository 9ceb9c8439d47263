from __future__ import annotations

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
import serving.cpu_lora
print(shrink(decode), shrink(prefill))
"""


def test_rows_of_the_base_get_no_adapter() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    upstream, mended = result.stdout.strip().splitlines()[-2:]
    assert upstream == "False False", "vLLM mends this itself now: serving/cpu_lora.py can go"
    assert mended == "True True"
