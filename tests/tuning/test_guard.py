from __future__ import annotations

from typing import Any

import pytest
from ray.tune import Callback
from ray.tune.callback import CallbackList

import tuning.guard as module
from tuning.guard import Guarded


class Tracker(Callback):
    """Fails at its third report."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def setup(self, *arguments: Any, **info: Any) -> None:
        self.heard.append("setup")

    def on_trial_result(self, *arguments: Any, **info: Any) -> None:
        self.heard.append("result")
        if self.heard.count("result") == 3:
            raise ConnectionError("the server has gone\nand more of it")

    def on_trial_complete(self, *arguments: Any, **info: Any) -> None:
        self.heard.append("complete")

    def on_experiment_end(self, *arguments: Any, **info: Any) -> None:
        self.heard.append("end")


def test_what_fails_is_told_once_and_called_no_more() -> None:
    told: list[str] = []
    tracker = Tracker()
    tune: Any = CallbackList([Guarded("track.mlflow", lambda: tracker, told.append)])
    tune.setup(stop=None, num_samples=3, total_num_samples=3)
    about: dict[str, Any] = {"iteration": 0, "trials": [], "trial": None}
    for _ in range(4):
        tune.on_trial_result(**about, result={})
    tune.on_trial_complete(**about)
    tune.on_experiment_end(trials=[])
    assert tracker.heard == ["setup", "result", "result", "result"]
    assert told == [
        "track.mlflow is left out from here on, and the sweep goes on: ConnectionError: the server has gone"
    ]


def test_every_hook_of_tune_reaches_the_callback() -> None:
    """Of hooks that a later Ray adds, this test tells."""
    hooks = {name for name in vars(Callback) if name == "setup" or name.startswith("on_")}
    assert hooks <= set(vars(Guarded))
    heard: list[str] = []

    class Everything(Callback):
        def __getattribute__(self, name: str) -> Any:
            return lambda *arguments, **info: heard.append(name)  # pyright: ignore[reportUnknownLambdaType]

    guarded = Guarded("track.x", Everything, pytest.fail)
    guarded.setup()
    for hook in sorted(hooks - {"setup"}):
        getattr(guarded, hook)(trial=None)
    assert heard == ["setup", *sorted(hooks - {"setup"})]


def test_what_cannot_be_made_is_told() -> None:
    told: list[str] = []

    def make() -> Callback:
        raise ImportError("no protobuf")

    guarded: Any = Guarded("track.wandb", make, told.append)
    guarded.setup()
    guarded.on_trial_start(iteration=0, trials=[], trial=None)
    assert [text.partition(": ")[2] for text in told] == ["ImportError: no protobuf"]


def test_what_takes_too_long_holds_up_the_sweep_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_S", -1.0)
    told: list[str] = []
    tracker = Tracker()
    guarded: Any = Guarded("track.mlflow", lambda: tracker, told.append)
    guarded.setup()
    assert not told, "it is set up once"
    for _ in range(2):
        guarded.on_trial_result(result={})
    assert tracker.heard == ["setup", "result"]
    assert "it took 0 s over one report" in told[0]
