from __future__ import annotations

import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tuning.gauges as gauges_module
import tuning.trial_gauges as module
from tuning.gauges import Repeating, run_tag, wait_for_scrape
from tuning.results import TrialResult
from tuning.trial_gauges import TrialGauges, trial_tags

CONFIG = {"trial": "t000", "rank": 8, "alpha": 16.0, "target_modules": ["q_proj", "v_proj"], "learning_rate": 1e-4}
TAGS = {"sweep": "s", "run": "out 2026", "trial": "t000", "rank": "8", "alpha": "16", "targets": "q_proj+v_proj"}
Told = dict[tuple[str, str], float]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What Ray was told last, by gauge and state."""
    values: Told = {}

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self._name, self._keys = name.removeprefix("loraloom_trial_"), tag_keys

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert set(tags) == set(self._keys), "Ray refuses other tags"
            assert {key: tags[key] for key in TAGS} == TAGS
            values[self._name, tags.get("state", "")] = value

    monkeypatch.setattr(module, "Gauge", Gauge)
    return values


def trial(**last: Any) -> Any:
    return SimpleNamespace(config=CONFIG, last_result=last)


def report(steps: int, loss: float = 1.0, *, diverged: bool = False) -> dict[str, Any]:
    numbers = {"train_loss": loss, "eval_loss": loss, "tokens_per_second": 5.0}
    return {"steps": steps, "diverged": diverged, "done": True, **numbers}


def test_numbers_and_state_follow_the_trial(told: Told) -> None:
    gauges = TrialGauges("s", "out 2026", steps=10)
    gauges.on_trial_start(0, [], trial())
    assert told == {("state", "running"): 1}
    gauges.on_trial_result(0, [], trial(), report(4, 2.0))
    assert told["eval_loss", ""] == 2.0
    assert told["steps", ""] == 4
    gauges.on_trial_complete(0, [], trial(**report(10)))
    assert (told["state", "running"], told["state", "finished"]) == (0, 1)


def test_a_trial_that_asha_stopped_is_not_finished(told: Told) -> None:
    """Tune says `done` of it too."""
    gauges = TrialGauges("s", "out 2026", steps=10)
    gauges.on_trial_result(0, [], trial(), report(4))
    gauges.on_trial_complete(0, [], trial(**report(4)))
    assert told["state", "stopped"] == 1
    assert ("state", "finished") not in told


def test_a_loss_that_is_not_finite_leaves_the_last_one(told: Told) -> None:
    gauges = TrialGauges("s", "out 2026", steps=10)
    gauges.on_trial_result(0, [], trial(), report(4, 2.0))
    gauges.on_trial_result(0, [], trial(), report(6, float("inf"), diverged=True))
    gauges.on_trial_complete(0, [], trial(**report(6, diverged=True)))
    assert told["eval_loss", ""] == 2.0
    assert (told["state", "running"], told["state", "diverged"]) == (0, 1)


def test_trials_of_earlier_runs_and_those_that_all_ended_at_once(told: Told, tmp_path: Any) -> None:
    knobs = {key: value for key, value in CONFIG.items() if key != "trial"}
    done = TrialResult("t000", tmp_path, knobs, "stopped", best=report(4, 3.0))
    gauges = TrialGauges("s", "out 2026", steps=10, done=[done])
    assert (told["state", "stopped"], told["eval_loss", ""]) == (1, 3.0)
    gauges.on_trial_start(0, [], trial())
    gauges.settle({"t000": "stopped", "t999": "failed"})
    assert (told["state", "running"], told["state", "stopped"]) == (0, 1)
    told.clear()
    gauges.set_all()
    assert told["eval_loss", ""] == 3.0


def test_all_are_set_again_and_again(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AGAIN_EVERY_S", 0.01)
    gauges = TrialGauges("s", "out 2026", steps=10)
    gauges.on_trial_result(0, [], trial(), report(4))
    again = threading.Event()
    monkeypatch.setattr(TrialGauges, "_set", lambda *_: again.set())
    with gauges:
        assert again.wait(10)


def test_one_failure_does_not_end_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    times: list[int] = []
    thrice = threading.Event()

    def work() -> None:
        times.append(1)
        if len(times) >= 3:
            thrice.set()
        raise RuntimeError("no metrics now")

    repeating = Repeating(0.01, work)
    repeating.start()
    assert thrice.wait(10)
    repeating.stop()
    assert len([record for record in caplog.records if "gauges cannot be set" in record.message]) == 1


@pytest.mark.parametrize(("ray_ends", "waits"), [(True, 11.0), (False, 6.0)])
def test_the_end_waits_for_a_prometheus_that_asks_and_for_nobody_else(
    monkeypatch: pytest.MonkeyPatch, ray_ends: bool, waits: float
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(gauges_module.time, "sleep", waited.append)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        here = {"NodeID": "here", "MetricsExportPort": port}
        away = {"NodeID": "away", "MetricsExportPort": 1}
        ray = SimpleNamespace(
            get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "here"),
            nodes=lambda: [here, away],
            _config=SimpleNamespace(metrics_report_interval_ms=lambda: 5000),
        )
        monkeypatch.setattr(gauges_module, "ray", ray)
        wait_for_scrape(ray_ends=ray_ends)
        assert waited == [], "nobody has asked"
        asking = socket.create_connection(("127.0.0.1", port))
        answering, _ = server.accept()
        answering.close()  # as the one who answers does it, who then remembers the connection for a minute
        asking.close()
        wait_for_scrape(ray_ends=ray_ends)
    assert waited == [waits]


def test_tags() -> None:
    assert trial_tags("s", "out 2026", CONFIG) == TAGS
    assert trial_tags("s", "out 2026", {**CONFIG, "target_modules": "all-linear"})["targets"] == "all-linear"


def test_a_run_is_its_folder_and_when_it_began() -> None:
    assert run_tag(Path("/runs/sweeps/demo"), "2026-01-31T09:30:00+00:00") == "demo 2026-01-31T09:30:00"
