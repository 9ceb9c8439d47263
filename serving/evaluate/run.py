"""An evaluation: every model is asked every row once, many at once, and what they say is counted."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import ABSENT, Fault, InputError, LoraloomError
from serving.evaluate.answers import AnswerFile, Kind
from serving.evaluate.data import MAX_FAULTS, Data, Row
from serving.evaluate.endpoint import Endpoint, Model, RowRefusedError, Settings, connect
from serving.evaluate.intervals import (
    Estimate,
    mean,
    mean_difference,
    perplexity,
    perplexity_difference,
    share,
    share_difference,
)
from serving.evaluate.metrics import SHARES, Floats, Metric, score_rows

Tick = Callable[[int, int], None]
"""Called with the requests that are done and with all of them."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, where and how."""

    url: str
    data: Data
    metrics: tuple[Metric, ...]
    settings: Settings
    out: Path
    """Folder of the answer files."""
    concurrency: int
    """Requests under way at once."""
    api_key: str | None = None

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What has to be asked for the metrics."""
        likelihood: tuple[Kind, ...] = ("likelihood",) if "perplexity" in self.metrics else ()
        answer: tuple[Kind, ...] = ("answer",) if set(self.metrics) - {"perplexity"} else ()
        return answer + likelihood


@dataclass(frozen=True, slots=True)
class Measured:
    """One model's results."""

    model: Model
    estimates: dict[Metric, Estimate]
    differences: dict[Metric, Estimate]
    """To the model that is compared with, over the same rows; empty for that model itself."""
    cut: int
    """Answers that ended for their length."""


@dataclass(frozen=True, slots=True)
class Report:
    """An evaluation's results."""

    data: Data
    models: list[Measured]
    against: str
    """Id of the model that differences are to."""
    asked: int
    """Requests of this run: rows times models times what they are asked, less what was known."""
    kept: int
    """Of which the answers were there from an earlier run."""
    retries: int
    seconds: float

    def of(self, model_id: str) -> Measured:
        """The results of one model."""
        return next(measured for measured in self.models if measured.model.id == model_id)


def plan_faults(metrics: Sequence[Metric], data: Data) -> list[Fault]:
    """Metrics that rows of this format cannot have."""
    if data.format != "text":
        return []
    rule = f"needs rows with a reference (messages, or prompt and completion), but {data.path} has text only"
    return [Fault("--metric", rule, metric) for metric in metrics if metric != "perplexity"]


async def resolve_all(plan: Plan, references: Sequence[str]) -> list[Model]:
    """The models that ``references`` name now, each once.

    Raises:
        InputError, NotFoundError, AskError: see ``Endpoint.resolve``.
    """
    async with connect(plan.url, plan.api_key, plan.settings) as endpoint:
        models: dict[str, Model] = {}
        for reference in references:
            model = await endpoint.resolve(reference)
            models.setdefault(model.id, model)
    return list(models.values())


async def evaluate(plan: Plan, models: Sequence[Model], against: str, tick: Tick = lambda _done, _all: None) -> Report:
    """Ask what is not known yet, and count.

    Args:
        plan: What is measured.
        models: Of ``resolve_all``.
        against: Id of the one that the others are compared with.
        tick: Told of the progress.

    Raises:
        InputError: rows that the server refuses, all of them; what the others were answered is kept.
        AskError: the server answered with another error, not at all, or as another model.
        ConflictError: another evaluation fills one of the files.
    """
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        files = {model.id: stack.enter_context(AnswerFile(plan.out, _identity(plan, model))) for model in models}
        tasks = [task for task in _tasks(plan, models) if not files[task.model.id].has(task.row.line, task.kind)]
        total = len(plan.data.rows) * len(models) * len(plan.kinds)
        work = _Work(tasks, files, total, tick)
        async with connect(plan.url, plan.api_key, plan.settings) as endpoint:
            await _ask_all(work, endpoint, plan.concurrency)
        if work.refused:
            raise InputError(_shorten(sorted(work.refused.items()), plan.data.path))
        measured = _count(plan, models, files, against)
        seconds = time.monotonic() - started
        return Report(plan.data, measured, against, len(tasks), total - len(tasks), endpoint.retries, seconds)


@dataclass(frozen=True, slots=True)
class _Task:
    model: Model
    row: Row
    kind: Kind


@dataclass(slots=True)
class _Work:
    """What is still to be asked, and where what comes goes."""

    tasks: list[_Task]
    files: dict[str, AnswerFile]
    total: int
    tick: Tick
    refused: dict[tuple[int, str], str] = field(default_factory=dict[tuple[int, str], str])
    done: int = 0


def _identity(plan: Plan, model: Model) -> dict[str, Any]:
    """All that an answer depends on, and nothing else: not the metrics, nor where the server is."""
    sampling = plan.settings.sampling | {"max_tokens": plan.settings.max_tokens}
    origin = {"base": model.base, "created": model.created}
    return {"model": model.id, **origin, "data": plan.data.path.name, "sha256": plan.data.sha256, "settings": sampling}


def _tasks(plan: Plan, models: Sequence[Model]) -> Iterator[_Task]:
    """Row by row, so that all models have been asked the same rows wherever it ends."""
    for row in plan.data.rows:
        for model in models:
            for kind in plan.kinds:
                yield _Task(model, row, kind)


async def _ask_all(work: _Work, endpoint: Endpoint, concurrency: int) -> None:
    queue = iter(work.tasks)
    work.done = work.total - len(work.tasks)
    work.tick(work.done, work.total)

    async def worker() -> None:
        for task in queue:
            try:
                ask = endpoint.answer if task.kind == "answer" else endpoint.likelihood
                work.files[task.model.id].add(task.row.line, await ask(task.model, task.row))
            except RowRefusedError as error:
                work.refused[task.row.line, task.model.id] = str(error)
            work.done += 1
            work.tick(work.done, work.total)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(work.tasks))):
                group.create_task(worker())
    except* LoraloomError as errors:
        # The first one ended the rest; what they say is the same.
        raise _first(errors) from None


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _shorten(refused: list[tuple[tuple[int, str], str]], path: Path) -> list[Fault]:
    faults = [Fault(f"{path}: line {line}", f"{rule} ({model})", ABSENT) for (line, model), rule in refused]
    if len(faults) > MAX_FAULTS:
        faults[MAX_FAULTS:] = [Fault("...", f"and {len(faults) - MAX_FAULTS} more", ABSENT)]
    return faults


def _count(plan: Plan, models: Sequence[Model], files: dict[str, AnswerFile], against: str) -> list[Measured]:
    rows: dict[str, dict[Metric, tuple[Floats, ...]]] = {
        model.id: {metric: _values(plan, files[model.id], metric) for metric in plan.metrics} for model in models
    }
    measured: list[Measured] = []
    for model in models:
        estimates: dict[Metric, Estimate] = {
            metric: _estimate(metric, columns) for metric, columns in rows[model.id].items()
        }
        differences: dict[Metric, Estimate] = {}
        if model.id != against:
            differences = {
                metric: _difference(metric, rows[against][metric], columns)
                for metric, columns in rows[model.id].items()
            }
        cut = sum(answer.cut for answer in files[model.id].answers.values()) if "answer" in plan.kinds else 0
        measured.append(Measured(model, estimates, differences, cut))
    return measured


def _values(plan: Plan, file: AnswerFile, metric: Metric) -> tuple[Floats, ...]:
    """One column of rows, or for perplexity two: nats and tokens."""
    if metric == "perplexity":
        found = [file.likelihoods[row.line] for row in plan.data.rows]
        return np.array([each.nats for each in found]), np.array([each.tokens for each in found], np.float64)
    answers = [file.answers[row.line].text for row in plan.data.rows]
    return (score_rows(metric, answers, [row.reference for row in plan.data.rows]),)


def _estimate(metric: Metric, columns: tuple[Floats, ...]) -> Estimate:
    if metric == "perplexity":
        return perplexity(*columns)
    return share(*columns) if metric in SHARES else mean(*columns)


def _difference(metric: Metric, first: tuple[Floats, ...], second: tuple[Floats, ...]) -> Estimate:
    if metric == "perplexity":
        return perplexity_difference((first[0], first[1]), (second[0], second[1]))
    return share_difference(*first, *second) if metric in SHARES else mean_difference(*first, *second)
