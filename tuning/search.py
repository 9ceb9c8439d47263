"""From a sweep's ``search`` section to Ray Tune's search algorithm and scheduler, both knowing what earlier runs of the
sweep have found out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from tuning.past import Past, trial_name
from tuning.results import TrialResult
from tuning.space import Domain, Value
from tuning.spec import SchedulerSpec, SweepSpec, TrialConfig
from tuning.trial import TRIAL_KEY

WORST = 1e300
"""What stands for the loss of a trial that diverged among numbers that are computed with: above any that is summed up
from float32.
"""


class PlannedSearch(Searcher):
    """Hands out configurations that were drawn before the sweep started (grid and random)."""

    def __init__(self, trials: Mapping[str, dict[str, Any]]) -> None:
        super().__init__()
        self._trials = [{TRIAL_KEY: name, **knobs} for name, knobs in trials.items()]
        self._next = 0

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The next configuration, or ``FINISHED``."""
        if self._next >= len(self._trials):
            return Searcher.FINISHED
        self._next += 1
        return self._trials[self._next - 1]

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing to learn."""

    def save(self, checkpoint_path: str) -> None:
        """Tune's own snapshot of the experiment calls this; the sweep's folder tells all that a resume needs."""

    def restore(self, checkpoint_path: str) -> None:
        """See ``save``."""


class TPESearch(Searcher):
    """Optuna's TPE, with trials named as in the other searches.

    A proposal depends on the seed, its number and the results so far, and on nothing else that a driver remembers: one
    that was killed is replaced by telling the next the same results. Choices go to Optuna as their places in the list,
    since its categories cannot be lists.

    A trial that diverged counts with an infinite loss, so that the search keeps away from where it was: TPE ranks
    losses and computes nothing with them. One that failed says nothing about its knobs, and TPE never hears of it.
    """

    def __init__(self, spec: SweepSpec, past: Past) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        super().__init__(metric=spec.search.metric, mode="min")
        self._spec, self._metric_name = spec, spec.search.metric
        self._study = optuna.create_study(direction="minimize")
        self._distributions = {knob: _distribution(domain) for knob, domain in spec.space.items()}
        self._numbers: dict[str, int] = {}
        """Tune's id of a trial -> its number in the study."""
        self._best: dict[str, float] = {}
        self._waiting: list[tuple[int, TrialResult]] = []
        self._names = past.new(spec.num_trials)
        for trial in sorted((*past.done.values(), *past.begun.values()), key=lambda trial: trial.name):
            self._tell_of(trial, done=trial.name in past.done)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The next configuration, or ``FINISHED``; first those of trials that were begun."""
        if self._waiting:
            self._numbers[trial_id], trial = self._waiting.pop(0)
            return {TRIAL_KEY: trial.name, **trial.knobs}
        if not self._names:
            return Searcher.FINISHED
        name = self._names.pop(0)
        self._study.sampler = self._sampler(name)
        drawn = self._study.ask(self._distributions)
        self._numbers[trial_id] = drawn.number
        knobs: dict[str, Value] = {}
        for knob, value in drawn.params.items():
            choices = self._spec.space[knob].choice
            knobs[knob] = choices[value] if choices is not None else value
        return {TRIAL_KEY: name, **searched(self._spec, self._spec.trial(knobs))}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Remember a trial's best value: that is what the leaderboard ranks it by."""
        value = _loss(result, self._metric_name)
        if value is not None:
            self._best[trial_id] = min(value, self._best.get(trial_id, value))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna how good it was; a trial without a report has failed."""
        from optuna.trial import TrialState

        if result:
            self.on_trial_result(trial_id, result)
        number = self._numbers.pop(trial_id, None)
        if number is None:
            return
        value = self._best.pop(trial_id, None)
        self._study.tell(number, value, state=TrialState.FAIL if value is None else TrialState.COMPLETE)

    def save(self, checkpoint_path: str) -> None:
        """See ``PlannedSearch.save``."""

    def restore(self, checkpoint_path: str) -> None:
        """See ``PlannedSearch.save``."""

    def _sampler(self, name: str) -> Any:
        from optuna.samplers import TPESampler

        return TPESampler(
            seed=random.Random(f"{self._spec.search.seed} {name}").getrandbits(32),  # noqa: S311 - a search, no secret
            # Warm up on a few random trials, and spread suggestions that are out at the same time.
            n_startup_trials=min(10, max(2, self._spec.num_trials // 3)),
            constant_liar=True,
        )

    def _tell_of(self, trial: TrialResult, *, done: bool) -> None:
        """Enter a trial of an earlier run."""
        from optuna.trial import TrialState, create_trial

        losses = (_loss(report, self._metric_name) for report in trial.reports)
        values = [loss for loss in losses if loss is not None]
        ended = TrialState.COMPLETE if values else TrialState.FAIL
        state = ended if done else TrialState.RUNNING
        self._study.add_trial(
            create_trial(
                state=state,
                value=min(values) if state == TrialState.COMPLETE else None,
                params={knob: _drawn(domain, knob, trial.knobs) for knob, domain in self._spec.space.items()},
                distributions=self._distributions,
            )
        )
        if not done:
            self._waiting.append((self._study.get_trials(deepcopy=False)[-1].number, trial))


class ResumedASHA(AsyncHyperBandScheduler):
    """ASHA over training steps whose rungs hold what earlier runs of the sweep have reported.

    A trial that diverged has the loss ``WORST`` there: between two infinite ones Tune finds no cutoff (it interpolates,
    and their difference is no number), and would stop nobody any more.
    """

    def __init__(self, asha: SchedulerSpec, metric: str, steps: int, past: Past) -> None:
        super().__init__(
            time_attr="steps",
            grace_period=asha.grace_steps,
            reduction_factor=asha.reduction_factor,
            max_t=steps,
        )
        self._past, self._metric_name = past, metric
        for name in past.done:
            self._replay(name, name)

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """A trial comes, perhaps one that was begun before."""
        super().on_trial_add(tune_controller, trial)
        self._replay(str(trial.config[TRIAL_KEY]), trial.trial_id)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Whether a trial goes on after a report."""
        return super().on_trial_result(tune_controller, trial, self._finite(result))

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """A trial's last report counts for those that come after it."""
        super().on_trial_complete(tune_controller, trial, self._finite(result))

    def recorded(self) -> dict[int, list[float]]:
        """Rung -> the values that decide there."""
        return {int(rung): sorted(-reward for reward in rewards.values()) for rung, rewards in self._brackets[0]._rungs}  # noqa: SLF001

    def _replay(self, name: str, trial_id: str) -> None:
        """Enter a trial's earlier reports into the rungs; whom they would stop is decided already."""
        stub: Any = _Named(trial_id)
        for steps, value in self._past.scores(name, self._metric_name).items():
            self._brackets[0].on_result(stub, steps, -_finite(value))

    def _finite(self, result: dict[str, Any]) -> dict[str, Any]:
        """The same report with a number that can be computed with; the one that others read stays as it is."""
        value = _loss(result, self._metric_name)
        return result if value is None else {**result, self._metric_name: _finite(value)}


class _Named:
    """As much of Tune's trial as a bracket asks for."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


def searched(spec: SweepSpec, trial: TrialConfig) -> dict[str, Any]:
    """The part of a trial's configuration that can differ between trials, as Tune is to show it (with alpha
    resolved).
    """
    knobs = ["rank", "alpha", "target_modules", "learning_rate"]
    knobs += [knob for knob in spec.space if knob not in (*knobs, "alpha_over_rank")]
    return {knob: getattr(trial, knob) for knob in knobs}


def make_search(spec: SweepSpec, past: Past) -> Searcher:
    """The search algorithm of ``spec``, for the trials that ``past`` has left."""
    planned = spec.planned()
    if planned is None:
        return TPESearch(spec, past)
    trials = {trial_name(index): searched(spec, trial) for index, trial in enumerate(planned)}
    return PlannedSearch({name: trials[name] for name in past.left(spec.num_trials)})


def make_scheduler(spec: SweepSpec, past: Past) -> TrialScheduler:
    """ASHA over training steps, or first in, first out."""
    search = spec.search
    return ResumedASHA(search.asha, search.metric, spec.train.steps, past) if search.asha else FIFOScheduler()


def _loss(report: Mapping[str, Any], metric: str) -> float | None:
    """A report's value of ``metric``, infinite where the trial diverged; None where it has none."""
    value = report.get(metric)
    if not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else math.inf


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else WORST


def _drawn(domain: Domain, knob: str, knobs: Mapping[str, Any]) -> Any:
    """What Optuna drew for a knob, from what the trial made of it."""
    value = knobs["alpha"] / knobs["rank"] if knob == "alpha_over_rank" else knobs[knob]
    if domain.choice is None:
        return min(max(value, domain.bounds[0]), domain.bounds[1])
    if knob == "alpha_over_rank":
        return min(range(len(domain.choice)), key=lambda index: abs(_ratio(domain.choice, index) - value))
    # An alpha that was left to its default stands as a number in the trial's configuration.
    return domain.choice.index(value if value in domain.choice else None)


def _ratio(choices: list[Value] | None, index: int) -> float:
    """A choice of alpha over the rank; left out it is 2."""
    chosen = choices[index] if choices else None
    return float(chosen) if isinstance(chosen, int | float) else 2.0


def _distribution(domain: Domain) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if domain.choice is not None:
        return CategoricalDistribution(list(range(len(domain.choice))))
    low, high = domain.bounds
    if domain.int_range:
        return IntDistribution(int(low), int(high))
    return FloatDistribution(low, high, log=domain.loguniform is not None)
