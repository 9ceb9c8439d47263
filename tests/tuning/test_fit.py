"""What fits a device, and whether what is said to help does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tuning.make import sweep_spec
from tests.tuning.test_estimate import llama
from tuning.estimate import Case, Estimator, RowShape
from tuning.fit import Change, changes, fit, refusal
from tuning.memory import Device
from tuning.spec import SweepSpec, TrialConfig

ROWS = RowShape(512, 511, 512, 511, "data.max_length")


@pytest.fixture(scope="module")
def estimator(tmp_path_factory: pytest.TempPathFactory) -> Estimator:
    """A base of 1.9 billion parameters, in float32 as the tests' sweeps."""
    model = llama(tmp_path_factory.mktemp("bases") / "2B", 2048, 8192, 24, vocab_size=64000)
    return Estimator(sweep_spec(model, Path("/rows.jsonl")).base)


def sweep(**sections: Any) -> SweepSpec:
    knobs = {"steps": 4, "batch_size": 4, "eval_batch_size": 4, "rank": 32, **sections.pop("train", {})}
    train = {knob: value for knob, value in knobs.items() if knob not in sections.get("space", {})}
    plain: dict[str, Any] = {"train": train, "space": {}, "search": {"trials": 1}}
    return sweep_spec(Path("/base"), Path("/rows.jsonl"), **{**plain, **sections})


def case_of(spec: SweepSpec, rows: RowShape = ROWS, **knobs: Any) -> Case:
    return Case(spec.trial(knobs), rows, spec.base.gradient_checkpointing)


def applied(change: Change, case: Case) -> Case:
    """``case`` after a change's settings, read as a user would type them."""
    trial, rows, checkpointing = case.trial, case.rows, case.gradient_checkpointing
    for setting in change.settings:
        field, value = setting.split("=") if "=" in setting else setting.replace(" up to ", "=").split("=")
        knob = field.rpartition(".")[2]
        if knob == "gradient_checkpointing":
            checkpointing = True
        elif knob == "max_length":
            rows = RowShape(int(value), int(value) - 1, int(value), int(value) - 1, rows.source)
        else:
            number = int(value) if value.isdigit() else value
            trial = TrialConfig.model_validate({**trial.model_dump(), knob: number})
    return Case(trial, rows, checkpointing)


def test_more_memory_holds_more_slots(estimator: Estimator) -> None:
    case = case_of(sweep())
    slots = [fit(estimator, case, Device("gpu", float(size))).slots for size in (8, 24, 48, 80)]
    assert slots == sorted(set(slots))
    found = fit(estimator, case, Device("gpu", 48.0))
    assert found.host.slots == found.slots
    assert found.host.total <= found.device.usable(found.slots) < estimator.host(case, found.slots + 1).total


def test_changes_do_what_they_say_best_first(estimator: Estimator) -> None:
    spec, device = sweep(), Device("gpu", 24.0)
    case = case_of(spec)
    now = fit(estimator, case, device)
    assert now.slots >= 1
    found = changes(estimator, spec, case, device)
    assert [change.fit.runs for change in found] == sorted((change.fit.runs for change in found), reverse=True)
    assert found[0].settings == ("base.gradient_checkpointing=true",)
    assert ("train.batch_size=2", "train.accumulation=2") in [change.settings for change in found]
    for change in found:
        assert change.fit.runs > now.runs
        assert fit(estimator, applied(change, case), device).runs == change.fit.runs


def test_a_knob_of_the_space_is_told_as_such(estimator: Estimator) -> None:
    spec = sweep(space={"batch_size": {"choice": [1, 4]}})
    found = changes(estimator, spec, case_of(spec, batch_size=4), Device("gpu", 24.0))
    assert ("space.batch_size up to 2",) in [change.settings for change in found]


def test_where_no_single_change_is_enough_shorter_rows_are(estimator: Estimator) -> None:
    spec, device = sweep(base={"model": "/base", "gradient_checkpointing": True}), Device("gpu", 4.0)
    long = RowShape(8192, 8191, 8192, 8191, "data.max_length")
    case = case_of(spec, long, batch_size=1, eval_batch_size=1)
    assert fit(estimator, case, device).runs == 0
    (change,) = changes(estimator, spec, case, device)
    assert change.settings[0].startswith("data.max_length=")
    length = int(change.settings[0].partition("=")[2])
    assert 64 <= length < 8192
    assert fit(estimator, applied(change, case), device).runs == 1
    # Not shorter than need be: with twice as much it does not fit.
    double = RowShape(2 * length, 2 * length, 2 * length, 2 * length, "data.max_length")
    assert fit(estimator, Case(case.trial, double, True), device).runs == 0


def test_all_changes_together_where_one_is_not_enough(estimator: Estimator) -> None:
    spec, device = sweep(train={"batch_size": 64, "eval_batch_size": 64}), Device("gpu", 3.8)
    case = case_of(spec)
    (change,) = changes(estimator, spec, case, device)
    assert len(change.settings) > 2
    assert "base.gradient_checkpointing=true" in change.settings
    assert change.fit.runs == 1
    assert fit(estimator, applied(change, case), device, 1).runs == 1


def test_a_gpu_that_cannot_hold_the_base_gets_no_advice(estimator: Estimator) -> None:
    spec, device = sweep(), Device("gpu", 1.5)
    case = case_of(spec)
    found = changes(estimator, spec, case, device)
    assert found == []
    text = refusal(fit(estimator, case, device), found)
    assert text.startswith("must fit a GPU of 1.5 GiB, of which 0.8 can be used, but its largest trial alone needs ")
    assert text.endswith("nothing known makes it fit")


def test_a_refusal_tells_what_would_help(estimator: Estimator) -> None:
    spec, device = sweep(), Device("gpu", 8.0)
    case = case_of(spec)
    found = changes(estimator, spec, case, device)
    text = refusal(fit(estimator, case, device), found)
    assert "it fits with base.gradient_checkpointing=true" in text


def test_a_node_without_gpus_pages_nothing(estimator: Estimator) -> None:
    case = case_of(sweep())
    need = estimator.host(case, 1)
    assert need.least < need.total
    for kind, runs in (("gpu", 1), ("cpu", 0)):
        size = 1.0
        device = Device(kind, size, cores=2)  # pyright: ignore[reportArgumentType]
        while device.usable(1) < need.total - need.paged // 2:
            size *= 1.01
            device = Device(kind, size, cores=2)  # pyright: ignore[reportArgumentType]
        assert fit(estimator, case, device).runs == runs
