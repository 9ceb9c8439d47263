"""What the comparison page shows, as one JSON document; ``loraloom schema comparison`` prints its JSON Schema.

No number in it is infinite or NaN: JSON has none, so that what is not finite is null.
"""

from __future__ import annotations

from datetime import UTC
from typing import Any, Literal

from tuning.compare.commands import publish_command, reproduce_command, resume_command
from tuning.compare.importance import Importance
from tuning.compare.knobs import ABSENT, Knob, Part, Scalar, knob_value, readable, scalar, sweep_knobs
from tuning.compare.source import Source
from tuning.keep import is_number
from tuning.lock import is_held
from tuning.results import State, Sweep, TrialResult
from tuning.spec import SweepSpec, TrainSpec


class Curve(Part):
    """A trial's reports, oldest first; all lists are equally long."""

    steps: list[int]
    """Optimizer steps."""
    seconds: list[float | None]
    """Time that the trial has been trained for."""
    train_loss: list[float | None]
    eval_loss: list[float | None]
    tokens_per_second: list[float | None]


class TrialView(Part):
    """One trial."""

    name: str
    state: State
    knobs: dict[str, Scalar]
    """By the names in ``SweepView.knobs``; a list of target modules is joined by ``+``."""
    steps: int | None
    """Optimizer steps so far."""
    best_steps: int | None
    """Steps after which the numbers below were measured: those of the best checkpoint."""
    train_loss: float | None
    eval_loss: float | None
    tokens_per_second: float | None
    adapter_parameters: int | None
    curve: Curve
    adapter: str | None
    """Folder of its best checkpoint's adapter; null where there is none, or where it was not kept."""
    config: dict[str, Any]
    """The whole configuration (``tuning.spec.TrialConfig``)."""
    reproduce: str | None
    """A command that trains this trial alone, to the same numbers; null where the sweep was read from a copy."""
    publish: str | None
    """A command that publishes its adapter; null where there is none, or where the sweep was read from a copy."""
    error: str | None


class SweepView(Part):
    """One sweep."""

    id: str
    """Its name among the sweeps of the page, and in the page's addresses."""
    name: str
    folder: str
    state: Literal["running", "finished", "interrupted", "failed"]
    """``interrupted`` too where its driver was killed, on this machine; its trials read ``stopped`` then."""
    last_news_at: str | None
    """When its files were last written, UTC, ISO 8601, where it reads ``running`` and nobody can tell from here whether
    its driver still does: in an object store, in a copy, on a disk that another machine writes to. Else null.
    """
    resume: str | None
    """A command that goes on with it; null unless it was interrupted, or where it was read from a copy."""
    started_at: str
    """UTC, ISO 8601."""
    seconds: float | None
    """Wall time that trials ran, of all runs together."""
    metric: Literal["eval_loss", "train_loss"]
    """What is minimised."""
    planned: int
    """Trials that it has when nothing cuts it short."""
    steps: int
    """Optimizer steps of a trial that is not stopped."""
    knobs: list[Knob]
    shared: dict[str, Any]
    """What all trials have in common, by the names of ``tuning.spec.TrainSpec``."""
    settings: dict[str, Scalar]
    """The base, the data and the seed, by their names in the sweep's file: ``base.model``, ``data.max_length``."""
    measured: dict[str, Scalar]
    """What the metric is measured with, by such names. Losses of sweeps that differ here may not compare."""
    versions: dict[str, str]
    """Packages that results depend on."""
    importance: Importance | None
    """How much each searched knob matters; null while it is not known, or where too few trials have ended."""
    trouble: str | None
    trials: list[TrialView] | None
    """Those that have changed, or all; null: none has."""


class Comparison(Part):
    """What ``data.json`` answers. With ``data.json?after=REVISION``, the revision that was given last, it holds only
    those trials that have changed since, and ``null`` for the trials of a sweep where none has. A revision that the
    server does not know (it was started anew) gets everything, and ``whole`` says so.
    """

    schema_version: Literal[1] = 1
    revision: str
    """To ask with, as ``after``, for what changes after."""
    whole: bool
    """It holds all trials of all sweeps, and what was known before counts for nothing."""
    live: bool
    """More may come: the page asks again."""
    sweeps: list[SweepView]
    troubles: list[str]
    """What cannot be read, and why."""
    left_out: list[str]
    """What is there and is not shown, and why."""


def sweep_view(sweep: Sweep, source: Source) -> SweepView:
    """The view of a sweep that was read from ``source``, without its trials, its importances and its ``id``."""
    spec, record = sweep.spec, sweep.record
    place = readable(source.place)
    news_at = source.news_at() if record.state == "running" and is_held(sweep.folder) is None else None
    return SweepView(
        id="",
        name=readable(record.name),
        folder=place,
        state=record.state,
        last_news_at=news_at and news_at.astimezone(UTC).isoformat(timespec="seconds"),
        resume=resume_command(place) if source.is_local and record.state == "interrupted" else None,
        started_at=record.started_at,
        seconds=_finite(record.seconds),
        metric=spec.search.metric,
        planned=record.trials,
        steps=spec.train.steps,
        knobs=sweep_knobs(sweep),
        shared=_shared(spec),
        settings=_settings(spec),
        measured=measured_with(spec),
        versions=record.versions,
        importance=None,
        trouble=record.trouble,
        trials=None,
    )


def trial_view(sweep: Sweep, trial: TrialResult, source: Source) -> TrialView:
    """The view of one of the sweep's trials; depends on nothing but the spec and the trial."""
    config = trial_config(sweep.spec, trial)
    place = readable(source.place)
    best = trial.best
    last = trial.reports[-1] if trial.reports else {}
    return TrialView(
        name=trial.name,
        state=trial.state,
        knobs={
            name: scalar(value)
            for name in dict.fromkeys([*sweep.spec.space, *trial.knobs])
            if (value := knob_value(name, trial.knobs)) is not ABSENT
        },
        steps=last.get("steps", best.get("steps")),
        best_steps=best.get("steps"),
        train_loss=_finite(best.get("train_loss")),
        eval_loss=_finite(best.get("eval_loss")),
        tokens_per_second=_finite(best.get("tokens_per_second")),
        adapter_parameters=_whole(best.get("adapter_parameters")),
        curve=curve(trial.reports),
        adapter=None if trial.adapter is None else f"{place}/{trial.adapter.relative_to(sweep.folder)}",
        config=config,
        reproduce=reproduce_command(place, sweep.spec, trial.name, config) if source.is_local else None,
        publish=publish_command(place, sweep.spec, trial.name) if source.is_local and trial.adapter else None,
        error=trial.error and readable(trial.error),
    )


def trial_config(spec: SweepSpec, trial: TrialResult) -> dict[str, Any]:
    """The whole configuration of a trial; what its files do not say as far as they do."""
    try:
        config = spec.trial(trial.knobs).model_dump(mode="json", exclude={"alpha_over_rank"})
    except ValueError:  # params.json is damaged
        return {name: scalar(value) for name, value in trial.knobs.items()}
    targets = config["target_modules"]
    config["target_modules"] = readable(targets) if isinstance(targets, str) else [*map(readable, targets)]
    return config


def curve(reports: list[dict[str, Any]]) -> Curve:
    """The reports of one trial. Tune's ``time_total_s`` begins anew in a trial that was started again: here it goes
    on.
    """
    before = last = 0.0
    seconds: list[float | None] = []
    for report in reports:
        time = _finite(report.get("time_total_s"))
        if time is not None:
            if time < last or report.get("iterations_since_restore") == 1:
                before += last
            last = time
        seconds.append(None if time is None else round(before + time, 3))
    return Curve(
        steps=[report["steps"] for report in reports],
        seconds=seconds,
        train_loss=[_finite(report.get("train_loss")) for report in reports],
        eval_loss=[_finite(report.get("eval_loss")) for report in reports],
        tokens_per_second=[_finite(report.get("tokens_per_second")) for report in reports],
    )


def _shared(spec: SweepSpec) -> dict[str, Any]:
    fixed = spec.train.model_dump(mode="json", exclude_none=True)
    return {name: fixed[name] for name in TrainSpec.model_fields if name in fixed and name not in spec.space}


def _settings(spec: SweepSpec) -> dict[str, Scalar]:
    sections = {"base": spec.base, "data": spec.data}
    return {
        f"{section}.{name}": scalar(value)
        for section, model in sections.items()
        for name, value in model.model_dump(mode="json", exclude_none=True).items()
    } | {"search.seed": spec.search.seed}


_FORM = ("format", "loss_on", "max_length", "max_eval_rows")
_TRAINED = ("train", "train_split", "train_config", "train_revision")
_EVALUATED = ("eval", "eval_split", "eval_config", "eval_revision")


def measured_with(spec: SweepSpec) -> dict[str, Scalar]:
    """What decides on a sweep's metric beside its trials, by names as in its file.

    Rows of the evaluation may be rows of their own, or a part of the training's, which the search's seed draws.
    """
    has_own = spec.data.eval is not None
    is_training = spec.search.metric == "train_loss"
    names = (*_FORM, *(_EVALUATED if has_own else ()), *(_TRAINED if is_training or not has_own else ()))
    found = {f"data.{name}": getattr(spec.data, name) for name in names}
    if not has_own:
        found |= {"data.eval_fraction": spec.data.held_out, "search.seed": spec.search.seed}
    found |= {"base.model": spec.base.model, "base.revision": spec.base.revision}
    return {name: scalar(value) for name, value in found.items()}


def _finite(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def _whole(value: Any) -> int | None:
    return int(value) if is_number(value) else None
