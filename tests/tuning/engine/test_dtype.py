from __future__ import annotations

import pytest
import torch

from tuning.engine import dtype as module
from tuning.engine.dtype import compute_dtype
from tuning.spec import BaseSpec


@pytest.mark.parametrize(
    ("wanted", "device", "has_instructions", "expected"),
    [
        ("auto", "cpu", True, torch.bfloat16),
        ("auto", "cpu", False, torch.float32),
        ("auto", "cuda:0", False, torch.bfloat16),
        ("bfloat16", "cpu", False, torch.bfloat16),
        ("float32", "cuda:0", True, torch.float32),
    ],
)
def test_what_a_base_computes_in(
    wanted: str, device: str, has_instructions: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "cpu_multiplies_bfloat16", lambda: has_instructions)
    spec = BaseSpec.model_validate({"model": "org/base", "compute_dtype": wanted})
    assert compute_dtype(spec, device) == expected
