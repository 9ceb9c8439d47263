"""What is left of a sweep, judged by its folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import InputError
from tests.tuning.make import sweep_spec, write_checkpoint, write_sweep, write_trial
from tuning import keep
from tuning.folder import check_same
from tuning.past import Past, damage, differences, resume_step, trial_name
from tuning.results import read_sweep

BASE, ROWS = Path("/base"), Path("/rows.jsonl")


@pytest.fixture
def past(tmp_path: Path) -> Past:
    """Of six trials: one finished, one stopped, one interrupted after its second report, one failed."""
    folder = write_sweep(tmp_path / "s", state="running", steps=8)
    for name, losses in {"t000": [3.0, 2.0, 1.5, 1.0], "t001": [4.0], "t003": [3.5, 2.5]}.items():
        trial = write_trial(folder / name, losses)
        for index, loss in enumerate(losses, 1):
            write_checkpoint(trial, 2 * index, loss)
    write_trial(folder / "t004", [])
    (folder / "t004" / "error.txt").write_text("Failure # 3\nno luck\n")
    keep.end(folder / "t000", "finished", "eval_loss")
    keep.end(folder / "t001", "stopped", "eval_loss")
    return Past.of(read_sweep(folder))


def test_what_has_ended_is_done_and_the_rest_is_left(past: Past) -> None:
    assert list(past.done) == ["t000", "t001"]
    assert list(past.begun) == ["t003", "t004"]
    assert past.left(6) == ["t003", "t004", "t002", "t005"]
    assert past.new(6) == ["t002", "t005"]
    assert {name: trial.state for name, trial in past.done.items()} == {"t000": "finished", "t001": "stopped"}
    assert Past().left(2) == [trial_name(0), trial_name(1)]


def test_reports_stand_up_to_the_checkpoint_that_is_gone_on_from(past: Past) -> None:
    assert past.scores("t000", "eval_loss") == {2: 3.0, 4: 2.0, 6: 1.5, 8: 1.0}
    assert past.scores("t003", "eval_loss") == {2: 3.5}
    assert past.scores("t004", "eval_loss") == {}
    assert past.scores("t005", "eval_loss") == {}
    trial = past.begun["t003"].folder
    assert resume_step(trial) == 4
    (trial / "checkpoint_000004" / "state.pt").write_text("sta")
    assert resume_step(trial) == 2
    assert past.scores("t003", "eval_loss") == {}


def test_what_is_whole_is_not_damaged(past: Past) -> None:
    folder = past.done["t000"].folder.parent
    with (folder / "t000" / "result.json").open("a") as file:
        file.write('{"steps": 6, "eval')
    (folder / "t002").mkdir()  # a driver that was killed between two calls
    assert damage(read_sweep(folder)) == []


@pytest.mark.parametrize(
    ("file", "content", "rule"),
    [
        ("t000/params.json", b"{", "must hold the configuration of the trial"),
        ("t000/params.json", None, "must hold the configuration of the trial"),
        ("t003/params.json", b"\xff", "must hold the configuration of the trial"),
        ("t000/result.json", b"", "must hold the reports of the trial, to its end, step 8"),
        (
            "t000/result.json",
            b'{"steps": 2, "eval_loss": 3.0}\n{"ste',
            "must hold the reports of the trial, to its end",
        ),
        ("t001/result.json", None, "must hold the reports of the trial, to its end"),
        ("t000/end.json", b"", "must tell how the trial ended"),
    ],
)
def test_no_trial_is_trained_again_because_of_a_damaged_file(
    file: str, content: bytes | None, rule: str, past: Past
) -> None:
    folder = past.done["t000"].folder.parent
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    (fault,) = damage(read_sweep(folder))
    assert fault.where == str(folder / file)
    assert fault.rule.startswith(rule)
    assert f"put it back, or delete {(folder / file).parent}" in fault.rule
    with pytest.raises(InputError, match="is missing or damaged"):
        check_same(folder, read_sweep(folder).spec, "x.yaml")


def test_a_half_written_line_is_no_report(past: Past) -> None:
    results = past.begun["t003"].folder / "result.json"
    with results.open("a") as file:
        file.write('{"steps": 6, "eval')
    again = Past.of(read_sweep(results.parent.parent))
    assert [report["steps"] for report in again.begun["t003"].reports] == [2, 4]
    assert math.isfinite(again.begun["t003"].score("eval_loss"))


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({}, []),
        ({"resources": {"slots": 1}, "cluster": {"dashboard": False}, "output": "elsewhere"}, []),
        ({"search": {"trials": 3, "time_budget_s": 10.0, "keep_adapters": None}}, []),
        (
            {"search": {"trials": 5}, "train": {"steps": 8, "eval_every": 2, "batch_size": 2}},
            [
                "x.yaml: train.steps: must be 4, as in the sweep that is resumed, got 8",
                "x.yaml: search.trials: must be 3, as in the sweep that is resumed, got 5",
            ],
        ),
    ],
)
def test_only_what_changes_no_trial_may_differ(sections: dict[str, Any], told: list[str]) -> None:
    faults = differences(sweep_spec(BASE, ROWS), sweep_spec(BASE, ROWS, **sections), "x.yaml")
    assert [str(fault) for fault in faults] == told


def test_the_order_of_knobs_decides_what_is_drawn() -> None:
    spec = sweep_spec(BASE, ROWS)
    space = dict(reversed(spec.model_dump(mode="json")["space"].items()))
    other = sweep_spec(BASE, ROWS, space=space)
    assert other.planned() != spec.planned()
    (fault,) = differences(spec, other, "x.yaml")
    assert str(fault).startswith("x.yaml: space: must be in the order of the sweep that is resumed")


def test_a_knob_of_the_space_counts_as_a_whole() -> None:
    space = sweep_spec(BASE, ROWS).model_dump(mode="json")["space"]
    space["rank"] = {"choice": [2, 8, 16]}
    del space["target_modules"]
    faults = differences(sweep_spec(BASE, ROWS), sweep_spec(BASE, ROWS, space=space), "x.yaml")
    assert {fault.where for fault in faults} == {
        "x.yaml: space.rank",
        "x.yaml: space.target_modules",
        "x.yaml: train.target_modules",
    }
