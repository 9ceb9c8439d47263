"""The knobs of a sweep as the comparison shows them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from tuning.keep import is_number
from tuning.results import Sweep

Scalar = bool | int | float | str | None
RATIO_OF_A_LOG_SCALE = 8.0
"""Numbers above 0 of which the largest is so many times the smallest are shown on a logarithmic scale."""
ABSENT: Any = object()
"""No value, where null is one."""
LOOKED_FOR = ("rank", "alpha", "target_modules", "learning_rate")
"""Knobs of an adapter that people ask for, searched or not."""


class Part(BaseModel):
    """A part of the document."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null", use_attribute_docstrings=True)


class Knob(Part):
    """A part of a trial's configuration that differs between the sweep's trials, or that people look for first."""

    name: str
    kind: Literal["number", "category"]
    log: bool
    """A logarithmic scale suits its numbers."""
    searched: bool
    """It stands in the sweep's ``space``."""


def sweep_knobs(sweep: Sweep) -> list[Knob]:
    """The knobs of a sweep: those that are searched, then what tells its trials apart all the same."""
    searched = list(sweep.spec.space)
    present = dict.fromkeys(knob for trial in sweep.trials for knob in trial.knobs)
    names = dict.fromkeys([*searched, *(present or LOOKED_FOR)])
    return [_knob(name, sweep, name in searched) for name in names]


def _knob(name: str, sweep: Sweep, searched: bool) -> Knob:
    values = [value for trial in sweep.trials if (value := knob_value(name, trial.knobs)) is not ABSENT]
    domain = sweep.spec.space.get(name)
    if domain is not None and name != "alpha_over_rank":  # null there is the default, a number
        values += domain.examples()
    numbers = [float(value) for value in values if is_number(value) and not isinstance(value, bool)]
    is_numeric = bool(values) and len(numbers) == len(values)
    spreads = is_numeric and min(numbers) > 0 and max(numbers) >= RATIO_OF_A_LOG_SCALE * min(numbers)
    is_log = is_numeric and (spreads or (domain is not None and domain.loguniform is not None))
    return Knob(name=name, kind="number" if is_numeric else "category", log=is_log, searched=searched)


def knob_value(name: str, knobs: dict[str, Any]) -> Any:
    """A knob's value as the search drew it, or ``ABSENT``: of alpha over rank, a trial's own files only tell the
    outcome.
    """
    if name == "alpha_over_rank" and name not in knobs and is_number(knobs.get("alpha")) and knobs.get("rank"):
        return knobs["alpha"] / knobs["rank"]
    return knobs.get(name, ABSENT)


def scalar(value: Any) -> Scalar:
    """A knob's value as a table shows it."""
    if isinstance(value, list):
        return readable("+".join(map(str, value)))
    if isinstance(value, float):
        return value if is_number(value) else None
    if isinstance(value, str):
        return readable(value)
    return value if isinstance(value, bool | int) or value is None else readable(str(value))


def readable(text: str) -> str:
    """Text that JSON can carry: what is no Unicode, as in a folder's name of old, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()
