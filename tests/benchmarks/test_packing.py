"""The benchmark runs, and ends with its JSON line; what it measures is not judged here."""

from __future__ import annotations

import json

import pytest
import torch

from tests.benchmarks import packing
from tests.benchmarks.rivals import random_nf4
from tests.benchmarks.surroundings import llama
from tuning.engine.base import Base
from tuning.spec import BaseSpec

TINY = llama(64, 64, 128, layers=1, heads=4, key_value_heads=2, pad_token_id=0)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),
    pytest.mark.filterwarnings("ignore:Merge lora module:UserWarning"),
]


def test_both_sides_run_and_the_last_line_is_the_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(packing.SHAPES, "small", packing.Shape(TINY, (2, 4), ((1, 8), (2, 16))))
    packing.main(["--trials", "1", "3", "--steps", "1", "--rounds", "1", "--threads", "1", "--device", "cpu"])
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert set(result["speedup"]) == {"K=1,b=1,t=8", "K=3,b=1,t=8", "K=1,b=2,t=16", "K=3,b=2,t=16"}
    assert all(value > 0 for value in [*result["speedup"].values(), *result["packing"].values()])
    assert "packed against one by one" in out


def test_a_random_base_is_in_nf4_and_the_same_for_the_same_seed() -> None:
    one, other, third = (random_nf4(TINY, torch.device("cpu"), torch.float32, seed) for seed in (0, 0, 1))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(one(ids).logits, other(ids).logits)
        assert not torch.equal(one(ids).logits, third(ids).logits)
    # A model of its own: on some CPUs bitsandbytes lays the weights out anew at the first forward pass.
    fresh = random_nf4(TINY, torch.device("cpu"), torch.float32)
    base = Base(BaseSpec(model="random", compute_dtype="float32"), model=fresh)
    assert 4.12 < base.report.bits_per_parameter < 4.2
    assert base.can_lie_end_to_end
