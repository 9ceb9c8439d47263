"""Everything about an evaluation that can be wrong before the server is asked, told at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import httpx

from cluster.errors import ABSENT, Fault, InputError
from cluster.storage import writable_folder
from serving.evaluate.data import read_data
from serving.evaluate.endpoint import Settings
from serving.evaluate.metrics import METRICS, Metric
from serving.evaluate.promotion import parse_condition
from serving.evaluate.run import Plan, plan_faults
from serving.evaluate.session import Promotion
from serving.manifest import LATEST, parse_reference

MAX_CONCURRENCY = 1_000


@dataclass(frozen=True, slots=True)
class Request:
    """The command's options, as they were given."""

    models: str
    """References, with commas between them."""
    data: Path
    metrics: tuple[str, ...]
    """Empty for what suits the data: exact_match, or perplexity for rows of text."""
    url: str
    api_key: str | None
    promote_if: str | None
    alias: str
    confident: bool
    settings: Settings
    concurrency: int
    out: Path


def check_request(request: Request) -> tuple[Plan, list[str], Promotion | None]:
    """What is measured, the models' references, and what is promoted.

    Raises:
        InputError: every fault of the options and of the rows.
        NotFoundError: there is no such file of rows.
        MachineError: the file cannot be read, or the folder of answers not be written.
    """
    faults = _option_faults(request)
    references = list(dict.fromkeys(part.strip() for part in request.models.split(",") if part.strip()))
    if not references:
        faults.append(Fault("--models", "must name at least one model", request.models))
    data = None
    try:
        data = read_data(request.data)
    except InputError as error:
        faults += error.faults
    unknown = [metric for metric in request.metrics if metric not in METRICS]
    faults += [Fault("--metric", f"must be one of {', '.join(METRICS)}", metric) for metric in unknown]
    metrics: tuple[Metric, ...] = tuple(metric for metric in METRICS if metric in request.metrics)
    if not request.metrics:
        metrics = ("perplexity",) if data and data.format == "text" else ("exact_match",)
    if data:
        faults += plan_faults(metrics, data)
    promotion = None
    if request.promote_if is not None:
        try:
            condition = parse_condition(request.promote_if, metrics)
            promotion = Promotion(condition, request.alias, request.confident)
        except InputError as error:
            faults += error.faults
    if faults or data is None:
        raise InputError(faults)
    out = writable_folder(str(request.out), "--out")
    plan = Plan(request.url, data, metrics, request.settings, out, request.concurrency, request.api_key)
    return plan, references, promotion


def _option_faults(request: Request) -> list[Fault]:
    faults: list[Fault] = []
    try:
        url = httpx.URL(request.url)
        sound = url.scheme in ("http", "https") and bool(url.host)
    except httpx.InvalidURL:
        sound = False
    if not sound:
        faults.append(Fault("--url", "must be a URL such as http://127.0.0.1:8000/v1", request.url))
    settings = request.settings
    if not (math.isfinite(settings.temperature) and settings.temperature >= 0):
        faults.append(Fault("--temperature", "must be a finite number of at least 0", settings.temperature))
    if settings.max_tokens < 1:
        faults.append(Fault("--max-tokens", "must be at least 1", settings.max_tokens))
    if not 1 <= request.concurrency <= MAX_CONCURRENCY:
        faults.append(Fault("--concurrency", f"must be from 1 to {MAX_CONCURRENCY}", request.concurrency))
    if request.api_key is not None and not (request.api_key.isascii() and request.api_key.isprintable()):
        faults.append(Fault("--api-key", "must be printable ASCII, as it is sent in a header", ABSENT))
    if request.promote_if is None:
        if request.confident:
            faults.append(Fault("--confident", "has no effect without --promote-if", ABSENT))
        return faults
    try:
        named = parse_reference(f"a@{request.alias}").alias
    except InputError:
        named = None
    if named is None or named == LATEST:
        rule = f"must be an alias that can be moved: a-z first, then a-z, 0-9, '.', '_', '-'; {LATEST} moves by itself"
        faults.append(Fault("--alias", rule, request.alias))
    return faults
