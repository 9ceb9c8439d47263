"""Out of memory: smaller passes, the same result, and the size that fitted is remembered."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tests.tuning.engine.conftest import Data
from tuning.engine.batch import Micro
from tuning.engine.budget import TokenBudget
from tuning.engine.trainer import Trainer
from tuning.engine.trouble import is_out_of_memory
from tuning.spec import BaseSpec, TrialConfig

MICROS = [Micro(0, [1, 2, 3]), Micro(1, [4]), Micro(2, [5, 6, 7, 8, 9])]


def rows(micros: Sequence[Micro[int]]) -> list[tuple[int, int]]:
    return [(micro.key, row) for micro in micros for row in micro.rows]


@pytest.mark.parametrize("end_to_end", [False, True])
def test_parts_keep_the_order_and_the_bound(data: Data, end_to_end: bool) -> None:
    budget = TokenBudget(end_to_end=end_to_end)
    longest = max(data[0].length(row) for _, row in rows(MICROS))
    for bound in (1, longest, 3 * longest, 10 * longest):
        budget.tokens = bound
        parts = budget.split(MICROS, data[0])
        assert [row for part in parts for row in rows(part)] == rows(MICROS)
        assert all(budget.cost(part, data[0]) <= bound or len(rows(part)) == 1 for part in parts)
        if bound == 1:
            assert len(parts) == 9
    budget.tokens = None
    assert budget.split(MICROS, data[0]) == [MICROS]


def test_the_cost_of_a_pass_has_the_padding_that_it_has(data: Data) -> None:
    lengths = [data[0].length(row) for _, row in rows(MICROS)]
    assert TokenBudget().cost(MICROS, data[0]) == max(lengths) * 9
    assert TokenBudget(end_to_end=True).cost(MICROS, data[0]) == sum(lengths)


class Machine:
    """Work that runs out of memory beyond so many tokens, or for one slot whatever its size."""

    def __init__(self, tokens: int, data: Data, hungry: int | None = None) -> None:
        self.tokens, self.data, self.hungry = tokens, data, hungry
        self.done: list[tuple[int, int]] = []
        self.given_up: list[int] = []

    def work(self, part: list[Micro[int]]) -> None:
        size = TokenBudget().cost(part, self.data[0])
        if size > self.tokens or any(micro.key == self.hungry for micro in part):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        self.done.extend(rows(part))

    def give_up(self, key: int, error: RuntimeError) -> None:
        assert is_out_of_memory(error)
        self.given_up.append(key)


def test_everything_is_done_once_and_the_size_is_remembered(data: Data) -> None:
    budget, machine = TokenBudget(), Machine(2 * 61, data)
    note = budget.run(MICROS, data[0], machine.work, machine.give_up)
    assert machine.done == rows(MICROS)
    assert note is not None
    assert "did not fit into memory" in note
    remembered = budget.tokens
    assert remembered is not None
    assert budget.run(MICROS, data[0], machine.work, machine.give_up) is None
    assert budget.tokens == remembered
    assert machine.given_up == []


def test_a_slot_that_does_not_fit_alone_is_given_up_and_the_others_go_on(data: Data) -> None:
    machine = Machine(10**9, data, hungry=2)
    TokenBudget().run(MICROS, data[0], machine.work, machine.give_up)
    assert machine.given_up == [2]
    assert machine.done == [row for row in rows(MICROS) if row[0] != 2]


def test_other_errors_are_not_tried_again(data: Data) -> None:
    calls: list[int] = []

    def work(part: list[Micro[int]]) -> None:
        calls.append(len(part))
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        TokenBudget().run(MICROS, data[0], work, Machine(0, data).give_up)
    assert calls == [3]


@pytest.mark.parametrize(
    "message",
    ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"],
)
def test_other_words_for_it_are_known(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))


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
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tuning.engine.base import Base
from tuning.engine.data import Tokens
from tuning.engine.trainer import Trainer
from tuning.spec import BaseSpec, TrialConfig

base = Base(BaseSpec(model=sys.argv[1], compute_dtype="float32"))
trainer = Trainer(base, Tokens(Path(sys.argv[2])), Tokens(Path(sys.argv[3])))
trainer.attach(TrialConfig(rank=4, alpha=8.0, batch_size=1, steps=1))
trainer.step()
pages = int(Path("/proc/self/statm").read_text().split()[0])
room = pages * resource.getpagesize() + 96 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (room, room))
big = trainer.attach(TrialConfig(rank=4, alpha=8.0, batch_size=400, steps=2))
reports = trainer.step() + trainer.step()
print(*trainer.notes)
print(len(reports), reports[-1].loss < reports[0].loss, trainer.failures)
"""


@pytest.mark.slow
def test_a_machine_that_is_really_short_of_memory(base_spec: BaseSpec, data: Data) -> None:
    """A pass of 400 rows wants some 600 MiB; the process may have 96 more than it has."""
    command = [sys.executable, "-c", SHORT_OF_MEMORY, base_spec.model, str(data[0].path), str(data[1].path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("did not fit into memory" in line for line in lines) == 1
    assert lines[-1] == "2 True {}"
