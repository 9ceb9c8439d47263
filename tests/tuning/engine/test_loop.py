"""The trainer's thread, without Ray: packs form from whoever waits, and nobody's trouble reaches another."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tuning.make import sweep_spec, write_rows
from tuning.engine import checkpoint
from tuning.engine.base import Base
from tuning.engine.data import prepare
from tuning.engine.loop import TrainerLoop
from tuning.engine.trainer import Trainer
from tuning.inspect import load_tokenizer
from tuning.spec import TrialConfig


def config(**knobs: Any) -> TrialConfig:
    fields: dict[str, Any] = {"rank": 4, "alpha": 8.0, "learning_rate": 1e-2, "batch_size": 2, "steps": 6}
    return TrialConfig(**{**fields, **knobs})


@pytest.fixture(scope="module")
def make_trainer(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("loop")
    spec = sweep_spec(tiny_base, write_rows(folder / "rows.jsonl"))
    train, evaluation, _ = prepare(spec.data, load_tokenizer(spec.base), folder / "data", 0)
    base = Base(spec.base)
    return lambda: Trainer(base, train, evaluation)


@pytest.fixture
def loop(make_trainer: Any) -> Iterator[TrainerLoop]:
    running = TrainerLoop(make_trainer)
    yield running
    running.stop()


def test_trials_that_wait_together_share_their_passes(loop: TrainerLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuning.engine.loop.GATHER_S", 60)  # however slow this machine is
    trainer = loop.ready.result()
    sizes: list[int] = []
    original = trainer.step

    def counting(slot_ids: Any) -> Any:
        sizes.append(len(slot_ids))
        return original(slot_ids)

    trainer.step = counting  # pyright: ignore[reportAttributeAccessIssue]
    slots = [loop.attach(config(seed=seed)) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        first = list(pool.map(lambda slot: loop.advance(slot, 3), slots))
        second = list(pool.map(lambda slot: loop.advance(slot, 3), slots))
    assert sizes == [3] * 6
    assert [report.steps for report in first] == [3] * 3
    assert [report.steps for report in second] == [6] * 3
    assert all(report.eval_loss < math.inf and report.tokens_per_second > 0 for report in first + second)


def test_a_slot_that_never_returns_does_not_hold_the_others(loop: TrainerLoop) -> None:
    loop.attach(config(seed=1))
    assert loop.advance(loop.attach(config()), 6).steps == 6


def test_a_large_slot_is_made_while_the_others_train(loop: TrainerLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first weights are not drawn before a whole trial beside it has ended."""
    is_over = threading.Event()
    make_slot = loop.ready.result().make_slot

    def patient(trial: TrialConfig, state: Any = None) -> Any:
        if trial.rank == 16:
            assert is_over.wait(60)
        return make_slot(trial, state)

    monkeypatch.setattr(loop.ready.result(), "make_slot", patient)
    small = loop.attach(config())
    with ThreadPoolExecutor(1) as pool:
        large = pool.submit(loop.attach, config(rank=16))
        assert loop.advance(small, 6).steps == 6
        is_over.set()
        assert loop.advance(large.result(), 6).steps == 6


def test_slots_join_in_the_order_in_which_they_were_asked_for(
    loop: TrainerLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long each takes to be made, and though one of them cannot be."""
    trainer = loop.ready.result()
    make_slot, begun = trainer.make_slot, [threading.Event() for _ in range(3)]
    is_last_made = threading.Event()

    def slow_first(trial: TrialConfig, state: Any = None) -> Any:
        begun[trial.seed].set()
        if trial.seed == 2:
            slot = make_slot(trial, state)
            is_last_made.set()
            return slot
        assert is_last_made.wait(60)
        if trial.seed == 1:
            raise ValueError("cannot be made")
        return make_slot(trial, state)

    monkeypatch.setattr(trainer, "make_slot", slow_first)
    with ThreadPoolExecutor(3) as pool:
        asked: list[Any] = []
        for seed in range(3):
            asked.append(pool.submit(loop.attach, config(seed=seed)))
            assert begun[seed].wait(60)
        first, last = asked[0].result(), asked[2].result()
        with pytest.raises(ValueError, match="cannot be made"):
            asked[1].result()
    assert first < last
    assert [slot.config.seed for slot in trainer.slots.values()] == [0, 2]


def test_a_slot_that_finds_no_memory_gets_what_torch_held_in_reserve(
    loop: TrainerLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = loop.ready.result()
    loop.advance(loop.attach(config()), 1)
    assert trainer._packs
    make_slot = trainer.make_slot

    def short_of_memory(trial: TrialConfig, state: Any = None) -> Any:
        if trainer._packs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make_slot(trial, state)

    monkeypatch.setattr(trainer, "make_slot", short_of_memory)
    assert loop.advance(loop.attach(config(seed=1)), 1).steps == 1


@pytest.mark.parametrize("where", ["features", "make_slot"])
def test_a_lost_device_is_told_before_anybody_goes_on(
    make_trainer: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host ends its process then; after running out of memory it does not."""
    lost: list[BaseException] = []
    loop = TrainerLoop(make_trainer, lost_device=lost.append)
    trainer = loop.ready.result()
    slot = loop.attach(config())
    told = [
        "CUDA error: out of memory",
        "CUDA error: invalid configuration argument",
        "CUDA error: an illegal memory access was encountered",
    ]

    def fail(*_: Any) -> Any:
        raise torch.AcceleratorError(told[0])

    monkeypatch.setattr(trainer.base if where == "features" else trainer, where, fail)
    act = (lambda: loop.advance(slot, 1)) if where == "features" else (lambda: loop.attach(config(seed=1)))
    try:
        for _ in range(2):
            with pytest.raises(torch.AcceleratorError):
                act()
            assert lost == []
            told.pop(0)
        with pytest.raises(torch.AcceleratorError):
            act()
        assert [str(error) for error in lost] == told
    finally:
        loop.stop()


def test_restored_slot_goes_on_where_it_was(loop: TrainerLoop, tmp_path: Path) -> None:
    whole = loop.attach(config(dropout=0.1))
    expected = [loop.advance(whole, 3), loop.advance(whole, 3)]
    broken = loop.attach(config(dropout=0.1))
    loop.advance(broken, 3)
    loop.save(broken, tmp_path / "c", "base", None)
    loop.detach(broken)
    again = loop.advance(loop.attach(config(dropout=0.1), checkpoint.load(tmp_path / "c")), 3)
    assert (again.steps, again.train_loss, again.eval_loss) == (6, expected[1].train_loss, expected[1].eval_loss)


def test_errors_go_to_their_caller_and_the_loop_goes_on(loop: TrainerLoop, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'nope' matches no linear layer"):
        loop.attach(config(target_modules=["nope"]))
    with pytest.raises(KeyError):
        loop.advance(99, 1)
    with pytest.raises(KeyError):
        loop.save(99, tmp_path / "c", "base", None)
    assert loop.advance(loop.attach(config()), 1).steps == 1


def test_detach_counts_and_forgives(loop: TrainerLoop) -> None:
    one, two = loop.attach(config()), loop.attach(config())
    assert loop.detach(one) == 1
    assert loop.detach(one) == 1
    assert loop.detach(two) == 0


def test_a_base_that_does_not_load_tells_every_caller() -> None:
    def fail() -> Trainer:
        raise OSError("no such base")

    loop = TrainerLoop(fail)
    for _ in range(2):
        with pytest.raises(OSError, match="no such base"):
            loop.attach(config())


def test_stop_cancels_those_who_wait(make_trainer: Any) -> None:
    loop = TrainerLoop(make_trainer)
    slot = loop.attach(config(steps=1_000_000))
    outcome: list[BaseException] = []

    def wait() -> None:
        try:
            loop.advance(slot, 1_000_000)
        except CancelledError as error:
            outcome.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while not loop.ready.result().slots[slot].step:
        pass
    loop.stop()
    thread.join(10)
    assert len(outcome) == 1
