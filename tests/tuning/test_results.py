"""Reading a sweep's folder: written by hand here, so that every state can be shown without a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from cluster.errors import InputError, NotFoundError
from tests.tuning.limits import file_limit
from tests.tuning.make import report, write_checkpoint, write_sweep, write_trial
from tuning.results import Sweep, leaderboard, read_sweep, write_leaderboard


def trials(sweep: Sweep) -> dict[str, str]:
    return {trial.name: trial.state for trial in sweep.trials}


def test_states_and_order(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s")
    write_trial(folder / "t000", [3.0, 2.0])
    write_trial(folder / "t001", [1.5])
    write_trial(folder / "t002", [math.inf], diverged=True)
    write_trial(folder / "t003", [])
    (folder / "t003" / "error.txt").write_text("Traceback\nValueError: no luck\n")
    sweep = read_sweep(folder)
    assert list(trials(sweep).items()) == [
        ("t001", "stopped"),
        ("t000", "finished"),
        ("t002", "diverged"),
        ("t003", "failed"),
    ]
    assert sweep.trial("t003").error == "ValueError: no luck"


def test_while_it_runs(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", state="running")
    write_trial(folder / "t000", [3.0])
    write_trial(folder / "t001", [])
    with (folder / "t000" / "result.json").open("a") as file:
        file.write('{"steps": 4, "eval_lo')  # half a line
    assert trials(read_sweep(folder)) == {"t000": "running", "t001": "waiting"}


def test_the_best_report_counts_and_its_checkpoint(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", steps=6)
    trial = write_trial(folder / "t000", [3.0, 1.0, 2.0])
    best = write_checkpoint(trial, 1, 1.0)
    write_checkpoint(trial, 2, 2.0)
    write_checkpoint(trial, 3, 0.5, complete=False)
    sweep = read_sweep(folder)
    assert sweep.trials[0].best["eval_loss"] == 1.0
    assert sweep.trials[0].adapter == best
    assert sweep.winner is sweep.trials[0]


def test_a_trial_without_an_adapter_does_not_win(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s")
    write_trial(folder / "t000", [1.0, 1.0])
    write_checkpoint(write_trial(folder / "t001", [2.0, 2.0]), 0, 2.0)
    winner = read_sweep(folder).winner
    assert winner is not None
    assert winner.name == "t001"


def test_repeated_steps_after_a_restart_count_once(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s")
    trial = write_trial(folder / "t000", [3.0])
    with (trial / "result.json").open("a") as file:
        file.write(json.dumps(report(2.5, 2)) + "\n" + json.dumps(report(2.0, 4)) + "\n")
    assert [one["eval_loss"] for one in read_sweep(folder).trials[0].reports] == [2.5, 2.0]


def test_numbers_are_those_of_the_adapter_that_is_there(tmp_path: Path) -> None:
    """A better report whose checkpoint was never written, as after Ctrl-C, does not count."""
    folder = write_sweep(tmp_path / "s")
    write_checkpoint(write_trial(folder / "t000", [3.0, 1.0]), 0, 3.0)
    write_checkpoint(write_trial(folder / "t001", [2.0]), 0, 2.0)
    sweep = read_sweep(folder)
    assert [(trial.name, trial.best["eval_loss"]) for trial in sweep.trials] == [("t001", 2.0), ("t000", 3.0)]


def test_a_copy_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s")
    trial = write_trial(folder / "t000", [3.0, 1.0])
    whole = write_checkpoint(trial, 0, 3.0)
    write_checkpoint(trial, 1, 1.0, complete=False)
    (trial / "checkpoint_000002").mkdir()
    (trial / "checkpoint_000002" / "metrics.json").write_text('{"eval_loss": 0.5, "fi')
    assert read_sweep(folder).trials[0].adapter == whole


def test_the_record_knows_how_a_trial_ended(tmp_path: Path) -> None:
    """error.txt stays when a trial that was started again does well."""
    folder = write_sweep(tmp_path / "s", states={"t000": "stopped"})
    (write_trial(folder / "t000", [3.0]) / "error.txt").touch()
    assert trials(read_sweep(folder)) == {"t000": "stopped"}


def test_a_loss_of_zero_is_the_best_there_is(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s")
    write_trial(folder / "t000", [1.0])
    write_trial(folder / "t001", [0.0])
    assert [trial.name for trial in read_sweep(folder).trials] == ["t001", "t000"]


def test_leaderboard_is_flat_and_written(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s")
    write_checkpoint(write_trial(folder / "t000", [3.0, 2.0]), 2, 2.0)
    sweep = read_sweep(folder)
    (row,) = leaderboard(sweep)
    assert row == {
        "place": 1,
        "trial": "t000",
        "state": "finished",
        "rank": 2,
        "alpha": 4.0,
        "target_modules": "q_proj",
        "learning_rate": 0.1,
        "steps": 2,
        "train_loss": 3.0,
        "eval_loss": 2.0,
        "tokens_per_second": 10.0,
        "adapter_parameters": 8,
        "adapter": "t000/checkpoint_000002/adapter",
    }
    text = write_leaderboard(sweep).read_text().splitlines()
    assert text[0] == ",".join(row)
    assert text[1].startswith("1,t000,finished,2,4.0,q_proj,0.1,2,")


def test_a_leaderboard_that_cannot_be_written_is_as_it_was(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s")
    write_trial(folder / "t000", [3.0, 2.0])
    before = write_leaderboard(read_sweep(folder)).read_bytes()
    write_trial(folder / "t001", [3.0, 1.0])
    with file_limit(20), pytest.raises(OSError, match="File too large"):
        write_leaderboard(read_sweep(folder))
    assert (folder / "leaderboard.csv").read_bytes() == before


def test_what_is_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="not a sweep's folder"):
        read_sweep(tmp_path)
    folder = write_sweep(tmp_path / "s")
    with pytest.raises(NotFoundError, match="no trial 't9'; there are none yet"):
        read_sweep(folder).trial("t9")
    (folder / "sweep.yaml").write_text("name: [")
    with pytest.raises(InputError, match=r"sweep\.yaml: line"):
        read_sweep(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe{}", b'{"name": "tiny"}', b"[1]", b'{"state": "\xed\xa0\x80"}']
)
def test_a_damaged_record_is_told(content: bytes, tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s")
    (folder / "sweep.json").write_bytes(content)
    with pytest.raises(
        InputError, match=rf"^{folder}/sweep\.json: is damaged; must be the record that a sweep writes \("
    ):
        read_sweep(folder)


def test_bytes_that_are_no_text_spoil_no_other_report(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s")
    trial = write_trial(folder / "t000", [3.0, 2.0])
    with (trial / "result.json").open("ab") as file:
        file.write(b'\xff\xfe{"steps": 6}\n[1]\n"word"\n{"eval_loss": 1.0}\n')
    (write_checkpoint(trial, 4, 2.0).parent / "metrics.json").write_text('{"steps": 4, "files": [1]}')
    assert [report["steps"] for report in read_sweep(folder).trials[0].reports] == [2, 4]
