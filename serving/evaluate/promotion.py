"""``--promote-if "exact_match > prod + 0.02"``: the condition, and which model it lets onto the alias.

    condition = metric operator operand
    operator  = ">" | ">=" | "<" | "<="
    operand   = number | model [("+" | "-") number]
    model     = an alias or a version of the adapter, "base", or a reference as in --models

An operator that would promote a worse model (``perplexity > prod``) is refused.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.errors import Fault, InputError
from serving.evaluate.intervals import Estimate
from serving.evaluate.metrics import LOWER_IS_BETTER, METRICS, Metric

WHERE = "--promote-if"
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_NUMBER = r"[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
_CONDITION = re.compile(
    rf"\s*(?P<metric>[a-z0-9_]+)\s*(?P<operator>[<>]=?)\s*"
    rf"(?:(?P<number>{_NUMBER})|(?P<model>[A-Za-z][A-Za-z0-9._@/-]*)(?:\s+(?P<sign>[-+])\s*(?P<margin>{_NUMBER}))?)\s*"
)


@dataclass(frozen=True, slots=True)
class Condition:
    """A parsed condition."""

    metric: Metric
    operator: str
    model: str | None
    """What is compared with: an alias, ``base`` or a reference; None for a number."""
    offset: float
    """Added to the model's value, or the number itself."""

    def __str__(self) -> str:
        if self.model is None:
            return f"{self.metric} {self.operator} {self.offset:g}"
        margin = f" {'-' if self.offset < 0 else '+'} {abs(self.offset):g}" if self.offset else ""
        return f"{self.metric} {self.operator} {self.model}{margin}"

    def met(self, value: float, against: float = 0.0) -> bool:
        """True if ``value`` satisfies it, where the model compared with has ``against``."""
        return OPERATORS[self.operator](value, against + self.offset)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A version that may be promoted."""

    id: str
    own: Estimate
    difference: Estimate | None
    """To the model that is compared with, on the same rows; None where that is a number."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What the condition comes to."""

    winner: str | None
    """Id of the version to promote; None if nothing satisfies the condition."""
    supported: bool
    """True if the winner's interval excludes that the condition is met by chance."""
    reason: str
    """A sentence for people."""


def parse_condition(text: str, metrics: tuple[Metric, ...]) -> Condition:
    """Parse ``text``, whose metric must be among ``metrics``, those that are measured.

    Raises:
        InputError: it is no condition, its metric is not measured, or it would promote the worse.
    """
    found = _CONDITION.fullmatch(text)
    if found is None:
        rule = 'must be a condition such as "exact_match > prod", "f1 >= prod + 0.02" or "perplexity < 3.5"'
        raise InputError([Fault(WHERE, rule, text)])
    name, sign = found["metric"], found["operator"]
    if name not in METRICS or name not in metrics:
        raise InputError([Fault(WHERE, f"its metric must be one of --metric ({', '.join(metrics)})", name)])
    metric = name
    wanted = "<" if metric in LOWER_IS_BETTER else ">"
    if not sign.startswith(wanted):
        better = "lower" if wanted == "<" else "higher"
        raise InputError(
            [Fault(WHERE, f"must use {wanted} or {wanted}=, as {metric} is better where it is {better}", text)]
        )
    if found["model"] is None:
        return Condition(metric, sign, None, float(found["number"]))
    offset = float(found["margin"] or 0) * (-1 if found["sign"] == "-" else 1)
    return Condition(metric, sign, found["model"], offset)


def decide(
    condition: Condition, candidates: Mapping[str, Candidate], against: Estimate | None, *, confident: bool
) -> Decision:
    """The best candidate that satisfies the condition; of equal ones the first.

    Args:
        condition: What must hold.
        candidates: By id, in the order in which they were named.
        against: The value of ``condition.model``; None for a number.
        confident: Leave out candidates whose interval allows for the contrary.
    """
    floor = against.value if against else 0.0
    met = [candidate for candidate in candidates.values() if condition.met(candidate.own.value, floor)]
    chosen = [candidate for candidate in met if not confident or _supported(condition, candidate)]
    if not chosen:
        return Decision(None, supported=False, reason=_why_none(condition, met, floor, against))
    lower = condition.metric in LOWER_IS_BETTER
    best = min(chosen, key=lambda candidate: candidate.own.value if lower else -candidate.own.value)
    supported = _supported(condition, best)
    told = _told(condition, best, floor, against)
    doubt = "" if supported else "; the interval allows for the contrary, more rows would tell"
    return Decision(best.id, supported=supported, reason=f"{told}{doubt}")


def _supported(condition: Condition, candidate: Candidate) -> bool:
    """True if the interval lies wholly on the good side of the margin, or of the number."""
    interval = candidate.difference or candidate.own
    if not interval.excludes(condition.offset):
        return False
    return (
        interval.value < condition.offset if condition.metric in LOWER_IS_BETTER else interval.value > condition.offset
    )


def _told(condition: Condition, candidate: Candidate, floor: float, against: Estimate | None) -> str:
    own = f"{candidate.id} has {condition.metric} {candidate.own.value:.4g}"
    if against is None:
        return f"{own} {_interval(candidate.own)}, against {condition.offset:g}"
    difference = candidate.difference
    apart = f", paired difference {difference.value:+.4g} {_interval(difference)}" if difference else ""
    return f"{own}, {condition.model} {floor:.4g}{apart}"


def _why_none(condition: Condition, met: list[Candidate], floor: float, against: Estimate | None) -> str:
    if not met:
        has = f" ({condition.model} has {floor:.4g})" if against else ""
        return f"no version satisfies {condition}{has}"
    return f"no version satisfies {condition} beyond chance: " + "; ".join(
        _told(condition, candidate, floor, against) for candidate in met
    )


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None or not math.isfinite(estimate.value):
        return "(too few rows for an interval)"
    return f"[{estimate.low:.4g}, {estimate.high:.4g}]"
