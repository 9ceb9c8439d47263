"""What a sweep's driver tells Prometheus of its trials, through Ray's metrics (see gauges.py): their latest numbers.

While the sweep runs, the gauges of all its trials stay alive, also of those that have ended or report seldom; after it,
``last_over_time(...[1h])`` finds them, as they were at the end where a Prometheus asks (``gauges.wait_for_scrape``).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any, Self

from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.util.metrics import Gauge

from tuning.gauges import AGAIN_EVERY_S, Repeating
from tuning.keep import is_number
from tuning.results import State, TrialResult
from tuning.trial import TRIAL_KEY

TAGS = ("sweep", "run", "trial", "rank", "alpha", "targets")
NUMBERS = {
    "train_loss": "Mean training loss since the trial's report before",
    "eval_loss": "Evaluation loss of the trial's last report",
    "tokens_per_second": "Training tokens of the trial over the wall time of its passes",
    "steps": "Optimizer steps taken",
}
STATE_TEXT = "1 for the state that the trial is in, 0 for those that it was in"


class TrialGauges(Callback):
    """Follows the trials through Tune's callbacks. As a context manager, keeps their gauges alive in a thread."""

    def __init__(self, sweep: str, run: str, steps: int, done: Iterable[TrialResult] = ()) -> None:
        """``run`` tells sweeps of one name apart (``gauges.run_tag``); ``steps``: those of a whole trial; ``done``:
        trials that ended in earlier runs of the sweep.
        """
        self._sweep, self._run, self._steps = sweep, run, steps
        self._numbers = {name: Gauge(f"loraloom_trial_{name}", text, TAGS) for name, text in NUMBERS.items()}
        self._states = Gauge("loraloom_trial_state", STATE_TEXT, (*TAGS, "state"))
        self._latest: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._keeper = Repeating(AGAIN_EVERY_S, self.set_all)
        for trial in done:
            self._is({TRIAL_KEY: trial.name, **trial.knobs}, trial.state, trial.best)

    def __getstate__(self) -> dict[str, Any]:
        """Empty: Tune pickles its callbacks into the experiment's snapshot."""
        return {}

    def __enter__(self) -> Self:
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._keeper.stop()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial got its resources."""
        self._is(trial.config, "running")

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial reported."""
        self._is(trial.config, "diverged" if result["diverged"] else "running", result)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial came to its end, or was stopped; Tune says `done` of both."""
        result: Mapping[str, Any] = trial.last_result or {}
        ended: State = "finished" if result.get("steps", 0) >= self._steps else "stopped"
        self._is(trial.config, "diverged" if result.get("diverged") else ended)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial failed for good."""
        self._is(trial.config, "failed")

    def settle(self, states: Mapping[str, State]) -> None:
        """How trials ended in the end: of those that Tune stops all at once, it tells nothing."""
        with self._lock:
            for name, row in self._latest.items():
                if name in states:
                    self._set(row, states[name])

    def set_all(self) -> None:
        """Set every trial's gauges again."""
        with self._lock:
            for row in self._latest.values():
                self._set(row, row["state"])

    def _is(self, config: Mapping[str, Any], state: State, result: Mapping[str, Any] | None = None) -> None:
        name = str(config[TRIAL_KEY])
        with self._lock:
            row = self._latest.setdefault(
                name, {"tags": trial_tags(self._sweep, self._run, config), "states": set[str]()}
            )
            row.update({number: result[number] for number in NUMBERS if result and is_number(result.get(number))})
            self._set(row, state)

    def _set(self, row: dict[str, Any], state: State) -> None:
        """Under the lock, or an older state could be told after a newer one."""
        row["state"] = state
        row["states"].add(state)
        tags: dict[str, str] = row["tags"]
        for number, gauge in self._numbers.items():
            if number in row:
                gauge.set(row[number], tags)
        for other in row["states"]:
            self._states.set(float(other == state), {**tags, "state": other})


def trial_tags(sweep: str, run: str, config: Mapping[str, Any]) -> dict[str, str]:
    """The tags of a trial's gauges."""
    targets = config["target_modules"]
    return {
        "sweep": sweep,
        "run": run,
        "trial": str(config[TRIAL_KEY]),
        "rank": str(config["rank"]),
        "alpha": f"{config['alpha']:g}",
        "targets": targets if isinstance(targets, str) else "+".join(targets),
    }
