"""Check a sweep as a whole before it starts: the base, every trial on it, every row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cluster.errors import ABSENT, Fault, InputError
from cluster.machine import count_gpus, torch_is_for_cpus
from cluster.spec import ClusterSpec
from tuning.engine.base import NO_CHECKPOINTS
from tuning.inspect import BaseOutline, load_tokenizer, outline, trial_faults
from tuning.spec import SweepSpec, TrialConfig
from tuning.suitable import weight_faults
from tuning.tracking import tracking_faults

if TYPE_CHECKING:
    from tuning.engine.data import OnRows, TokenisedData

T = TypeVar("T")


def check_sweep(
    spec: SweepSpec, where: str, on_rows: OnRows | None = None, known: Sequence[Fault] = ()
) -> TokenisedData:
    """All that can be known without loading weights and without processes: the base, every trial on it, every row.

    Args:
        spec: the sweep.
        where: names the spec in messages.
        on_rows: told how many rows are through the tokenizer so far.
        known: faults that have been found already, to be told with the others.

    Returns:
        The rows, tokenised; nothing has been written.

    Raises:
        InputError: all faults together.
    """
    from tuning.engine.data import check_rows, tokenise

    faults = [*known, *tracking_faults(spec.track)]
    data = tokenizer = None
    base = _kept(faults, lambda: outline(spec.base, packing=spec.data.packing))
    if base is not None or (Path(spec.base.model) / "config.json").is_file():
        tokenizer = _kept(faults, lambda: load_tokenizer(spec.base))
        faults += weight_faults(spec.base)
    if base is not None:
        faults += base_faults(spec, base)
    try:
        if tokenizer is None:
            check_rows(spec.data)
        else:
            data = tokenise(spec.data, tokenizer, spec.search.seed, on_rows)
    except InputError as error:
        faults += error.faults
    if faults or data is None:
        raise InputError(placed(spec, faults, where))
    return data


def base_faults(spec: SweepSpec, base: BaseOutline) -> list[Fault]:
    """What the base forbids of the sweep."""
    faults = trial_faults(base, [("space.", trial) for trial in spec.planned() or _corners(spec)])
    if base.max_length is not None and spec.data.max_length > base.max_length:
        rule = f"must be at most {base.max_length}, the base's positions"
        faults.append(Fault("data.max_length", rule, spec.data.max_length))
    if spec.data.packing and base.end_to_end_obstacle:
        rule = f"must be false for this base: {base.end_to_end_obstacle}"
        faults.append(Fault("data.packing", rule, spec.data.packing))
    if spec.base.gradient_checkpointing and not base.has_checkpoints:
        faults.append(Fault("base.gradient_checkpointing", NO_CHECKPOINTS, spec.base.gradient_checkpointing))
    return faults


def gpu_faults(cluster: ClusterSpec) -> list[Fault]:
    """GPUs that a Ray that is started on this machine would hand out, and trials could not use."""
    wanted = cluster.num_gpus
    if cluster.address is not None or wanted == 0:
        return []
    here = count_gpus()
    if wanted is not None and wanted > here:
        rule = f"must be at most {here}, the GPUs of this machine (see loraloom doctor)"
        return [Fault("cluster.num_gpus", rule, wanted)]
    if here and torch_is_for_cpus():
        rule = "must be 0 here: the torch that is installed has no CUDA (see loraloom doctor)"
        return [Fault("cluster.num_gpus", rule, ABSENT if wanted is None else wanted)]
    return []


def placed(spec: SweepSpec, faults: list[Fault], where: str) -> list[Fault]:
    """The faults with the spec's name before each field; a row's place (a path) stands for itself."""
    return [_placed(spec, fault, where) for fault in faults]


def _placed(spec: SweepSpec, fault: Fault, where: str) -> Fault:
    """A knob stands under ``space`` if it is searched, else under ``train``."""
    place = fault.where
    if place.startswith("space.") and place.removeprefix("space.") not in spec.space:
        place = f"train.{place.removeprefix('space.')}"
    is_field = place.startswith(("base.", "data.", "space.", "train.", "resources.", "track.", "cluster."))
    return fault._replace(where=f"{where}: {place}" if is_field else place)


def _corners(spec: SweepSpec) -> list[TrialConfig]:
    """Trials that show every value at the edge of its domain, for a search whose trials are not known beforehand."""
    first = {knob: domain.examples()[0] for knob, domain in spec.space.items()}
    return [spec.trial({**first, knob: value}) for knob, domain in spec.space.items() for value in domain.examples()]


def _kept(faults: list[Fault], work: Callable[[], T]) -> T | None:
    """What ``work`` returns; its faults go to ``faults``."""
    try:
        return work()
    except InputError as error:
        faults += error.faults
        return None
