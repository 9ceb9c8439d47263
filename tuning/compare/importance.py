"""How much each searched knob matters, and how sure that is.

The method is PED-ANOVA (Watanabe, Bansal and Hutter 2023; https://arxiv.org/abs/2304.10255) as Optuna has it, its
default: how far the distribution of a knob among the best trials is from that among all trials. Shares add up to 1.

From a few dozen trials such numbers are mostly luck. So the trials are drawn anew, with replacement, fifty times
(the bootstrap; Efron 1979, https://doi.org/10.1214/aos/1176344552), and what 90 % of the draws give is told with each
share.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from tuning.compare.knobs import ABSENT, Part, knob_value
from tuning.results import Sweep
from tuning.space import Domain

LEAST_TRIALS = 8
"""Of fewer no share is told: PED-ANOVA compares the best tenth with the rest."""
DRAWS = 50
MOST_TRIALS = 500
"""Of a longer sweep, so many trials, spread evenly over it, are looked at: more than that tell nothing new."""
_LOW, _HIGH = 0.05, 0.95


class Share(Part):
    """One knob's share of what the metric's differences among the best trials come from."""

    knob: str
    share: float
    """Of all that ended, from 0 to 1."""
    low: float
    """A twentieth of the draws gives less; at most the share."""
    high: float
    """A twentieth of the draws gives more; at least the share."""


class Importance(Part):
    """The shares of all searched knobs, largest first."""

    method: str
    trials: int
    """Those that had ended; of more than 500, 500 were looked at."""
    shares: list[Share]


Point = tuple[dict[str, Any], float]
"""What a trial drew for each searched knob, and how it ended."""


def points(sweep: Sweep) -> list[Point]:
    """The trials that ended with a result. One that diverged counts as worse than all others."""
    found: list[Point] = []
    for trial in sorted(sweep.trials, key=lambda trial: trial.name):
        score = trial.score(sweep.metric)
        drawn = {knob: knob_value(knob, trial.knobs) for knob in sweep.spec.space}  # null may be one of the choices
        if trial.state == "diverged":
            score = math.inf
        elif trial.state not in ("finished", "stopped") or not math.isfinite(score):
            continue
        if ABSENT not in drawn.values():
            found.append((drawn, score))
    return found


def importance(
    space: dict[str, Domain], found: Sequence[Point], seed: int = 0, is_wanted: Callable[[], bool] = lambda: True
) -> Importance | None:
    """The shares of the knobs of ``space``, or None where there are too few trials or nothing differs.

    ``is_wanted`` is asked between draws (a tenth of a second); None too where it says no.
    """
    knobs = [knob for knob in space if len({_key(drawn[knob]) for drawn, _ in found}) > 1]
    if len(found) < LEAST_TRIALS or not knobs or len({score for _, score in found}) == 1:
        return None
    trials = _as_trials(space, knobs, _spread(found, MOST_TRIALS))
    whole = _shares(knobs, trials)
    rng = random.Random(seed)  # noqa: S311 - statistics, no secret
    draws: list[dict[str, float]] = []
    for _ in range(DRAWS):
        if not is_wanted():
            return None
        draws.append(_shares(knobs, rng.choices(trials, k=len(trials))))
    shares: list[Share] = []
    for knob in knobs:
        values = sorted(draw[knob] for draw in draws)
        low, high = values[int(_LOW * DRAWS)], values[math.ceil(_HIGH * DRAWS) - 1]
        # The whole is one sample of its own, and may lie just outside.
        share = whole[knob]
        shares.append(Share(knob=knob, share=share, low=min(low, share), high=max(high, share)))
    shares.sort(key=lambda share: -share.share)
    return Importance(method="PED-ANOVA (Optuna)", trials=len(found), shares=shares)


def _as_trials(space: dict[str, Domain], knobs: Sequence[str], found: Sequence[Point]) -> list[Any]:
    """What Optuna takes for trials."""
    from optuna.trial import create_trial

    worst = max((score for _, score in found if math.isfinite(score)), default=0.0)
    codes = {knob: _Code(space[knob], [drawn[knob] for drawn, _ in found]) for knob in knobs}
    distributions: dict[str, Any] = {knob: code.distribution for knob, code in codes.items()}
    return [
        create_trial(
            value=score if math.isfinite(score) else worst + 1.0,  # it only ranks
            params={knob: code.of(drawn[knob]) for knob, code in codes.items()},
            distributions=distributions,
        )
        for drawn, score in found
    ]


def _shares(knobs: Sequence[str], trials: list[Any]) -> dict[str, float]:
    """PED-ANOVA's shares of the ``knobs``; all 0 where no trial is better than another."""
    import optuna

    optuna.logging.set_verbosity(logging.WARNING)
    study = optuna.create_study(direction="minimize")
    study.add_trials(trials)
    shares = optuna.importance.get_param_importances(study, params=list(knobs))
    return {knob: share if math.isfinite(share) else 0.0 for knob, share in shares.items()}


class _Code:
    """How Optuna is told of a knob's values: those of a range as numbers, choices as names, also where they are
    numbers: between two of them there is nothing, and a density over the line would find differences there.
    """

    def __init__(self, domain: Domain, values: Sequence[Any]) -> None:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        self._is_range = domain.choice is None
        if domain.choice is not None:
            self.distribution: Any = CategoricalDistribution(sorted({_key(value) for value in values}))
            return
        low, high = domain.bounds  # a search may round a value to just outside
        low, high = min(low, *values), max(high, *values)
        if domain.int_range:
            self.distribution = IntDistribution(int(low), int(high))
        else:
            self.distribution = FloatDistribution(low, high, log=domain.loguniform is not None)

    def of(self, value: Any) -> Any:
        return value if self._is_range else _key(value)


def _key(value: Any) -> str:
    return json.dumps(value)


def _spread(found: Sequence[Point], most: int) -> Sequence[Point]:
    if len(found) <= most:
        return found
    return [found[index * len(found) // most] for index in range(most)]
