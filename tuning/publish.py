"""From a sweep's trial to a version in the registry; other adapters: serving/publish.py."""

from __future__ import annotations

from pathlib import Path

from cluster.errors import InputError, NotFoundError
from serving.manifest import Manifest, base_identity
from serving.publish import is_folder
from serving.registry import Registry
from serving.spec import MAX_LORA_RANKS
from tuning.results import COLUMNS, SPEC_FILE, SWEEP_FILE, Sweep, TrialResult


def is_sweep(source: str) -> bool:
    """True if ``source`` is a folder with a sweep's files, damaged or not."""
    return is_folder(source) and any((Path(source) / name).is_file() for name in (SPEC_FILE, SWEEP_FILE))


def publish_trial(
    sweep: Sweep,
    registry: Registry,
    name: str,
    trial: str | None = None,
    max_rank: int | None = None,
    *,
    by: str | None = None,
    note: str | None = None,
) -> Manifest:
    """Publish a trial's best adapter as the next version of ``name``.

    Args:
        sweep: Whose trial it is.
        registry: Where to.
        name: The adapter's name there.
        trial: The winner if left out.
        max_rank: Largest rank to accept; None means the largest that vLLM serves.
        by: Who publishes it; user@host if left out.
        note: Why.

    Raises:
        NotFoundError: no such trial, or it left no adapter.
        InputError: the sweep's base is gone, or the registry's checks refuse it.
        MachineError: the registry cannot be written.
    """
    chosen = sweep.winner if trial is None else sweep.trial(trial)
    if chosen is None:
        raise NotFoundError(f"{sweep.folder}: no trial has left an adapter yet")
    if chosen.adapter is None and chosen.ended and chosen.best and sweep.spec.search.keep_adapters is not None:
        raise NotFoundError(
            f"{sweep.folder}: the adapter of trial {chosen.name} was not kept: it is not among the best "
            f"{sweep.spec.search.keep_adapters} (search.keep_adapters)"
        )
    if chosen.adapter is None:
        raise NotFoundError(f"{sweep.folder}: trial {chosen.name} has left no adapter (it is {chosen.state})")
    # After the trial's faults: these import torch.
    from tuning.check import placed
    from tuning.inspect import outline

    base = sweep.spec.base
    try:
        sites = outline(base).sites
    except InputError as error:
        raise InputError(placed(sweep.spec, error.faults, str(sweep.folder / SPEC_FILE))) from None
    return registry.publish(
        name,
        chosen.adapter,
        base_identity(base.model, base.revision, trust_remote_code=base.trust_remote_code),
        metrics={column: float(chosen.best[column]) for column in COLUMNS if chosen.best.get(column) is not None},
        lineage=_lineage(sweep, chosen, chosen.adapter),
        max_rank=MAX_LORA_RANKS[-1] if max_rank is None else max_rank,
        sites=sites,
        by=by,
        note=note,
    )


def _lineage(sweep: Sweep, trial: TrialResult, adapter: Path) -> dict[str, str | int | float | None]:
    knobs = {key: "+".join(value) if isinstance(value, list) else value for key, value in trial.knobs.items()}
    return {
        "sweep": sweep.record.name,
        "sweep_folder": str(sweep.folder.absolute()),
        "sweep_started_at": sweep.record.started_at,
        "trial": trial.name,
        "checkpoint": adapter.parent.name,
        **knobs,
    }
