"""Which checkpoints a trial has on disk, which of them are whole, and which stay. Needs neither Ray nor torch.

A trial's folder holds ``checkpoint_<steps>/`` folders, each written under another name and renamed when it is whole:

    adapter/        PEFT's files
    trial.json      the trial's configuration
    state.pt        what training goes on from
    metrics.json    the report that belongs to it, and the sizes of all files: a file cut short later is noticed

While a trial runs, its last ``STATES`` checkpoints stay, so that a damaged one can be passed over, and the adapter of
its best one. Once it has ended (``end.json``), only its best adapter stays; and of all trials that have ended, only the
adapters of the best ``search.keep_adapters``. Numbers stay always.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

STATE, ADAPTER, TRIAL, METRICS, END = "state.pt", "adapter", "trial.json", "metrics.json", "end.json"
STATES = 2
"""Checkpoints of a running trial that training could go on from."""
SCRATCH = ".writing-"
"""Prefix of folders that are being written; what is left of one is no checkpoint."""


@dataclass(frozen=True, slots=True)
class Saved:
    """One checkpoint, as far as its files' sizes tell."""

    folder: Path
    report: dict[str, Any]
    has_state: bool
    """Whole enough to go on from."""
    has_adapter: bool
    adapter_is_damaged: bool
    """There is an adapter, but not as it was written; its numbers count for nothing."""

    @property
    def steps(self) -> int:
        """Optimizer steps before it."""
        return int(self.report["steps"])

    def score(self, metric: str) -> float:
        """Its value of ``metric``; infinite where it has none, or where its adapter is damaged."""
        value = self.report.get(metric)
        return float(value) if is_number(value) and not self.adapter_is_damaged else math.inf


def checkpoint_name(steps: int) -> str:
    """The name of the checkpoint after so many steps."""
    return f"checkpoint_{steps:06d}"


def saved(trial: Path) -> list[Saved]:
    """The checkpoints in a trial's folder, oldest first, without those that are being written or deleted."""
    found = [one for folder in trial.glob("checkpoint_*") if (one := _saved(folder)) is not None]
    return sorted(found, key=lambda one: one.steps)


def best(checkpoints: Iterable[Saved], metric: str) -> Saved | None:
    """The checkpoint with the lowest ``metric``, the earlier of equals; None where none has a number."""
    finite = [one for one in checkpoints if math.isfinite(one.score(metric))]
    return min(finite, default=None, key=lambda one: (one.score(metric), one.steps))


def surplus(checkpoints: list[Saved], metric: str, states: int) -> tuple[list[Saved], list[Saved]]:
    """What to delete: whole checkpoints, and those of which only the state goes.

    Args:
        checkpoints: a trial's, oldest first.
        metric: what is minimised.
        states: how many of the last checkpoints that can be gone on from stay as they are.
    """
    resumable = [one for one in checkpoints if one.has_state]
    last = resumable[len(resumable) - min(states, len(resumable)) :]
    champion = best(checkpoints, metric)
    whole = [one for one in checkpoints if one not in last and one is not champion]
    state_only = [champion] if champion is not None and champion not in last else []
    return whole, state_only


def prune(trial: Path, metric: str, states: int = STATES) -> str | None:
    """Delete what ``surplus`` names.

    Returns:
        None, or why not all of it could be deleted: that costs room on the disk, and no result.
    """
    try:
        whole, state_only = surplus(saved(trial), metric, states)
        for one in whole:
            (one.folder / METRICS).unlink(missing_ok=True)  # first: what a crash leaves of the rest is no checkpoint
            shutil.rmtree(one.folder, ignore_errors=True)
        for one in state_only:
            (one.folder / STATE).unlink(missing_ok=True)
    except OSError as error:
        return _undeleted(trial, error)
    return None


def sweep_up(trial: Path) -> None:
    """Delete what a crash left half written or half deleted; only where nobody writes."""
    for path in trial.glob(f"{SCRATCH}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in trial.glob("checkpoint_*"):
        if not (path / METRICS).is_file():
            shutil.rmtree(path, ignore_errors=True)


def end(trial: Path, state: str, metric: str) -> str | None:
    """Mark a trial as ended, for good, and keep only its best adapter; returns what ``prune`` does.

    Raises:
        OSError: the mark could not be written.
    """
    write_text(trial / END, json.dumps({"state": state}) + "\n")
    return prune(trial, metric, states=0)


def ended(trial: Path) -> str | None:
    """How a trial ended; None while it has not."""
    state = (read_object(trial / END) or {}).get("state")
    return state if isinstance(state, str) else None


def losers(scores: Mapping[str, float], keep: int) -> list[str]:
    """The trials that are not among the best ``keep``; ``scores`` are lower for better trials."""
    return sorted(scores, key=lambda name: (scores[name], name))[keep:]


def drop_adapters(trial: Path) -> str | None:
    """Delete a trial's adapters; their numbers stay. Returns None, or why not all could be deleted."""
    try:
        for one in saved(trial):
            gone = one.folder / f"{SCRATCH}{ADAPTER}"
            (one.folder / ADAPTER).rename(gone)  # at once: half an adapter would be a damaged one
            shutil.rmtree(gone, ignore_errors=True)
    except OSError as error:
        return _undeleted(trial, error)
    return None


def file_sizes(folder: Path) -> dict[str, int]:
    """Path below ``folder`` -> bytes, of every file."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step, and have it on the disk."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in ``path``; None where there is none, or only a part of one."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def is_number(value: object) -> TypeGuard[int | float]:
    """True for a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def _undeleted(trial: Path, error: OSError) -> str:
    return f"cannot delete {error.filename or trial}, which is not needed any more: {error.strerror or error}"


def _saved(folder: Path) -> Saved | None:
    report = read_object(folder / METRICS)
    if report is None or not isinstance(report.get("steps"), int):
        return None
    sizes: Any = report.pop("files", {})
    if not isinstance(sizes, dict):
        return None
    wrong = {name for name, size in sizes.items() if _size(folder / name) != size}
    there = (folder / ADAPTER).is_dir()
    damaged = there and any(name.startswith(f"{ADAPTER}/") for name in wrong)
    return Saved(folder, report, STATE in sizes and STATE not in wrong, there and not damaged, damaged)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
