"""What fits a device, and what would make more fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tuning.estimate import Case, Estimator, RowShape
from tuning.memory import Device, HostBytes, fits_paged, gib, slots_that_fit
from tuning.spec import SweepSpec

SHORTEST = 64
"""Tokens below which no shorter rows are suggested."""
STEPS = 128
"""Lengths that are told apart: each try takes a tenth of a second."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What fits one device."""

    device: Device
    slots: int
    """Trials at once, with all their optimizer state in the device's memory."""
    paged: bool
    """No trial fits so, but one does while its optimizer's state is paged out during a pass."""
    host: HostBytes
    """With as many slots as run at once, or with one where none fits."""

    @property
    def runs(self) -> int:
        """Trials that run at once."""
        return 1 if self.paged else self.slots


def fit(estimator: Estimator, case: Case, device: Device, most: int | None = None) -> Fit:
    """How many trials like ``case.trial`` fit ``device``, up to ``most`` (default: as many as are of use)."""
    slots = slots_that_fit(lambda count: estimator.host(case, count), device, most or device.most_slots)
    host = estimator.host(case, max(1, slots))
    return Fit(device, slots, slots == 0 and fits_paged(host, device), host)


def smallest(estimator: Estimator, case: Case, slots: int, device: Device) -> int:
    """Bytes below which so many trials do not run, however small their passes are made: the base, their own weights,
    gradients and states (on a GPU those that are not paged out), and a pass of one row of one of them.
    """
    host = estimator.host(case, slots)
    one_row = case.trial.model_copy(update={"batch_size": 1, "eval_batch_size": 1})
    paged = host.paged if device.kind == "gpu" else 0
    return host.resident - paged + min(host.passing, estimator.host(replace(case, trial=one_row), 1).passing)


@dataclass(frozen=True, slots=True)
class Change:
    """Something to do about memory."""

    settings: tuple[str, ...]
    """As `--set` takes them, or in words where a knob is searched."""
    fit: Fit
    """What then fits."""

    def __str__(self) -> str:
        return " and ".join(self.settings)


Step = tuple[tuple[str, ...], Case]
"""Settings, and what they make of a case."""


def changes(estimator: Estimator, spec: SweepSpec, case: Case, device: Device) -> list[Change]:
    """Changes after which more trials fit ``device``, each computed again: single ones, best first; where none of them
    makes even one trial fit, shorter rows; where these do not either, all of them together.
    """
    now = fit(estimator, case, device)
    steps = _steps(spec, case, now.host)
    singles = [Change(settings, fit(estimator, changed, device)) for settings, changed in steps]
    better = sorted((one for one in singles if one.fit.runs > now.runs), key=lambda one: -one.fit.runs)
    if now.runs or better:
        return better
    return _shorter_rows(estimator, case, device) or _chain(estimator, spec, case, device)


def refusal(fit: Fit, changes: Sequence[Change]) -> str:
    """Why a trial does not run on a device, and what would make it: the rule of a fault."""
    is_gpu, usable = fit.device.kind == "gpu", fit.device.usable(1)
    where = f"must fit a {'GPU' if is_gpu else 'node'} of {fit.device.memory_gib:.1f} GiB"
    if not usable:
        taken = "the driver and the kernels of any process" if is_gpu else "the processes of a host and one trial"
        return f"{where}, but nothing does: {taken} take all of it"
    remedy = "; it fits with " + ", or with ".join(map(str, changes)) if changes else "; nothing known makes it fit"
    needed = gib(_least(fit.host, fit.device))
    return (
        f"{where}, of which {gib(usable):.1f} can be used, but its largest trial alone needs {needed:.1f} GiB{remedy}"
    )


def _least(host: HostBytes, device: Device) -> int:
    return host.least if device.kind == "gpu" else host.total


def _steps(spec: SweepSpec, case: Case, host: HostBytes) -> Iterator[Step]:
    trial = case.trial
    if not case.gradient_checkpointing:
        yield ("base.gradient_checkpointing=true",), replace(case, gradient_checkpointing=True)
    if trial.optimizer == "paged_adamw_32bit":
        smaller = trial.model_copy(update={"optimizer": "paged_adamw_8bit"})
        yield (_setting(spec, "optimizer", "paged_adamw_8bit"),), replace(case, trial=smaller)
    if trial.batch_size > 1:
        half = trial.batch_size // 2
        settings = [_setting(spec, "batch_size", half)]
        if trial.batch_size % 2 == 0 and not {"batch_size", "accumulation"} & set(spec.space):
            settings.append(f"train.accumulation={2 * trial.accumulation}")  # the optimizer's steps stay what they are
        smaller = trial.model_copy(update={"batch_size": half, "accumulation": 2 * trial.accumulation})
        yield tuple(settings), replace(case, trial=smaller)
    if trial.eval_batch_size > 1 and host.evaluation == host.passing:
        fewer = max(1, trial.eval_batch_size // 4)
        smaller = trial.model_copy(update={"eval_batch_size": fewer})
        yield (f"train.eval_batch_size={fewer}",), replace(case, trial=smaller)


def _setting(spec: SweepSpec, knob: str, value: object) -> str:
    """How to give ``knob`` a value that is smaller than the largest of the space."""
    if knob not in spec.space:
        return f"train.{knob}={value}"
    return f"space.{knob} up to {value}" if isinstance(value, int) else f"space.{knob} with {value} only"


def _chain(estimator: Estimator, spec: SweepSpec, case: Case, device: Device) -> list[Change]:
    """One change after the other, as long as they help, then shorter rows."""
    settings: dict[str, str] = {}
    now = fit(estimator, case, device, 1)
    while not now.runs:
        for step, changed in _steps(spec, case, now.host):
            then = fit(estimator, changed, device, 1)
            if _least(then.host, device) < _least(now.host, device):
                case, now = changed, then
                settings |= {setting.partition("=")[0].partition(" ")[0]: setting for setting in step}
                break
        else:
            break
    if now.runs:
        return [Change(tuple(settings.values()), now)]
    shorter = _shorter_rows(estimator, case, device)
    return [Change((*settings.values(), *change.settings), change.fit) for change in shorter]


def _shorter_rows(estimator: Estimator, case: Case, device: Device) -> list[Change]:
    """The longest rows with which one trial fits, if there are any, to within 1/STEPS of what they
    are now.
    """
    host = estimator.host(case, 1)
    if _least(host, device) - host.passing >= device.usable(1):
        return []
    longest = max(case.rows.train_tokens, case.rows.eval_tokens)
    step = 8 * max(1, longest // (8 * STEPS))  # batches are padded to a multiple of 8
    change: list[Change] = []
    low, high = -(-SHORTEST // step), (longest - 1) // step
    while low <= high:
        middle = (low + high) // 2
        now = fit(estimator, replace(case, rows=_cut(case.rows, middle * step)), device, 1)
        if now.runs:
            change = [Change((f"data.max_length={middle * step}",), now)]
            low = middle + 1
        else:
            high = middle - 1
    return change


def _cut(rows: RowShape, tokens: int) -> RowShape:
    return replace(
        rows,
        train_tokens=min(rows.train_tokens, tokens),
        train_targets=min(rows.train_targets, tokens - 1),
        eval_tokens=min(rows.eval_tokens, tokens),
        eval_targets=min(rows.eval_targets, tokens - 1),
    )
