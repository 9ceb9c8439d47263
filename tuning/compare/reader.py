"""Sweeps' folders as the comparison reads them, again and again: a trial's files are read when they have changed."""

from __future__ import annotations

import itertools
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cluster.errors import LoraloomError
from tuning.compare.document import Comparison, SweepView, TrialView, sweep_view, trial_view
from tuning.compare.importance import LEAST_TRIALS, Importance, Point, importance, points
from tuning.compare.knobs import readable
from tuning.compare.source import Shelf, Source
from tuning.keep import ADAPTER
from tuning.lock import is_held
from tuning.results import State, Sweep, TrialResult, read_sweep, read_trial

Signature = tuple[tuple[str, int, int], ...]
WEIGH_EVERY_S = 60.0
"""Importances of a sweep that runs are computed again no more often,"""
WEIGH_AT_GROWTH = 1.1
"""but for so many times the ended trials that there were."""
_LONGEST = 16
"""Digits of a number that may be one of ours."""


class SweepReader:
    """Reads one sweep again and again, and knows what has changed since it was read before."""

    def __init__(self, source: Source, count: Iterator[int]) -> None:
        """``count`` numbers the changes of all sweeps together."""
        self.source = source
        self._count = count
        self._changes: dict[str, int] = {}
        """By trial: the number of its last change."""
        self._sweep: Sweep | None = None
        self._seen: dict[Path, tuple[tuple[Signature, bool, State | None], TrialResult]] = {}
        self._head: tuple[Signature, ...] = ()
        self._now: dict[Path, Signature] = {}
        """Those of the trials as they were when this was last looked at, which is before they are read."""
        self._view: tuple[Sweep, SweepView] | None = None
        self._trial_views: dict[str, tuple[TrialResult, TrialView]] = {}

    def read(self) -> tuple[Sweep, bool]:
        """The sweep as it is now, and whether trials have gone that were there before.

        Raises:
            LoraloomError: it is no sweep, or cannot be read.
        """
        folder = self.source.folder
        self._now = {path.parent: _trial_signature(path.parent) for path in sorted(folder.glob("t*/params.json"))}
        head = (_signature(folder), *self._now.values())
        if self._sweep is not None and head == self._head and not self._was_killed():
            return self._sweep, False
        before = {trial.name: trial for trial in self._sweep.trials} if self._sweep else {}
        sweep = read_sweep(folder, self._read_trial)
        self._sweep, self._head = sweep, head
        number = next(self._count)
        for trial in sweep.trials:
            if before.get(trial.name) is not trial:
                self._changes[trial.name] = number
        gone = before.keys() - {trial.name for trial in sweep.trials}
        for name in gone:
            del self._changes[name]
            self._trial_views.pop(name, None)
        self._seen = {path: seen for path, seen in self._seen.items() if path.name not in gone}
        return sweep, bool(gone)

    def _was_killed(self) -> bool:
        """A driver that is killed changes no file."""
        return (
            self._sweep is not None and self._sweep.record.state == "running" and is_held(self.source.folder) is False
        )

    def view(self, sweep: Sweep, identifier: str, after: int, importance: Importance | None) -> SweepView:
        """What the page is told of the ``sweep`` that was read last: the trials that changed after a number."""
        if self._view is None or self._view[0] is not sweep:
            self._view = sweep, sweep_view(sweep, self.source)
        changed = [trial for trial in sweep.trials if self._changes[trial.name] > after]
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
        # One that has come since it was looked at has no signature yet, and is read again the next time.
        state = (self._now.get(folder, ()), over, told)
        known = self._seen.get(folder)
        if known is not None and known[0] == state:
            return known[1]
        trial = read_trial(folder, metric, steps, over=over, told=told)
        self._seen[folder] = state, trial
        return trial


def _trial_signature(folder: Path) -> Signature:
    """That of a trial's folder, of its checkpoints and of their adapters: what ``keep.saved`` looks at."""
    own = _signature(folder)
    checkpoints = [folder / name for name, _, _ in own if name.startswith("checkpoint_")]
    return (*own, *(entry for path in checkpoints for entry in (*_signature(path), *_signature(path / ADAPTER))))


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
    moment later, and then told of as a whole.
    """

    def __init__(self, shelves: Sequence[Shelf], *, live: bool = True, fresh_s: float = 0.0) -> None:
        """``fresh_s``: what was read so lately is not looked at again, whoever asks."""
        self._shelves = shelves
        self._live, self._fresh_s = live, fresh_s
        self._epoch = _new_epoch()
        self._count = itertools.count(1)
        self._readers: dict[str, SweepReader] = {}
        self._names: dict[str, str] = {}
        """By place: its name in the document, given once: a page keeps trials by it."""
        self._read: dict[str, Sweep] = {}
        self._troubles: list[LoraloomError] = []
        self._left_out: list[str] = []
        self._read_at: float | None = None
        self._lock = threading.Lock()
        self._weigher = _Weigher()

    @property
    def troubles(self) -> list[LoraloomError]:
        """Why sweeps, or folders of them, could not be read for the last document."""
        return self._troubles

    def close(self) -> None:
        """Compute no more importances; what waits for one gets none. May be called again."""
        self._weigher.close()

    def document(self, after: str | None = None, *, wait: bool = False) -> Comparison:
        """The document, or what has changed ``after`` a revision; ``wait`` for what takes seconds to compute."""
        with self._lock:
            now = time.monotonic()
            if self._read_at is None or now - self._read_at >= self._fresh_s:
                self._read_all()
                self._read_at = time.monotonic()
            known = self._known(after)
            number = next(self._count)
            views: list[SweepView] = []
            troubles = [str(trouble) for trouble in self._troubles]
            for place, name in self._names.items():
                if (sweep := self._read.get(place)) is not None:
                    weighed, trouble = self._weigher.importance(place, sweep, wait=wait)
                    troubles += [trouble] if trouble else []
                    views.append(self._readers[place].view(sweep, readable(name), known, weighed))
            return Comparison(
                revision=f"{self._epoch}-{number}",
                whole=known == 0,
                live=self._live,
                sweeps=views,
                troubles=[readable(trouble) for trouble in troubles],
                left_out=[readable(text) for text in self._left_out],
            )

    def _read_all(self) -> None:
        """Look which sweeps there are, and read them."""
        self._troubles = self._find()
        self._read = {}
        for place, reader in self._readers.items():
            try:
                self._read[place], has_lost = reader.read()
            except LoraloomError as error:
                self._troubles.append(error)
            except (OSError, ValueError, TypeError) as error:  # files that nobody foresaw: the others are shown
                self._troubles.append(LoraloomError(f"{place}: cannot be shown ({type(error).__name__}: {error})"))
            else:
                if has_lost:
                    self._epoch = _new_epoch()
                continue
            self._readers[place] = SweepReader(reader.source, self._count)  # when it is back, it is told of as a whole

    def _find(self) -> list[LoraloomError]:
        """Look which sweeps there are; returns why some cannot be told."""
        troubles: list[LoraloomError] = []
        self._left_out = []
        found: dict[str, Source] = {}
        complete = True
        for shelf in self._shelves:
            try:
                found.update((source.place, source) for source in shelf.sources())
                self._left_out += shelf.left_out()
            except LoraloomError as error:
                troubles.append(error)
                complete = False
        if complete and self._readers.keys() - found.keys():
            self._epoch = _new_epoch()  # a sweep is gone: the page begins anew
            self._readers = {place: reader for place, reader in self._readers.items() if place in found}
        for place, source in found.items():
            if place not in self._readers:
                self._readers[place] = SweepReader(source, self._count)
        self._names = sweep_names(list(self._readers), self._names)
        self._weigher.forget_all_but(self._readers)
        return troubles

    def _known(self, after: str | None) -> int:
        """The number of the last change that the page knows; 0 for none."""
        epoch, _, number = (after or "").partition("-")
        return int(number) if epoch == self._epoch and number.isdecimal() and len(number) < _LONGEST else 0


def _new_epoch() -> str:
    return uuid.uuid4().hex[:8]


class _Weigher:
    """Computes importances in a thread of its own: some seconds each, and again as trials end, but not at every one."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="importance")
        self._closed = threading.Event()
        self._weighed: dict[str, _Weighed] = {}

    def importance(self, place: str, sweep: Sweep, *, wait: bool) -> tuple[Importance | None, str | None]:
        """The newest that is known, while the next is computed; and why it cannot be."""
        weighed = self._weighed.get(place)
        if weighed is None or (weighed.sweep is not sweep and weighed.future.done()):
            found = points(sweep)
            if weighed is None or (found != weighed.points and (wait or _is_due(weighed, sweep, found))):
                last = weighed and _outcome(weighed.future)[0]
                weighed = _Weighed(sweep, found, self._start(sweep, found), last, time.monotonic())
            elif found == weighed.points:
                weighed = weighed._replace(sweep=sweep)
            self._weighed[place] = weighed
        if not wait and not weighed.future.done():
            return weighed.last, None
        outcome, trouble = _outcome(weighed.future)
        return outcome, trouble and f"{place}: importances cannot be computed ({trouble})"

    def forget_all_but(self, places: Collection[str]) -> None:
        """Sweeps that have gone need none."""
        for place in self._weighed.keys() - places:
            self._weighed.pop(place).future.cancel()

    def close(self) -> None:
        """Break off what is computed, and what waits for its turn: a program that is to end does not wait for it."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, sweep: Sweep, found: list[Point]) -> Future[Importance | None]:
        if self._closed.is_set():  # a page that still asks while the server ends
            nothing: Future[Importance | None] = Future()
            nothing.set_result(None)
            return nothing
        return self._pool.submit(importance, sweep.spec.space, found, is_wanted=lambda: not self._closed.is_set())


def _is_due(weighed: _Weighed, sweep: Sweep, found: list[Point]) -> bool:
    """Whether other results are worth seconds of a core, on which a sweep that runs here may be training."""
    if sweep.record.state != "running" or time.monotonic() - weighed.asked_at >= WEIGH_EVERY_S:
        return True
    return len(found) >= WEIGH_AT_GROWTH * max(len(weighed.points), LEAST_TRIALS)


def _outcome(future: Future[Importance | None]) -> tuple[Importance | None, str | None]:
    """What was computed; or what Optuna says of values that no search has drawn."""
    try:
        return future.result(), None
    except CancelledError:
        return None, None
    except (ValueError, TypeError) as error:
        return None, str(error)


class _Weighed(NamedTuple):
    """One sweep's importances."""

    sweep: Sweep
    """As it was when they were asked for."""
    points: list[Point]
    future: Future[Importance | None]
    last: Importance | None
    """What is told meanwhile."""
    asked_at: float
    """By the monotonic clock."""


def sweep_names(places: Sequence[str], known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Names for sweeps, by their places, that a page's address can hold: their folders' names; with the folder above
    where that stands twice, and with a number where even that does. Those that are ``known`` stay as they are.
    """
    names = {place: name for place, name in (known or {}).items() if place in places}
    plain = Counter(PurePosixPath(place).name for place in places)
    given = set(names.values())
    for place in places:
        if place in names:
            continue
        path = PurePosixPath(place)
        name = path.name if plain[path.name] == 1 else f"{path.parent.name}/{path.name}"
        unique, number = name, 1
        while unique in given:
            number += 1
            unique = f"{name}-{number}"
        given.add(unique)
        names[place] = unique
    return {place: names[place] for place in places}
