"""From references to a promotion: who is evaluated, what is recorded, which version moves onto the alias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cluster.errors import Fault, InputError, NotFoundError
from cluster.signals import run_async
from serving.evaluate.endpoint import BASE, Model
from serving.evaluate.promotion import WHERE, Candidate, Condition, Decision, decide
from serving.evaluate.run import Plan, Report, Tick, evaluate, resolve_all
from serving.registry import Registry
from serving.registry.events import Score


@dataclass(frozen=True, slots=True)
class Promotion:
    """What ``--promote-if`` and its options ask for."""

    condition: Condition
    alias: str
    """The alias that moves, and that is meant where the condition names it."""
    confident: bool
    """Promote only what the interval supports."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it."""

    report: Report
    recorded: tuple[str, ...]
    """Versions whose scores are in the registry now."""
    decision: Decision | None
    """None where no promotion was asked for."""


@dataclass(frozen=True, slots=True)
class _Stakes:
    """Where a promotion stands before anything is measured."""

    name: str
    before: int | None
    """The version that the alias names; None if there is no such alias yet."""
    reference: str | None
    """The model that is compared with; None for a number."""


def run_session(
    plan: Plan, references: Sequence[str], registry: Registry | None, promotion: Promotion | None, tick: Tick
) -> Outcome:
    """Evaluate, record, promote; each step only if the one before it was whole.

    Args:
        plan: What is measured.
        references: The models.
        registry: Where scores are recorded and the alias moves; None records nothing.
        promotion: None promotes nothing; needs ``registry``.
        tick: Told of the progress.

    Raises:
        InputError: references that cannot be compared, versions that the registry does not hold, rows that the server
            refuses.
        NotFoundError: the server has no such model, or the registry no such alias.
        ConflictError: somebody moved the alias meanwhile; the scores are recorded.
        AskError: the server answered with an error, or not at all.
    """
    models = run_async(resolve_all(plan, references))
    if registry:
        registry.refresh()
    stakes = _stakes(registry, models, promotion.condition, promotion.alias) if registry and promotion else None
    against = models[0]
    if stakes and stakes.reference is not None:
        against = run_async(resolve_all(plan, [stakes.reference]))[0]
        if against.id not in {model.id for model in models}:
            models = [against, *models]
    if registry:
        _require_same_versions(registry, models)
    report = run_async(evaluate(plan, models, against.id, tick))
    recorded = _record(registry, report) if registry else ()
    decision = None
    if registry and promotion and stakes:
        decision = _promote(registry, report, promotion, stakes)
    return Outcome(report, recorded, decision)


def _stakes(registry: Registry, models: Sequence[Model], condition: Condition, alias: str) -> _Stakes:
    names = sorted({model.name for model in models if not model.is_base})
    if len(names) != 1:
        rule = f"promotes versions of one adapter, but --models has {' and '.join(names) or 'none'}"
        raise InputError([Fault(WHERE, rule, str(condition))])
    name = names[0]
    aliases = registry.aliases(name)
    before = _single(name, alias, aliases.get(alias))
    if condition.model is None:
        return _Stakes(name, before, None)
    if condition.model in aliases:
        version = _single(name, condition.model, aliases[condition.model])
        return _Stakes(name, before, f"{name}@{version}")
    if condition.model == alias:  # nothing is there to be beaten but the base
        return _Stakes(name, before, BASE)
    return _Stakes(name, before, condition.model)


def _single(name: str, alias: str, target: object) -> int | None:
    """The version that an alias names, where it names one."""
    if target is None or isinstance(target, int):
        return target
    rule = f"cannot compare with {name}@{alias}, which is split by weight: let it name one version first"
    raise InputError([Fault(WHERE, rule, target)])


def _require_same_versions(registry: Registry, models: Sequence[Model]) -> None:
    """Scores belong to what was measured: the versions of the server must be those of the registry."""
    faults: list[Fault] = []
    for model in models:
        if model.is_base:
            continue
        try:
            manifest = registry.resolve(model.id)
        except NotFoundError as error:
            faults.append(Fault("--registry", f"must hold the versions that are evaluated: {error}", model.id))
            continue
        if int(manifest.created_at.timestamp()) != model.created:
            rule = "must be the server's registry, but this version was published at another time there"
            faults.append(Fault("--registry", rule, model.id))
    if faults:
        raise InputError(faults)


def _record(registry: Registry, report: Report) -> tuple[str, ...]:
    at = datetime.now(UTC)
    recorded: list[str] = []
    for measured in report.models:
        scores = {
            metric: Score(
                value=estimate.value,
                low=estimate.low,
                high=estimate.high,
                count=estimate.count,
                data=report.data.path.name,
                data_sha256=report.data.sha256,
                at=at,
            )
            for metric, estimate in measured.estimates.items()
            if math.isfinite(estimate.value)
        }
        if scores and not measured.model.is_base:
            registry.record_scores(measured.model.id, scores)
            recorded.append(measured.model.id)
    return tuple(recorded)


def _promote(registry: Registry, report: Report, promotion: Promotion, stakes: _Stakes) -> Decision:
    condition = promotion.condition
    current = f"{stakes.name}@{stakes.before}"
    candidates = {
        measured.model.id: Candidate(
            measured.model.id,
            measured.estimates[condition.metric],
            measured.differences.get(condition.metric) if stakes.reference is not None else None,
        )
        for measured in report.models
        if not measured.model.is_base
        and measured.model.id != current
        and not (stakes.reference is not None and measured.model.id == report.against)
    }
    against = report.of(report.against).estimates[condition.metric] if stakes.reference is not None else None
    decision = decide(condition, candidates, against, confident=promotion.confident)
    if decision.winner is not None:
        version = int(decision.winner.rpartition("@")[2])
        note = f"{condition}: {decision.reason} ({report.data.path.name}, {len(report.data.rows)} rows)"
        registry.move(stakes.name, promotion.alias, version, note=note, expect=stakes.before)
    return decision
