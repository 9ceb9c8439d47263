"""The driver's files of a sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.errors import NotFoundError
from serving.registry import Registry
from tests.tuning.make import make_best_and_stuck, report, write_checkpoint, write_sweep
from tuning.ledger import Ledger
from tuning.past import Past
from tuning.publish import publish_trial
from tuning.results import leaderboard, read_sweep

KNOBS = {"rank": 2, "alpha": 4.0, "target_modules": ["q_proj"], "learning_rate": 0.1}


def run(ledger: Ledger, folder: Path, name: str, losses: list[float]) -> None:
    """A trial from its start to its end."""
    ledger.begin(name, {"trial": name, **KNOBS})
    for index, loss in enumerate(losses, 1):
        write_checkpoint(folder / name, 2 * index, loss)
        ledger.report(name, {**report(loss, 2 * index), "trial": name})
    ledger.end(name, "finished")


def kept(folder: Path) -> set[str]:
    return {path.parent.parent.name for path in folder.glob("t*/checkpoint_*/adapter")}


def test_only_the_best_adapters_stay_and_all_numbers(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", state="running")
    ledger = Ledger(folder, "eval_loss", 2, Past())
    for name, loss in {"t000": 2.0, "t001": 1.0}.items():
        run(ledger, folder, name, [3.0, loss])
    assert kept(folder) == {"t000", "t001"}
    run(ledger, folder, "t002", [1.5, 4.0])
    assert kept(folder) == {"t001", "t002"}
    # Another driver, which knows the folder only.
    run(Ledger(folder, "eval_loss", 2, Past.of(read_sweep(folder))), folder, "t003", [1.2, 1.1])
    assert kept(folder) == {"t001", "t003"}

    sweep = read_sweep(folder)
    assert [(row["trial"], row["eval_loss"], row["steps"]) for row in leaderboard(sweep)] == [
        ("t001", 1.0, 4),
        ("t003", 1.1, 4),
        ("t002", 1.5, 2),
        ("t000", 2.0, 4),
    ]
    assert {trial.name for trial in sweep.trials if trial.adapter} == {"t001", "t003"}
    assert list(folder.glob("t*/checkpoint_*/state.pt")) == []
    with pytest.raises(NotFoundError, match=r"trial t002 was not kept: it is not among the best \d+ \(search.keep_ad"):
        publish_trial(sweep, Registry(tmp_path / "registry"), "x", "t002")


def test_all_adapters_stay_where_that_is_wanted(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", state="running")
    ledger = Ledger(folder, "eval_loss", None, Past())
    for name in ("t000", "t001", "t002"):
        run(ledger, folder, name, [2.0])
    assert kept(folder) == {"t000", "t001", "t002"}


def test_what_cannot_be_deleted_is_told_and_the_trial_has_ended(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", state="running")
    ledger = Ledger(folder, "eval_loss", 1, Past())
    ledger.begin("t000", {"trial": "t000", **KNOBS})
    write_checkpoint(folder / "t000", 2, 3.0)
    stuck = make_best_and_stuck(folder / "t000" / "checkpoint_000002")
    trouble = ledger.end("t000", "finished")
    assert trouble == f"cannot delete {stuck}, which is not needed any more: Is a directory"
    assert read_sweep(folder).trial("t000").ended
    run(ledger, folder, "t001", [2.0])
    assert read_sweep(folder).trial("t001").ended


def test_half_a_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", state="running")
    ledger = Ledger(folder, "eval_loss", None, Past())
    ledger.begin("t000", {"trial": "t000", **KNOBS})
    ledger.report("t000", report(3.0, 2))
    with (folder / "t000" / "result.json").open("a") as file:
        file.write('{"steps": 4, "eval_lo')
    ledger.begin("t000", {"trial": "t000", **KNOBS})
    ledger.report("t000", report(2.0, 4))
    (trial,) = read_sweep(folder).trials
    assert [one["eval_loss"] for one in trial.reports] == [3.0, 2.0]
    assert trial.knobs == {"rank": 2, "alpha": 4.0, "target_modules": ["q_proj"], "learning_rate": 0.1}
    assert json.loads((folder / "t000" / "params.json").read_text())["trial"] == "t000"
