"""From a sweep's ``search`` section to Ray Tune's search algorithm and scheduler."""

from __future__ import annotations

from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from tuning.space import Domain, Value
from tuning.spec import SweepSpec, TrialConfig
from tuning.trial import TRIAL_KEY


def trial_name(index: int) -> str:
    """t000, t001, ...: short enough to type."""
    return f"t{index:03d}"


class PlannedSearch(Searcher):
    """Hands out configurations that were drawn before the sweep started (grid and random)."""

    def __init__(self, trials: list[dict[str, Any]]) -> None:
        super().__init__()
        self._trials = trials
        self._next = 0

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The next configuration, or ``FINISHED``."""
        if self._next >= len(self._trials):
            return Searcher.FINISHED
        self._next += 1
        return {TRIAL_KEY: trial_name(self._next - 1), **self._trials[self._next - 1]}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing to learn."""

    def save(self, checkpoint_path: str) -> None:
        """Tune's own snapshot of the experiment calls this; the sweep folder's sweep.yaml makes the same plan again."""

    def restore(self, checkpoint_path: str) -> None:
        """See ``save``."""


class TPESearch(OptunaSearch):
    """Optuna's TPE through Ray Tune, with trials named as in the other searches.

    Choices go to Optuna as their places in the list, since its categories cannot be lists.
    """

    def __init__(self, spec: SweepSpec) -> None:
        from optuna.samplers import TPESampler

        self._spec = spec
        self._suggested = 0
        super().__init__(
            space={knob: _distribution(domain) for knob, domain in spec.space.items()},
            metric=spec.search.metric,
            mode="min",
            # Warm up on a few random trials, and spread suggestions that are out at the same time.
            sampler=TPESampler(
                seed=spec.search.seed, n_startup_trials=min(10, max(2, spec.num_trials // 3)), constant_liar=True
            ),
        )

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next configuration."""
        drawn = super().suggest(trial_id)
        if drawn is None:
            return None
        self._suggested += 1
        knobs: dict[str, Value] = {}
        for knob, value in drawn.items():
            choices = self._spec.space[knob].choice
            knobs[knob] = choices[value] if choices is not None else value
        return {TRIAL_KEY: trial_name(self._suggested - 1), **searched(self._spec, self._spec.trial(knobs))}


def searched(spec: SweepSpec, trial: TrialConfig) -> dict[str, Any]:
    """The part of a trial's configuration that can differ between trials, as Tune is to show it (with alpha
    resolved).
    """
    knobs = ["rank", "alpha", "target_modules", "learning_rate"]
    knobs += [knob for knob in spec.space if knob not in (*knobs, "alpha_over_rank")]
    return {knob: getattr(trial, knob) for knob in knobs}


def make_search(spec: SweepSpec) -> Searcher:
    """The search algorithm of ``spec``."""
    planned = spec.planned()
    if planned is None:
        return TPESearch(spec)
    return PlannedSearch([searched(spec, trial) for trial in planned])


def make_scheduler(spec: SweepSpec) -> TrialScheduler:
    """ASHA over training steps, or first in, first out."""
    asha = spec.search.asha
    if asha is None:
        return FIFOScheduler()
    return AsyncHyperBandScheduler(
        time_attr="steps",
        grace_period=asha.grace_steps,
        reduction_factor=asha.reduction_factor,
        max_t=spec.train.steps,
    )


def _distribution(domain: Domain) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if domain.choice is not None:
        return CategoricalDistribution(list(range(len(domain.choice))))
    low, high = domain.bounds
    if domain.int_range:
        return IntDistribution(int(low), int(high))
    return FloatDistribution(low, high, log=domain.loguniform is not None)
