"""Packs: reports, joining and leaving, trials that diverge beside trials that do not.

Bounds: what a neighbour may change is float rounding. Weights are compared as in test_equivalence.py, by their distance
relative to how far training moved them.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cluster.errors import InputError
from tests.tuning.engine.conftest import Data
from tests.tuning.engine.peft_loop import load_nf4
from tuning.engine.base import Base
from tuning.engine.batch import Micro, pack_rows
from tuning.engine.data import Tokens
from tuning.engine.pack import Pack
from tuning.engine.slot import Slot
from tuning.engine.trainer import StepReport, Trainer
from tuning.spec import BaseSpec, TrialConfig

WEIGHT_TOLERANCE = 1e-4
MakeTrainer = Callable[..., Trainer]


def config(**knobs: Any) -> TrialConfig:
    fields: dict[str, Any] = {"rank": 4, "alpha": 8.0, "learning_rate": 1e-2, "batch_size": 2, "steps": 6, **knobs}
    return TrialConfig(**fields)


DROPOUT = config(dropout=0.3, accumulation=2, target_modules="attention", rank=3, seed=5)
WIDE = config(rank=16, batch_size=5, target_modules="mlp", seed=6)


def attach(trainer: Trainer, trial: TrialConfig) -> Slot:
    slot_id = trainer.attach(trial)
    return trainer.slots[slot_id]


def run_to_end(trainer: Trainer) -> list[StepReport]:
    reports: list[StepReport] = []
    while any(not slot.finished for slot in trainer.slots.values()):
        reports += trainer.step()
    return reports


def flat_of(slot: Slot) -> Tensor:
    return slot.flat.data.clone()


def trained_alone(trainer: Trainer, trial: TrialConfig) -> tuple[Tensor, Tensor]:
    """The weights before and after."""
    slot = attach(trainer, trial)
    before = flat_of(slot)
    run_to_end(trainer)
    return before, flat_of(slot)


def check_same(ours: Tensor, alone: tuple[Tensor, Tensor]) -> None:
    before, after = alone
    assert float((ours - after).norm() / (after - before).norm()) < WEIGHT_TOLERANCE


# Reports


def test_a_report_for_every_optimizer_step_and_none_between(make_trainer: MakeTrainer, data: Data) -> None:
    trainer = make_trainer()
    fast, slow = trainer.attach(config(steps=4)), trainer.attach(config(accumulation=3, steps=2))
    passes = [trainer.step() for _ in range(7)]
    told = [[(report.slot, report.step) for report in reports] for reports in passes]
    assert told == [[(fast, 1)], [(fast, 2)], [(fast, 3), (slow, 1)], [(fast, 4)], [], [(slow, 2)], []]
    assert [slot.finished for slot in trainer.slots.values()] == [True, True]
    report = passes[5][0]
    assert report.tokens == sum(data[0].length(row) for row in _rows(data, slow_seed=0, first=6, count=6))
    assert report.seconds > 0
    assert report.grad_norm > 0
    assert not report.diverged


def _rows(data: Data, slow_seed: int, first: int, count: int) -> list[int]:
    from tuning.engine.data import RowStream

    stream = RowStream(data[0], slow_seed)
    stream.position = first
    return stream.take(count)


def test_only_the_slots_that_are_given_work_move(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    one, two = trainer.attach(config()), trainer.attach(config(seed=1))
    still = flat_of(trainer.slots[two])
    assert [report.slot for report in trainer.step([one])] == [one]
    assert torch.equal(flat_of(trainer.slots[two]), still)
    assert trainer.slots[two].stream.position == 0
    assert trainer.step([]) == []


def test_a_loss_falls_and_the_evaluation_sees_it(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    slot = trainer.attach(config(steps=25))
    first = trainer.evaluate([slot])[slot]
    reports = run_to_end(trainer)
    assert first - trainer.evaluate([slot])[slot] > 0.5
    assert reports[0].loss - reports[-1].loss > 0.5


def test_no_stacks_stay_on_the_base_after_a_pass_that_failed(make_trainer: MakeTrainer, base: Base) -> None:
    trainer = make_trainer()
    slot = trainer.attach(config())
    trainer.step()
    stack = next(iter(trainer._packs[-1].stacks.values()))[0]
    stack.b, whole = stack.b[:, :, :2], stack.b
    with pytest.raises(RuntimeError):
        trainer.step()
    assert not any(site.stacks for site in base.sites.values())
    with pytest.raises(RuntimeError):
        trainer.evaluate([slot])
    assert not any(site.stacks for site in base.sites.values())
    stack.b = whole
    assert len(trainer.step()) == 1


def test_a_target_that_matches_nothing_takes_no_slot(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    with pytest.raises(ValueError, match="'c_attn' matches no linear layer"):
        trainer.attach(config(target_modules=["c_attn"]))
    assert trainer.slots == {}
    assert trainer.step() == []


def test_a_slot_that_left_leaves_nothing_behind(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the pack that it trained in, nor in the one of its evaluation, also where that was broken off."""
    trainer = make_trainer()
    one, two = trainer.attach(config()), trainer.attach(config(seed=1))
    trainer.step()
    trainer.evaluate([one])
    trainer.step()
    slot = weakref.ref(trainer.slots[one])
    trainer.detach(one)
    gc.collect()
    assert slot() is None
    with monkeypatch.context() as patched:
        patched.setattr(trainer.base, "head", lambda features: features @ features)
        with pytest.raises(RuntimeError):
            trainer.evaluate([two])
    packs = [weakref.ref(pack) for pack in trainer._packs]
    trainer.free_memory()
    assert [pack() for pack in packs] == [None]


def test_passes_in_parts_find_their_stacks_again(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[int]] = []

    class CountedPack(Pack[int]):
        def __init__(self, slots: Any, rows: Any, row_tokens: float, dtype: torch.dtype) -> None:
            super().__init__(slots, rows, row_tokens, dtype)
            made.append(sorted(slots))

    monkeypatch.setattr("tuning.engine.trainer.Pack", CountedPack)
    trainer = make_trainer()
    slots = [trainer.attach(config(seed=seed)) for seed in range(4)]
    trainer._budget.tokens = 2 * 2 * max(trainer.train.length(row) for row in range(len(trainer.train)))
    for _ in range(4):
        trainer.step()
    assert made == [slots[:2], slots[2:]]
    trainer.step(slots[1:])  # of other company: a slot is in one pack only
    held = [key for pack in trainer._packs for key in pack.keys]
    assert sorted(held) == sorted(set(held))


# Evaluation


def test_a_fresh_slot_evaluates_to_the_base_s_own_loss(
    make_trainer: MakeTrainer, data: Data, base_spec: BaseSpec
) -> None:
    plain, total, targets = load_nf4(base_spec.model), 0.0, 0
    for index in range(len(data[1])):
        ids, labels = (torch.from_numpy(part.copy()).long()[None] for part in data[1].row(index))
        total += float(plain(input_ids=ids, labels=labels, num_items_in_batch=1).loss.detach())
        targets += int((labels[:, 1:] != -100).sum())
    trainer = make_trainer()
    slot = trainer.attach(config(dropout=0.5))
    assert trainer.evaluate([slot])[slot] == pytest.approx(total / targets, rel=1e-5)


def test_an_evaluation_depends_on_neither_batch_size_nor_company(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    ids = [trainer.attach(config(eval_batch_size=size, steps=3)) for size in (1, 3, 64, 3)]
    other = trainer.attach(config(eval_batch_size=3, seed=9, steps=3))
    run_to_end(trainer)
    together = trainer.evaluate([*ids, other])
    alone = trainer.evaluate([ids[0]])[ids[0]]
    assert [together[slot] for slot in ids] == pytest.approx([alone] * 4, rel=1e-5)
    assert together[other] != pytest.approx(alone, rel=1e-3)
    assert trainer.evaluate([]) == {}


def test_an_evaluation_changes_nothing_even_within_an_accumulated_step(make_trainer: MakeTrainer) -> None:
    ends: list[Tensor] = []
    for evaluating in (False, True):
        trainer = make_trainer()
        slot = trainer.attach(DROPOUT)
        while not trainer.slots[slot].finished:
            trainer.step()
            if evaluating:
                trainer.evaluate([slot])
        ends.append(flat_of(trainer.slots[slot]))
    assert torch.equal(ends[0], ends[1])


# Company


def test_the_same_trial_twice_in_a_pack_is_the_same_twice(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    slots = [attach(trainer, trial) for trial in (DROPOUT, WIDE, DROPOUT)]
    alone = trained_alone(make_trainer(), DROPOUT)
    run_to_end(trainer)
    check_same(flat_of(slots[0]), alone)
    check_same(flat_of(slots[2]), alone)


def test_trials_that_join_and_leave_between_passes_change_nothing(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    gone = trainer.attach(WIDE)
    trainer.step()
    kept = trainer.attach(DROPOUT)
    trainer.step()  # kept is in the middle of its first step
    trainer.detach(gone)
    trainer.step()
    late = trainer.attach(WIDE)
    assert len({gone, kept, late}) == 3
    run_to_end(trainer)
    check_same(flat_of(trainer.slots[kept]), trained_alone(make_trainer(), DROPOUT))
    check_same(flat_of(trainer.slots[late]), trained_alone(make_trainer(), WIDE))
    trainer.detach(gone)  # once more is no error
    assert set(trainer.slots) == {kept, late}


def test_the_global_generator_has_no_say(make_trainer: MakeTrainer) -> None:
    torch.manual_seed(1)
    one = trained_alone(make_trainer(), DROPOUT)
    torch.manual_seed(2)
    two = trained_alone(make_trainer(), DROPOUT)
    assert torch.equal(one[1], two[1])


# Divergence


def run_beside_a_broken_one(trainer: Trainer, broken: TrialConfig, injury: Callable[[Slot], None] | None) -> Any:
    """Train DROPOUT and WIDE around a trial that is hurt after two passes; returns their slots and its reports."""
    first, sick, last = trainer.attach(DROPOUT), trainer.attach(broken), trainer.attach(WIDE)
    reports = [report for _ in range(2) for report in trainer.step()]
    if injury is not None:
        injury(trainer.slots[sick])
    reports += run_to_end(trainer)
    return trainer.slots[first], trainer.slots[last], sick, [report for report in reports if report.slot == sick]


def spoil_weights(slot: Slot) -> None:
    slot.flat.data[10:].fill_(math.nan)


def spoil_gradient(slot: Slot) -> None:
    slot.grad.fill_(math.inf)


@pytest.mark.parametrize(
    ("broken", "injury"),
    [
        (config(learning_rate=1e30, max_grad_norm=None, batch_size=3), None),
        (config(batch_size=3), spoil_weights),
        (config(batch_size=3, accumulation=4), spoil_weights),
        (config(batch_size=3, accumulation=4), spoil_gradient),
        (config(batch_size=3, optimizer="paged_adamw_8bit", dropout=0.2), spoil_weights),
    ],
    ids=["learning rate 1e30", "NaN weights", "NaN within a step", "infinite gradient, finite loss", "8-bit"],
)
def test_a_trial_that_diverges_fails_alone(make_trainer: MakeTrainer, broken: TrialConfig, injury: Any) -> None:
    trainer = make_trainer()
    first, last, sick, reports = run_beside_a_broken_one(trainer, broken, injury)
    check_same(flat_of(first), trained_alone(make_trainer(), DROPOUT))
    check_same(flat_of(last), trained_alone(make_trainer(), WIDE))
    assert not first.diverged
    assert not last.diverged
    # The sick trial: one last report that says so, no step after it, no loss that could win a sweep.
    assert [report.diverged for report in reports] == [False] * (len(reports) - 1) + [True]
    assert not math.isfinite(reports[-1].loss)
    assert not math.isfinite(reports[-1].grad_norm)
    assert trainer.slots[sick].finished
    assert trainer.slots[sick].step < broken.steps
    assert not trainer.slots[sick].grad.any()
    losses = trainer.evaluate(list(trainer.slots))
    assert losses.pop(sick) == math.inf
    assert all(math.isfinite(loss) for loss in losses.values())


def test_weights_that_go_wild_at_the_last_step_evaluate_to_infinity(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    wild, sound = trainer.attach(config(learning_rate=1e30, steps=1)), trainer.attach(config(steps=1))
    reports = run_to_end(trainer)
    assert [report.diverged for report in reports] == [False, False]
    losses = trainer.evaluate([wild, sound])
    assert losses[wild] == math.inf
    assert math.isfinite(losses[sound])


# Rows end to end


def losses_of_rows(base: Base, data: Tokens, rows: list[int], *, end_to_end: bool) -> list[float]:
    """The loss of each target of each row, by the base alone."""
    batch = pack_rows(data, [[Micro(0, rows)]], base.device, end_to_end=end_to_end)
    with torch.no_grad(), base.laid_end_to_end(batch.rows):
        features = base.features(batch.ids, batch.positions).flatten(0, 1)
    share = batch.shares[0]
    return functional.cross_entropy(base.head(features[share.places]), share.targets, reduction="none").tolist()


def test_the_loss_of_every_example_is_the_same_end_to_end(base: Base, data: Data) -> None:
    rows = list(range(40))
    padded, packed = (losses_of_rows(base, data[0], rows, end_to_end=packing) for packing in (False, True))
    assert len(packed) > 400
    assert packed == pytest.approx(padded, rel=1e-5)
    alone = losses_of_rows(base, data[0], [17], end_to_end=False)
    first = sum(int((data[0].row(row)[1][1:] != -100).sum()) for row in range(17))
    assert packed[first : first + len(alone)] == pytest.approx(alone, rel=1e-5)


def test_end_to_end_a_trial_ends_where_it_ends_padded(
    make_trainer: MakeTrainer, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout and company included; and there is less to compute."""
    original = base.features
    trials = [DROPOUT, WIDE, config(rank=7, batch_size=5, dropout=0.2)]
    ends: list[list[Tensor]] = []
    sizes: list[int] = []
    for packing in (False, True):
        trainer = make_trainer(packing=packing)
        slots = [attach(trainer, trial) for trial in trials]
        batches: list[int] = []

        def counting(ids: Tensor, positions: Tensor | None = None, batches: list[int] = batches) -> Tensor:
            batches.append(ids.numel())
            return original(ids, positions)

        with monkeypatch.context() as patched:
            patched.setattr(base, "features", counting)
            run_to_end(trainer)
        ends.append([flat_of(slot) for slot in slots])
        sizes.append(sum(batches))
    for trial, padded, packed in zip(trials, *ends, strict=True):
        check_same(packed, (flat_of(attach(make_trainer(), trial)), padded))
    assert sizes[1] < 0.85 * sizes[0]


def test_an_evaluation_end_to_end_is_the_same(make_trainer: MakeTrainer) -> None:
    losses: list[list[float]] = []
    for packing in (False, True):
        trainer = make_trainer(packing=packing)
        slots = [trainer.attach(config(seed=seed, eval_batch_size=4)) for seed in range(2)]
        run_to_end(trainer)
        losses.append(list(trainer.evaluate(slots).values()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_base_that_carries_rows_into_each_other_is_refused(base: Base, data: Data) -> None:
    mixing = copy(base)
    mixing.can_lie_end_to_end = False
    with pytest.raises(InputError, match=r"data\.packing: must be false for this base"):
        Trainer(mixing, *data, packing=True)


# What fails


def out_of_memory(norm: float | None = None) -> float:
    raise torch.OutOfMemoryError(f"CUDA out of memory ({norm})")


def test_norms_that_find_no_memory_leave_every_slot_as_it_was(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    slots = [attach(trainer, config(seed=seed)) for seed in range(2)]
    with monkeypatch.context() as patched:
        patched.setattr("tuning.engine.trainer.gradient_norms", lambda _slots: out_of_memory())
        with pytest.raises(torch.OutOfMemoryError):
            trainer.step()
    for slot in slots:
        assert (slot.micro_steps, slot.stream.position, bool(slot.grad.any())) == (0, 0, False)
    expected = trained_alone(make_trainer(), config())
    run_to_end(trainer)
    check_same(flat_of(slots[0]), expected)


def test_a_slot_that_fails_fails_alone(make_trainer: MakeTrainer) -> None:
    """As when there is no memory left for the optimizer's state of one."""
    trainer = make_trainer()
    first, sick, last = trainer.attach(DROPOUT), trainer.attach(config()), trainer.attach(WIDE)
    trainer.slots[sick].optimizer_step = out_of_memory
    reports = trainer.step()
    assert [report.slot for report in reports] == [last]  # the first accumulates
    assert list(trainer.failures) == [sick]
    assert trainer.slots[sick].stream.position == 0
    assert not trainer.slots[sick].grad.any()
    trainer.detach(sick)
    run_to_end(trainer)
    assert trainer.failures == {}
    check_same(flat_of(trainer.slots[first]), trained_alone(make_trainer(), DROPOUT))
    check_same(flat_of(trainer.slots[last]), trained_alone(make_trainer(), WIDE))


def test_a_pass_that_breaks_off_counts_for_nothing(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its second part, when the first has already left its gradient."""
    trainer = make_trainer()
    slot = attach(trainer, WIDE)
    trainer._budget.tokens = 70
    original, calls = trainer._forward_backward, list[int]()

    def breaking(micros: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("a bug")
        original(micros)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "_forward_backward", breaking)
        with pytest.raises(RuntimeError, match="a bug"):
            trainer.step()
    assert not slot.grad.any()
    run_to_end(trainer)
    check_same(flat_of(slot), trained_alone(make_trainer(), WIDE))


# Gradient checkpointing


@pytest.mark.parametrize("packing", [False, True])
def test_gradient_checkpointing_changes_nothing_but_memory(base_spec: BaseSpec, data: Data, packing: bool) -> None:
    ends: list[list[Tensor]] = []
    kept: list[int] = []
    for checkpointing in (False, True):
        base = Base(base_spec.model_copy(update={"gradient_checkpointing": checkpointing}))
        trainer = Trainer(base, *data, packing=packing)
        slots = [attach(trainer, trial) for trial in (DROPOUT, WIDE)]
        saved = list[int]()

        def count(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            trainer.step()
        run_to_end(trainer)
        ends.append([flat_of(slot) for slot in slots])
        kept.append(sum(saved))
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
    assert kept[1] < kept[0]


# Compute in 16 bits


def test_bfloat16_trains_too_and_keeps_float32_weights(tiny_base: Path, data: Data) -> None:
    trainer = Trainer(Base(BaseSpec(model=str(tiny_base))), *data)
    slot = trainer.attach(config(steps=25, dropout=0.1))
    first = trainer.evaluate([slot])[slot]
    run_to_end(trainer)
    assert trainer.slots[slot].flat.dtype == torch.float32
    assert first - trainer.evaluate([slot])[slot] > 0.5
