"""Which checkpoints stay: decided from files' sizes and reports, without weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.tuning.make import write_checkpoint, write_trial
from tuning import keep


@pytest.fixture
def trial(tmp_path: Path) -> Path:
    """Five checkpoints, after 2, 4, ... steps; the second is the best."""
    folder = write_trial(tmp_path / "t000", [3.0, 1.0, 2.0, 2.5, 2.2])
    for index, loss in enumerate([3.0, 1.0, 2.0, 2.5, 2.2], 1):
        write_checkpoint(folder, 2 * index, loss)
    return folder


def there(trial: Path, name: str = "") -> list[int]:
    """Steps of the checkpoints that have ``name``."""
    return [one.steps for one in keep.saved(trial) if (one.folder / name).exists()]


def test_the_last_two_and_the_best_stay_while_a_trial_runs(trial: Path) -> None:
    keep.prune(trial, "eval_loss")
    assert there(trial, "adapter") == [4, 8, 10]
    assert there(trial, keep.STATE) == [8, 10]
    keep.prune(trial, "eval_loss")
    assert there(trial) == [4, 8, 10]
    assert len(list(trial.glob("checkpoint_*"))) == 3


def test_what_is_damaged_counts_for_nothing(trial: Path) -> None:
    (trial / "checkpoint_000010" / "state.pt").write_text("sta")
    (trial / "checkpoint_000004" / "adapter" / "adapter_model.safetensors").write_text("weig")
    keep.prune(trial, "eval_loss")
    assert there(trial) == [6, 8]  # the best that is whole, and what can be gone on from
    assert there(trial, keep.STATE) == [6, 8]


def test_an_ended_trial_keeps_its_best_adapter_only(trial: Path) -> None:
    assert keep.ended(trial) is None
    keep.end(trial, "stopped", "eval_loss")
    assert keep.ended(trial) == "stopped"
    (left,) = keep.saved(trial)
    assert (left.steps, left.has_adapter, left.has_state) == (4, True, False)


def test_a_loser_keeps_its_numbers(trial: Path) -> None:
    keep.end(trial, "finished", "eval_loss")
    keep.drop_adapters(trial)
    (left,) = keep.saved(trial)
    assert (left.score("eval_loss"), left.has_adapter, left.adapter_is_damaged) == (1.0, False, False)
    assert sorted(path.name for path in left.folder.iterdir()) == ["metrics.json"]


def test_losers_are_those_behind_the_best(tmp_path: Path) -> None:
    scores = {"t002": 1.0, "t000": 1.0, "t001": math.inf, "t003": 0.5}
    assert keep.losers(scores, 2) == ["t002", "t001"]
    assert keep.losers(scores, 4) == []


def test_a_trial_without_a_number_has_no_best(tmp_path: Path) -> None:
    folder = write_trial(tmp_path / "t000", [math.inf])
    write_checkpoint(folder, 2, math.inf)
    assert keep.best(keep.saved(folder), "eval_loss") is None
    keep.end(folder, "diverged", "eval_loss")
    assert list(folder.glob("checkpoint_*")) == []


def test_what_a_crash_left_is_swept_up(trial: Path) -> None:
    (trial / ".writing-x" / "new").mkdir(parents=True)
    (trial / "checkpoint_000002" / "metrics.json").unlink()  # as prune does first
    keep.sweep_up(trial)
    assert there(trial) == [4, 6, 8, 10]
    assert not (trial / "checkpoint_000002").exists()
    assert not (trial / ".writing-x").exists()


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    keep.write_text(tmp_path / "a.json", "one")
    keep.write_text(tmp_path / "a.json", "two")
    assert (tmp_path / "a.json").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
