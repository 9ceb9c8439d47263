"""The whole of `loraloom estimate`: a sweep's largest trial on a list of devices, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from cluster.errors import Fault, InputError
from cluster.machine import find_gpus
from cluster.schema import is_local
from tuning.check import base_faults, check_sweep, placed
from tuning.engine.counting import ArchitectureError
from tuning.engine.data import OnRows, TokenisedData
from tuning.estimate import Case, Estimator, row_shape
from tuning.fit import Change, Fit, changes, fit
from tuning.inspect import BaseOutline, load_tokenizer, outline
from tuning.memory import GIB, Device, HostBytes
from tuning.spec import SweepSpec

COMMON_GIB = (16.0, 24.0, 40.0, 48.0, 80.0, 141.0)
"""GPUs that many people have."""
PARTS = {
    "weights": "weights in NF4",
    "constants": "their constants",
    "unquantised": "embeddings, experts, ...",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer, paged",
    "activations": "activations",
    "logits": "then logits, ...",
    "layer": "... or a layer's work",
    "evaluation": "or else an evaluation",
    "total": "at most",
}
SHOWN_CHANGES = 3


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a sweep needs, and what fits."""

    base: BaseOutline
    case: Case
    """The largest trial."""
    one: HostBytes
    """A host with one such trial."""
    fits: list[tuple[Fit, list[Change]]]
    """For each device, what fits, and what would make more fit."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; sizes in bytes, but for those of devices."""
        trial = self.case.trial
        return {
            "parameters": self.base.parameters,
            "trial": {
                key: getattr(trial, key)
                for key in ("rank", "target_modules", "batch_size", "optimizer", "dropout", "eval_batch_size")
            },
            "rows": asdict(self.case.rows),
            "gradient_checkpointing": self.case.gradient_checkpointing,
            "one_slot": self.one.as_dict(),
            "devices": [
                {
                    "memory_gib": found.device.memory_gib,
                    "usable_bytes": found.device.usable(max(1, found.slots)),
                    "slots": found.runs,
                    "paged": found.paged,
                    "host": found.host.as_dict(),
                    "changes": [{"settings": one.settings, "slots": one.fit.runs} for one in better],
                }
                for found, better in self.fits
            ],
        }


def forecast(
    spec: SweepSpec, where: str, gpu_memory_gib: float | None = None, on_rows: OnRows | None = None
) -> Forecast:
    """Estimate ``spec`` for a GPU of ``gpu_memory_gib``, else for the smallest of this machine, else for common ones.

    Rows that are here are read, for their length; of others `data.max_length` is taken.

    Raises:
        InputError: the spec, the base and the rows do not fit each other, or the base's memory cannot be counted.
    """
    rows = row_shape(spec.data, _read_rows(spec, where, on_rows))
    here = [gpu.memory_gib for gpu in find_gpus()] if gpu_memory_gib is None else [gpu_memory_gib]
    devices = [Device("gpu", size) for size in ([min(here)] if here else COMMON_GIB)]
    try:
        estimator = Estimator(spec.base, packing=spec.data.packing)
        case = estimator.largest(spec, rows)
        fits = [
            (fit(estimator, case, device), changes(estimator, spec, case, device)[:SHOWN_CHANGES]) for device in devices
        ]
        return Forecast(estimator.outline, case, estimator.host(case, 1), fits)
    except ArchitectureError as error:
        rule = f"must be a base whose memory can be counted without its weights ({error})"
        raise InputError(placed(spec, [Fault("base.model", rule, spec.base.model)], where)) from None


def _read_rows(spec: SweepSpec, where: str, on_rows: OnRows | None) -> TokenisedData | None:
    """The rows, if they and the tokenizer are here; None after a check of the base alone.

    Raises:
        InputError: all faults together.
    """
    sources = [source for source in (spec.data.train, spec.data.eval) if source is not None]
    if all(map(is_local, sources)) and _has_tokenizer(spec):
        return check_sweep(spec, where, on_rows)
    try:
        faults = base_faults(spec, outline(spec.base, packing=spec.data.packing))
    except InputError as error:
        faults = error.faults
    if faults:
        raise InputError(placed(spec, faults, where))
    return None


def _has_tokenizer(spec: SweepSpec) -> bool:
    try:
        load_tokenizer(spec.base)
    except InputError:
        return False
    return True


def forecast_lines(found: Forecast) -> Iterator[str]:
    """What the tables are about."""
    trial, rows = found.case.trial, found.case.rows
    targets = trial.target_modules if isinstance(trial.target_modules, str) else ",".join(trial.target_modules)
    in_nf4 = sum(outputs * inputs for outputs, inputs in found.base.sites.values())
    yield f"base   {found.base.parameters:,} parameters, {in_nf4:,} of them in NF4, {found.base.model_type}"
    yield (
        f"trial  the largest: rank {trial.rank} on {targets}, {trial.batch_size} rows of {rows.train_tokens:,} tokens "
        f"(by {rows.source}), {trial.optimizer}, gradient checkpointing "
        f"{'on' if found.case.gradient_checkpointing else 'off'}"
    )


def parts_table(found: Forecast) -> Table:
    """GiB, or MiB of a small base, of each part, for one slot and for as many as fit each device."""
    hosts = {1: found.one} | {fit.host.slots: fit.host for fit, _ in found.fits}
    unit, size_of = ("GiB", GIB) if found.one.total >= GIB else ("MiB", GIB >> 10)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(unit)
    for slots in sorted(hosts):
        table.add_column(f"{slots} slot{'s' if slots > 1 else ''}", justify="right", no_wrap=True)
    for part, words in PARTS.items():
        sizes = (getattr(hosts[slots], part) / size_of for slots in sorted(hosts))
        table.add_row(words, *(f"{size:.2f}" for size in sizes), style="bold" if part == "total" else None)
    return table


def devices_table(fits: Sequence[tuple[Fit, list[Change]]]) -> Table:
    """Slots for each device, and what would make more fit."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("GPU GiB", "slots", "uses GiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("slots with")
    for found, better in fits:
        uses = f"{(found.host.least if found.paged else found.host.total) / GIB:.1f}"
        words = "; ".join(f"{one.fit.runs} with {one}" for one in better)
        if found.paged:
            words = "; ".join(filter(None, ["only with its optimizer paged out to the machine's memory", words]))
        elif not found.slots and not better:
            words = "nothing known makes one fit"
        table.add_row(f"{found.device.memory_gib:g}", str(found.runs), uses, words)
    return table
