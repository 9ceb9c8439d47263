"""Sweeps' folders as the comparison reads them, again and again: a trial's files are read when they have changed."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cluster.errors import LoraloomError
from tuning.compare.document import Comparison, SweepView, TrialView, sweep_view, trial_view
from tuning.compare.importance import Importance, Point, importance, points
from tuning.compare.source import Shelf, Source
from tuning.results import State, Sweep, TrialResult, read_sweep, read_trial

Signature = tuple[tuple[str, int, int], ...]


class SweepReader:
    """Reads one sweep, and knows what has changed since it was read before."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.revision = 0
        """Grows whenever anything changes."""
        self.revisions: dict[str, int] = {}
        """By trial: the revision in which it changed last."""
        self.sweep: Sweep | None = None
        self._seen: dict[Path, tuple[tuple[Signature, bool, State | None], TrialResult]] = {}
        self._head: tuple[Signature, ...] = ()
        self._view: tuple[Sweep, SweepView] | None = None
        self._trial_views: dict[str, tuple[TrialResult, TrialView]] = {}

    def read(self) -> Sweep:
        """The sweep as it is now.

        Raises:
            LoraloomError: it is no sweep, or cannot be read.
        """
        folder = self.source.folder
        head = (_signature(folder), *(_signature(path.parent) for path in sorted(folder.glob("t*/params.json"))))
        if self.sweep is not None and head == self._head:
            return self.sweep
        before = {trial.name: trial for trial in self.sweep.trials} if self.sweep else {}
        self.sweep = sweep = read_sweep(folder, self._read_trial)
        self._head = head
        self.revision += 1
        for trial in sweep.trials:
            if before.get(trial.name) is not trial:
                self.revisions[trial.name] = self.revision
        return sweep

    def view(self, sweep: Sweep, identifier: str, after: int, importance: Importance | None) -> SweepView:
        """What the page is told of the ``sweep`` that was read last: the trials that have changed after a revision."""
        if self._view is None or self._view[0] is not sweep:
            self._view = sweep, sweep_view(sweep, self.source)
        changed = [trial for trial in sweep.trials if self.revisions[trial.name] > after]
        trials = None if after and not changed else [self._trial_view(sweep, trial) for trial in changed]
        return self._view[1].model_copy(update={"id": identifier, "importance": importance, "trials": trials})

    def _trial_view(self, sweep: Sweep, trial: TrialResult) -> TrialView:
        known, view = self._trial_views.get(trial.name, (None, None))
        if known is not trial or view is None:
            view = trial_view(sweep, trial, self.source)
            self._trial_views[trial.name] = trial, view
        return view

    def _read_trial(
        self, folder: Path, metric: str, steps: int, *, over: bool, told: State | None = None
    ) -> TrialResult:
        state = (_signature(folder), over, told)
        known = self._seen.get(folder)
        if known is not None and known[0] == state:
            return known[1]
        trial = read_trial(folder, metric, steps, over=over, told=told)
        self._seen[folder] = state, trial
        return trial


def _signature(folder: Path) -> Signature:
    """What changes when a file of the folder is written, renamed or removed: names, times, sizes."""
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.stat()) for entry in entries]
    except OSError:
        return ()
    return tuple(sorted((name, stat.st_mtime_ns, stat.st_size) for name, stat in found))


class Comparer:
    """Makes the page's document of the sweeps on ``shelves``; may be called from several threads.

    What cannot be read is told of in ``troubles`` and looked for again each time: a sweep that is being made is there a
    moment later.
    """

    def __init__(self, shelves: Sequence[Shelf], *, live: bool = True) -> None:
        self._shelves = shelves
        self._live = live
        self._epoch = _new_epoch()
        self._readers: dict[str, SweepReader] = {}
        self._lock = threading.Lock()
        self._weigher = _Weigher()

    def document(self, after: str | None = None, *, wait: bool = False) -> Comparison:
        """The document, or what has changed ``after`` a revision; ``wait`` for what takes seconds to compute."""
        with self._lock:
            troubles = self._find()
            known = self._parse(after)
            views: list[SweepView] = []
            names = unique_names([PurePosixPath(place).name for place in self._readers])
            for name, (place, reader) in zip(names, self._readers.items(), strict=True):
                try:
                    sweep = reader.read()
                except LoraloomError as error:
                    troubles.append(str(error))
                    continue
                weighed = self._weigher.importance(place, sweep, wait=wait)
                views.append(reader.view(sweep, name, 0 if known is None else known.get(place, 0), weighed))
            return Comparison(
                revision=self._revision(), whole=known is None, live=self._live, sweeps=views, troubles=troubles
            )

    def _find(self) -> list[str]:
        """Look which sweeps there are; returns why some cannot be told."""
        troubles: list[str] = []
        found: dict[str, Source] = {}
        complete = True
        for shelf in self._shelves:
            try:
                found.update((source.place, source) for source in shelf.sources())
            except LoraloomError as error:
                troubles.append(str(error))
                complete = False
        if complete and self._readers.keys() - found.keys():
            self._epoch = _new_epoch()  # a sweep is gone: the page begins anew
            self._readers = {place: reader for place, reader in self._readers.items() if place in found}
        for place, source in found.items():
            if place not in self._readers:
                self._readers[place] = SweepReader(source)
        return troubles

    def _revision(self) -> str:
        return "-".join([self._epoch, *(str(reader.revision) for reader in self._readers.values())])

    def _parse(self, after: str | None) -> dict[str, int] | None:
        """What the page knows: the revision of each sweep; None for nothing."""
        epoch, *numbers = (after or "").split("-")
        if epoch != self._epoch or len(numbers) > len(self._readers) or not all(map(str.isdecimal, numbers)):
            return None
        return dict(zip(self._readers, map(int, numbers), strict=False))


def _new_epoch() -> str:
    return uuid.uuid4().hex[:8]


class _Weigher:
    """Computes importances in a thread of its own: some seconds each, and again as trials end."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="importance")
        self._weighed: dict[str, _Weighed] = {}

    def importance(self, place: str, sweep: Sweep, *, wait: bool) -> Importance | None:
        """The newest that is known, while the next is computed."""
        weighed = self._weighed.get(place)
        if weighed is None or (weighed.sweep is not sweep and weighed.future.done()):
            found = points(sweep)
            if weighed is None or found != weighed.points:
                last = weighed and weighed.future.result()
                weighed = _Weighed(sweep, found, self._pool.submit(importance, sweep.spec.space, found), last)
            else:
                weighed = weighed._replace(sweep=sweep)
            self._weighed[place] = weighed
        return weighed.future.result() if wait or weighed.future.done() else weighed.last


class _Weighed(NamedTuple):
    """One sweep's importances."""

    sweep: Sweep
    """As it was when they were asked for."""
    points: list[Point]
    future: Future[Importance | None]
    last: Importance | None
    """What is told meanwhile."""


def unique_names(names: Sequence[str]) -> list[str]:
    """The same names, those that stand twice with a number behind them."""
    given: set[str] = set()
    result: list[str] = []
    for name in names:
        unique, number = name, 1
        while unique in given:
            number += 1
            unique = f"{name}-{number}"
        given.add(unique)
        result.append(unique)
    return result
