from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.tuning.compare.make import STEPS, add_report, make_sweep, spec
from tests.tuning.make import write_checkpoint
from tuning.compare.document import Comparison, curve, measured_with, sweep_view, trial_view
from tuning.compare.importance import points
from tuning.compare.knobs import scalar, sweep_knobs
from tuning.compare.reader import Comparer
from tuning.compare.source import LocalShelf, LocalSource
from tuning.results import read_sweep


def test_what_the_page_is_told_of_a_trial(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "made", 12)
    sweep = read_sweep(folder)
    view = trial_view(sweep, sweep.trial("t000"), LocalSource(folder))
    planned = (sweep.spec.planned() or [])[0]
    assert view.state == "finished"
    assert view.knobs["rank"] == planned.rank
    assert view.knobs["alpha_over_rank"] == planned.alpha / planned.rank
    assert view.config == planned.model_dump(mode="json", exclude={"alpha_over_rank"})
    assert view.steps == view.best_steps == STEPS
    assert view.curve.steps == [20, 40, 60, 80, 100]
    assert view.eval_loss == view.curve.eval_loss[-1]
    assert view.adapter is None
    assert view.publish is None


ROWS: dict[str, Any] = {"train": "org/rows", "eval_fraction": 0.1}
OWN: dict[str, Any] = {"train": "org/rows", "eval": "org/others"}


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        ({"data": ROWS}, {"data": {"train": "org/rows"}}, set()),  # a tenth is held out where nothing is said
        ({"data": ROWS}, {"data": ROWS | {"packing": True}}, set()),
        ({"data": ROWS}, {"data": ROWS | {"max_length": 64}}, {"data.max_length"}),
        ({"data": ROWS}, {"data": ROWS, "search": {"trials": 4, "seed": 1}}, {"search.seed"}),
        ({"data": OWN}, {"data": OWN, "search": {"trials": 4, "seed": 1}}, set()),
        ({"data": OWN}, {"data": OWN | {"train": "org/more"}}, set()),
        ({"data": OWN}, {"data": OWN | {"eval_split": "dev"}}, {"data.eval_split"}),
        ({"data": OWN}, {"data": OWN, "base": {"model": "org/base", "revision": "v2"}}, {"base.revision"}),
        (
            {"data": OWN, "search": {"trials": 4, "metric": "train_loss"}},
            {"data": OWN | {"train": "org/more"}, "search": {"trials": 4, "metric": "train_loss"}},
            {"data.train"},
        ),
    ],
)
def test_what_keeps_losses_from_being_compared(one: dict[str, Any], other: dict[str, Any], differ: set[str]) -> None:
    first, second = (measured_with(spec(4, **sections)) for sections in (one, other))
    assert {name for name in first | second if first.get(name) != second.get(name)} == differ


def test_an_adapter_can_be_published_and_its_numbers_are_those_that_count(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "made", 3)
    adapter = write_checkpoint(folder / "t001", 40, 0.001)
    sweep = read_sweep(folder)
    view = trial_view(sweep, sweep.trial("t001"), LocalSource(folder))
    assert view.adapter == str(adapter)
    assert (view.best_steps, view.steps, view.eval_loss) == (40, STEPS, 0.001)
    assert view.publish == f"loraloom publish {folder} --trial t001 --name made"


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "made", 12)
    document = Comparer([LocalShelf(folder)]).document()
    text = document.model_dump_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    view = next(trial for trial in document.sweeps[0].trials or [] if trial.state == "diverged")
    assert view.curve.eval_loss[-1] is None
    assert view.eval_loss is not None, "the best that it had"
    assert Comparison.model_validate_json(text) == document


def test_knobs_that_are_searched_come_first_and_say_how_they_are_shown(tmp_path: Path) -> None:
    knobs = {knob.name: knob for knob in sweep_knobs(read_sweep(make_sweep(tmp_path / "made", 12)))}
    assert list(knobs) == ["rank", "alpha_over_rank", "target_modules", "learning_rate", "dropout", "alpha"]
    assert [name for name, knob in knobs.items() if knob.kind == "category"] == ["target_modules"]
    assert knobs["learning_rate"].log
    assert knobs["rank"].log, "4 to 32"
    assert not knobs["dropout"].log, "0 has no logarithm"
    assert not knobs["alpha"].searched


def test_null_is_a_choice_as_others_are(tmp_path: Path) -> None:
    space = {"max_grad_norm": {"choice": [None, 0.3, 1.0]}, "rank": {"choice": [2, 4, 8, 16, 32]}}
    folder = make_sweep(tmp_path / "made", 15, space=space, search={"algorithm": "grid"})
    sweep = read_sweep(folder)
    assert next(knob for knob in sweep_knobs(sweep) if knob.name == "max_grad_norm").kind == "category"
    assert len(points(sweep)) == 15
    view = trial_view(sweep, sweep.trial("t000"), LocalSource(folder))
    assert view.knobs["max_grad_norm"] is None


def test_booleans_are_names(tmp_path: Path) -> None:
    space = {"rslora": {"choice": [True, False]}}
    sweep = read_sweep(make_sweep(tmp_path / "made", 2, space=space, search={"trials": 2}))
    assert next(knob for knob in sweep_knobs(sweep) if knob.name == "rslora").kind == "category"


def test_a_sweep_without_trials_yet(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "made", 12, state="running")
    for trial in folder.glob("t*"):
        for file in trial.iterdir():
            file.unlink()
        trial.rmdir()
    view = sweep_view(read_sweep(folder), LocalSource(folder))
    assert [knob.name for knob in view.knobs][-1] == "alpha"
    assert (view.planned, view.state) == (12, "running")


def test_time_goes_on_where_a_trial_was_started_again() -> None:
    reports = [{"steps": steps, "time_total_s": time} for steps, time in ((1, 5.0), (2, 9.0), (3, 2.0), (4, 6.0))]
    assert curve(reports).seconds == [5.0, 9.0, 11.0, 15.0]
    assert curve([{"steps": 1}]).seconds == [None]
    again = [{"steps": 1, "time_total_s": 5.0}, {"steps": 2, "time_total_s": 8.0, "iterations_since_restore": 1}]
    assert curve(again).seconds == [5.0, 13.0]


def test_a_damaged_trial_is_shown_as_far_as_it_can_be(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "made", 2)
    (folder / "t000" / "params.json").write_text('{"rank": -3, "trial": "t000"}')
    add_report(folder / "t001", 120, math.nan)
    trials = Comparer([LocalShelf(folder)]).document().sweeps[0].trials
    assert trials
    damaged = next(trial for trial in trials if trial.name == "t000")
    assert damaged.config == damaged.knobs == {"rank": -3}


@pytest.mark.parametrize(
    ("value", "shown"), [(["q", "v"], "q+v"), (1.5, 1.5), (math.inf, None), (True, True), (None, None), ({}, "{}")]
)
def test_scalars(value: object, shown: object) -> None:
    assert scalar(value) == shown
