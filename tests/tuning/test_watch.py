"""What the driver does when a trial's numbers cannot be written; whole sweeps on a full disk are in test_kill.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.tune.experiment import Trial

from tests.tuning.limits import file_limit
from tests.tuning.make import report, sweep_spec, write_sweep
from tests.tuning.watcher import Watcher
from tuning.ledger import Ledger
from tuning.past import Past
from tuning.results import read_sweep
from tuning.sweep import write_record
from tuning.trial import TRIAL_KEY
from tuning.watch import InterruptStopper, SweepWatch

KNOBS = {"rank": 2, "alpha": 4.0, "target_modules": ["q_proj"], "learning_rate": 0.1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "s", state="running")


@pytest.fixture
def watch(folder: Path, tmp_path: Path) -> SweepWatch:
    """Of a sweep whose base has been measured, so that it asks no broker."""
    record = read_sweep(folder).record.model_copy(update={"base": {"bits_per_parameter": 4.1}})
    ledger = Ledger(folder, "eval_loss", None, Past())
    spec = sweep_spec(tmp_path, tmp_path / "rows.jsonl")
    return SweepWatch(spec, record, None, ledger, lambda now: write_record(folder, now), Watcher(), [])


@pytest.mark.parametrize("end", ["result", "mark"])
def test_the_sweep_is_ended_where_a_result_or_the_mark_of_an_end_cannot_be_written(
    folder: Path, watch: SweepWatch, end: str
) -> None:
    """What was written before stays, half a line more does no harm, and a resumed sweep goes on with the trial."""
    stopper = InterruptStopper()
    trial = Trial("tests", config={TRIAL_KEY: "t000", **KNOBS}, stub=True)
    watch.on_trial_start(0, [], trial)
    watch.on_trial_result(0, [], trial, {**report(2.0, 2), "done": False})
    results = folder / "t000" / "result.json"
    before = results.read_bytes()
    assert not stopper.stop_all()
    with file_limit(len(before) + 20 if end == "result" else 1):
        if end == "result":
            watch.on_trial_result(0, [], trial, {**report(1.0, 4), "done": True})
        else:
            watch.on_trial_complete(0, [], trial)
    assert watch.trouble == "cannot write a result: File too large"
    assert stopper.stop_all()
    assert results.read_bytes().startswith(before)
    (left,) = read_sweep(folder).trials
    assert [one["steps"] for one in left.reports] == [2]
    assert not left.ended
    assert watch.finish().trouble == watch.trouble
