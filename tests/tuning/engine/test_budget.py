"""Out of memory: smaller passes, the same result, and the size that fitted is remembered."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tests.tuning.engine.conftest import Data
from tuning.engine.batch import Micro
from tuning.engine.budget import TokenBudget, cost, is_out_of_memory, split
from tuning.engine.trainer import Trainer
from tuning.spec import BaseSpec, TrialConfig

MICROS = [Micro(0, [1, 2, 3]), Micro(1, [4]), Micro(2, [5, 6, 7, 8, 9])]


def rows(micros: Sequence[Micro[int]]) -> list[tuple[int, int]]:
    return [(micro.key, row) for micro in micros for row in micro.rows]


def test_parts_keep_the_order_and_the_bound(data: Data) -> None:
    longest = max(data[0].length(row) for _, row in rows(MICROS))
    for bound in (1, longest, 3 * longest, 10 * longest):
        parts = split(MICROS, data[0], bound)
        assert [row for part in parts for row in rows(part)] == rows(MICROS)
        assert all(cost(part, data[0]) <= bound or len(rows(part)) == 1 for part in parts)
    assert split(MICROS, data[0], None) == [MICROS]
    assert len(split(MICROS, data[0], 1)) == 9


def machine_with(tokens: int, data: Data, done: list[tuple[int, int]]) -> Callable[[list[Micro[int]]], None]:
    """Work that runs out of memory beyond so many tokens."""

    def work(part: list[Micro[int]]) -> None:
        if cost(part, data[0]) > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        done.extend(rows(part))

    return work


def test_everything_is_done_once_and_the_size_is_remembered(data: Data, caplog: pytest.LogCaptureFixture) -> None:
    budget, done, longest = TokenBudget(), list[tuple[int, int]](), 61
    work = machine_with(2 * longest, data, done)
    with caplog.at_level(logging.WARNING):
        budget.run(MICROS, data[0], work)
        assert done == rows(MICROS)
        assert budget.tokens is not None
        remembered = budget.tokens
        budget.run(MICROS, data[0], work)
    assert budget.tokens == remembered
    assert [record.getMessage().partition(" ran")[2] for record in caplog.records] == [
        " out of memory; from now on passes are smaller"
    ]


def test_a_single_row_that_does_not_fit_is_an_error(data: Data) -> None:
    done: list[tuple[int, int]] = []
    with pytest.raises(torch.OutOfMemoryError):
        TokenBudget().run(MICROS, data[0], machine_with(0, data, done))
    assert done == []


def test_other_errors_are_not_tried_again(data: Data) -> None:
    calls: list[int] = []

    def work(part: list[Micro[int]]) -> None:
        calls.append(len(part))
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        TokenBudget().run(MICROS, data[0], work)
    assert calls == [3]


def test_torch_s_own_error_on_a_cpu_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


TRIALS = [
    TrialConfig(rank=4, alpha=8.0, dropout=0.3, batch_size=5, accumulation=2, steps=3, learning_rate=1e-2, seed=1),
    TrialConfig(rank=2, alpha=8.0, batch_size=2, steps=3, learning_rate=1e-2, target_modules="mlp", seed=2),
]


@pytest.mark.parametrize("packing", [False, True])
def test_smaller_passes_end_where_whole_ones_end(make_trainer: Callable[..., Trainer], packing: bool) -> None:
    """Losses to 1e-5, weights to 1e-4 of their movement, as everywhere in these tests; dropout included."""
    ends: list[list[torch.Tensor]] = []
    told: list[list[float]] = []
    for bound in (None, 130, 1):
        trainer = make_trainer(packing=packing)
        trainer._budget.tokens = bound
        ids = [trainer.attach(trial) for trial in TRIALS]
        slots = [trainer.slots[slot] for slot in ids]
        before = [slot.flat.data.clone() for slot in slots]
        losses: list[float] = []
        while any(not slot.finished for slot in slots):
            losses += [report.loss for report in trainer.step()]
        losses += trainer.evaluate(list(trainer.slots)).values()
        ends.append([slot.flat.data - start for slot, start in zip(slots, before, strict=True)])
        told.append(losses)
    for moved, losses in zip(ends[1:], told[1:], strict=True):
        assert losses == pytest.approx(told[0], rel=1e-5)
        for ours, theirs in zip(moved, ends[0], strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


SHORT_OF_MEMORY = """
import logging, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tuning.engine.base import Base
from tuning.engine.data import Tokens
from tuning.engine.trainer import Trainer
from tuning.spec import BaseSpec, TrialConfig

logging.basicConfig(stream=sys.stdout, format="%(message)s")
base = Base(BaseSpec(model=sys.argv[1], compute_dtype="float32"))
trainer = Trainer(base, Tokens(Path(sys.argv[2])), Tokens(Path(sys.argv[3])))
trainer.attach(TrialConfig(rank=4, alpha=8.0, batch_size=1, steps=1))
trainer.step()
pages = int(Path("/proc/self/statm").read_text().split()[0])
room = pages * resource.getpagesize() + 96 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (room, room))
big = trainer.attach(TrialConfig(rank=4, alpha=8.0, batch_size=400, steps=2))
reports = trainer.step() + trainer.step()
print(len(reports), reports[-1].loss < reports[0].loss, trainer._budget.tokens is not None)
"""


@pytest.mark.slow
def test_a_machine_that_is_really_short_of_memory(base_spec: BaseSpec, data: Data) -> None:
    """A pass of 400 rows wants some 600 MiB; the process may have 96 more than it has."""
    command = [sys.executable, "-c", SHORT_OF_MEMORY, base_spec.model, str(data[0].path), str(data[1].path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("ran out of memory" in line for line in lines) == 1
    assert lines[-1] == "2 True True"
