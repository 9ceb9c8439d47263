"""Searches that go on where a killed driver left them, without Ray's processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from tests.tuning.make import sweep_spec, write_checkpoint, write_trial
from tuning.past import Past
from tuning.results import TrialResult, read_trial
from tuning.search import WORST, PlannedSearch, ResumedASHA, TPESearch, make_search
from tuning.spec import SchedulerSpec, SweepSpec
from tuning.trial import TRIAL_KEY

SPACE = {
    "rank": {"choice": [2, 4, 8]},
    "alpha_over_rank": {"choice": [None, 1.0, 4]},
    "target_modules": {"choice": [["q_proj"], "all-linear"]},
    "learning_rate": {"loguniform": [1e-4, 1e-1]},
    "warmup_steps": {"int_range": [0, 2]},
}


def spec_of(algorithm: str, trials: int) -> SweepSpec:
    search = {"algorithm": algorithm, "trials": trials, "seed": 7}
    return sweep_spec(Path("/base"), Path("/rows.jsonl"), space=SPACE, search=search)


def loss(config: dict[str, Any]) -> float:
    """A landscape with its lowest place at rank 4 and a learning rate of 1e-2."""
    return abs(config["rank"] - 4) + abs(config["learning_rate"] - 1e-2)


def result_of(config: dict[str, Any], *, ended: bool = True) -> TrialResult:
    knobs = {knob: value for knob, value in config.items() if knob != TRIAL_KEY}
    reports = [{"steps": 2, "eval_loss": loss(config) + 1}, {"steps": 4, "eval_loss": loss(config)}]
    return TrialResult(config[TRIAL_KEY], Path("/none"), knobs, reports=reports, ended=ended)


def run(search: TPESearch, count: int) -> list[dict[str, Any]]:
    """Ask for a trial and tell its result, one after another."""
    configs: list[dict[str, Any]] = []
    for number in range(count):
        config = search.suggest(f"id{number}")
        assert isinstance(config, dict)
        configs.append(config)
        search.on_trial_result(f"id{number}", {"eval_loss": loss(config) + 1})
        search.on_trial_complete(f"id{number}", {"eval_loss": loss(config)})
    return configs


@pytest.mark.parametrize("killed_after", [1, 4, 9, 13])
def test_tpe_proposes_the_same_after_a_break(killed_after: int) -> None:
    spec = spec_of("tpe", 14)
    whole = run(TPESearch(spec, Past()), 14)
    assert len({repr(config) for config in whole}) == 14
    past = Past({config[TRIAL_KEY]: result_of(config) for config in whole[:killed_after]})
    assert run(TPESearch(spec, past), 14 - killed_after) == whole[killed_after:]


def test_tpe_learns() -> None:
    configs = run(TPESearch(spec_of("tpe", 40), Past()), 40)
    assert sum(map(loss, configs[20:])) < 0.7 * sum(map(loss, configs[:20]))


def test_tpe_gives_begun_trials_out_first_with_their_own_knobs() -> None:
    spec = spec_of("tpe", 8)
    whole = run(TPESearch(spec, Past()), 6)
    past = Past(
        {config[TRIAL_KEY]: result_of(config) for config in (whole[0], whole[2])},
        {config[TRIAL_KEY]: result_of(config, ended=False) for config in (whole[1], whole[5])},
    )
    search = TPESearch(spec, past)
    again = run(search, 6)
    assert again[:2] == [whole[1], whole[5]]
    assert [config[TRIAL_KEY] for config in again[2:]] == ["t003", "t004", "t006", "t007"]
    assert search.suggest("more") == TPESearch.FINISHED
    assert [trial.state.name for trial in search._study.trials] == ["COMPLETE"] * 8


def test_tpe_tells_trials_that_failed_from_those_that_diverged() -> None:
    search = TPESearch(spec_of("tpe", 4), Past())
    for name, reports in {"failed": [], "diverged": [math.nan], "late": [2.5, math.inf], "well": [2.0, 3.0]}.items():
        search.suggest(name)
        for value in reports:
            search.on_trial_result(name, {"eval_loss": value})
        search.on_trial_complete(name, {"eval_loss": reports[-1]} if reports else None, error=not reports)
    assert [trial.state.name for trial in search._study.trials] == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert [trial.value for trial in search._study.trials] == [None, math.inf, 2.5, 2.0]


def unstable(low: float, high: float, trials: int = 40, seed: int = 7) -> SweepSpec:
    """A search for a learning rate that a trial may have."""
    space = {"learning_rate": {"loguniform": [low, high]}}
    search = {"algorithm": "tpe", "trials": trials, "seed": seed}
    return sweep_spec(Path("/base"), Path("/rows.jsonl"), space=space, search=search)


def cliff(config: dict[str, Any]) -> float:
    """A landscape with its lowest place at 1e-3, and a cliff at 1e-2 behind which every trial diverges."""
    rate = config["learning_rate"]
    return math.inf if rate > 1e-2 else abs(math.log10(rate) + 3)


def run_off(search: TPESearch, count: int) -> list[dict[str, Any]]:
    """Trials on ``cliff``, one after another."""
    configs: list[dict[str, Any]] = []
    for number in range(count):
        config = search.suggest(f"id{number}")
        assert isinstance(config, dict)
        configs.append(config)
        search.on_trial_complete(f"id{number}", {"eval_loss": cliff(config)})
    return configs


@pytest.mark.parametrize("seed", range(4))
def test_tpe_keeps_away_from_where_trials_diverge(seed: int) -> None:
    """Not told of them, it takes 30 of 40 trials there, all but the first ten, for it is the place where it knows of
    nothing.
    """
    configs = run_off(TPESearch(unstable(1e-5, 1.0, seed=seed), Past()), 40)
    assert 1 <= sum(math.isinf(cliff(config)) for config in configs) <= 14
    assert min(map(cliff, configs)) < 0.1


@pytest.mark.parametrize("seed", range(4))
def test_tpe_stays_nowhere_while_all_trials_diverge(seed: int) -> None:
    """Of equally bad places it prefers none: each sixth of the space gets its share, but for chance."""
    configs = run_off(TPESearch(unstable(1.0, 1e6, trials=70, seed=seed), Past()), 70)
    places = [int(math.log10(config["learning_rate"])) for config in configs[10:]]
    assert all(3 <= places.count(place) <= 22 for place in range(6))


@pytest.mark.parametrize("killed_after", [3, 12, 30])
def test_tpe_remembers_who_diverged_after_a_break(killed_after: int) -> None:
    spec = unstable(1e-4, 1.0)
    whole = run_off(TPESearch(spec, Past()), 40)
    done: dict[str, TrialResult] = {}
    for config in whole[:killed_after]:
        result = result_of(config)
        result.reports = [{"steps": 2, "eval_loss": cliff(config)}]
        done[result.name] = result
    assert any(math.isinf(result.reports[0]["eval_loss"]) for result in done.values())
    assert run_off(TPESearch(spec, Past(done)), 40 - killed_after) == whole[killed_after:]


@pytest.mark.parametrize("algorithm", ["random", "grid"])
def test_a_plan_goes_on_with_what_is_left(algorithm: str) -> None:
    spec = spec_of("random", 5)
    if algorithm == "grid":
        space = {"rank": {"choice": [1, 2, 4, 8, 16]}}
        spec = sweep_spec(Path("/base"), Path("/rows.jsonl"), space=space, search={"algorithm": "grid"})

    def all_of(past: Past) -> list[Any]:
        search = make_search(spec, past)
        return list(iter(lambda: search.suggest("id"), PlannedSearch.FINISHED))

    whole = all_of(Past())
    assert [config[TRIAL_KEY] for config in whole] == ["t000", "t001", "t002", "t003", "t004"]
    past = Past({"t001": result_of(whole[1])}, {"t003": result_of(whole[3], ended=False)})
    assert all_of(past) == [whole[3], whole[0], whole[2], whole[4]]


# ASHA


@dataclass
class FakeTrial:
    """What the scheduler asks of Tune's trial."""

    trial_id: str
    config: dict[str, Any]


def asha(past: Past, reduction_factor: int = 2) -> ResumedASHA:
    scheduler = ResumedASHA(SchedulerSpec(grace_steps=2, reduction_factor=reduction_factor), "eval_loss", 8, past)
    assert scheduler.set_search_properties("eval_loss", "min")
    return scheduler


def feed(scheduler: ResumedASHA, name: str, losses: dict[int, float], *, diverges: bool = False) -> str:
    """Report like a trial until it is stopped; the last decision. With ``diverges``, the last report is its end."""
    controller: Any = None
    trial: Any = FakeTrial(f"id-{name}", {TRIAL_KEY: name})
    scheduler.on_trial_add(controller, trial)
    decision = TrialScheduler.CONTINUE
    for steps, value in losses.items():
        if diverges and steps == max(losses):
            # As Tune does with a report that says it is done: the scheduler is not asked.
            scheduler.on_trial_complete(controller, trial, {"steps": steps, "eval_loss": value})
            return TrialScheduler.STOP
        decision = scheduler.on_trial_result(controller, trial, {"steps": steps, "eval_loss": value})
        if decision == TrialScheduler.STOP:
            scheduler.on_trial_complete(controller, trial, {"steps": steps, "eval_loss": value})
            break
    return decision


CURVES = {
    "t000": {2: 3.0, 4: 2.0, 6: 1.5, 8: 1.0},
    "t001": {2: 5.0},  # stopped at the first rung
    "t002": {2: 2.5, 4: 1.8, 6: 1.6, 8: 1.5},
    "t003": {2: 2.0, 4: 1.95},  # stopped at the second
}


def written(tmp_path: Path) -> dict[str, TrialResult]:
    results: dict[str, TrialResult] = {}
    for name, curve in CURVES.items():
        folder = write_trial(tmp_path / name, list(curve.values()))
        for steps, value in curve.items():
            write_checkpoint(folder, steps, value)
        results[name] = read_trial(folder, "eval_loss", 8, over=False)
    return results


def test_rungs_hold_what_ended_trials_reported(tmp_path: Path) -> None:
    whole = asha(Past())
    for name, curve in CURVES.items():
        feed(whole, name, curve)
    assert whole.recorded() == {2: [2.0, 2.5, 3.0, 5.0], 4: [1.8, 1.95, 2.0], 8: [1.0, 1.5]}
    resumed = asha(Past(written(tmp_path)))
    assert resumed.recorded() == whole.recorded()
    for scheduler in (whole, resumed):
        assert feed(scheduler, "t004", {2: 2.8}) == TrialScheduler.STOP
        assert feed(scheduler, "t005", {2: 2.2, 4: 1.7}) == TrialScheduler.CONTINUE


def test_a_trial_that_goes_on_is_judged_again_at_its_checkpoint_and_counted_once(tmp_path: Path) -> None:
    results = written(tmp_path)
    past = Past({name: results[name] for name in ("t000", "t001", "t002")}, {"t003": results["t003"]})
    resumed = asha(past)
    assert feed(resumed, "t003", {4: 1.95}) == TrialScheduler.STOP
    whole = asha(Past())
    for name, curve in CURVES.items():
        feed(whole, name, curve)
    assert resumed.recorded() == whole.recorded()


@pytest.mark.parametrize("reduction_factor", [2, 3, 4])
@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_asha_stops_trials_although_others_diverged(broken: float, reduction_factor: int) -> None:
    """All but one of those before diverged: so whoever is better than they is among the best, and goes on; once others
    are better still, the last is stopped.
    """
    scheduler = asha(Past(), reduction_factor)
    for number in range(5):
        assert feed(scheduler, f"d{number}", {2: broken}, diverges=True) == TrialScheduler.STOP
    assert all(math.isfinite(value) for values in scheduler.recorded().values() for value in values)
    assert feed(scheduler, "t000", {2: 3.0}) == TrialScheduler.CONTINUE
    for number in range(1, 20):
        assert feed(scheduler, f"t{number:03d}", {2: 3.0 - number / 10}) == TrialScheduler.CONTINUE
    assert feed(scheduler, "worse", {2: 3.5}) == TrialScheduler.STOP
    assert feed(scheduler, "broken", {2: broken}) == TrialScheduler.STOP


def test_rungs_hold_the_same_of_diverged_trials_after_a_break() -> None:
    """And whoever reads the reports still sees that they diverged."""
    curves = {"t000": {2: 3.0, 4: math.inf}, "t001": {2: math.nan}, "t002": {2: 2.0, 4: 1.0, 8: math.inf}}
    whole, done = asha(Past()), dict[str, TrialResult]()
    for name, curve in curves.items():
        feed(whole, name, curve, diverges=True)
        reports = [{"steps": steps, "eval_loss": value} for steps, value in curve.items()]
        done[name] = TrialResult(name, Path("/none"), {}, reports=reports, ended=True)
    assert asha(Past(done)).recorded() == whole.recorded()
    assert whole.recorded() == {2: [2.0, 3.0, WORST], 4: [1.0, WORST], 8: [WORST]}
    report = {"steps": 2, "eval_loss": math.inf}
    trial: Any = FakeTrial("id", {TRIAL_KEY: "t003"})
    controller: Any = None
    whole.on_trial_add(controller, trial)
    whole.on_trial_complete(controller, trial, report)
    assert report == {"steps": 2, "eval_loss": math.inf}
