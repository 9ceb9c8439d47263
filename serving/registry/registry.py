"""The registry: published adapters, their versions, aliases and scores, in a folder or in an object store.

**Contract.** Everything that happens is an event of a log (``log.py``); the files of a version are put in place
before the event that publishes them, and never change. ``publish``, ``move``, ``rollback``, ``remove``,
``record_scores`` and ``record_vote`` are atomic: until their event is there nothing has happened, and from then on
everything has. Writers need not know of each other, on one machine or on many: each event is decided on all events
before it. Readers take no lock; ``refresh`` fetches what is new, and all questions are answered from memory as of the
last refresh (or of the last write through the same object). A Registry may be shared by threads, and is opened anew
where it is pickled.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from cluster.errors import Fault, InputError, LoraloomError
from cluster.schema import parse_spec
from cluster.storage import disk_trouble
from serving.manifest import DEFAULT_ALIAS, NAME_RULE, BaseIdentity, Manifest, is_safe_name, parse_reference
from serving.registry import changes
from serving.registry.changes import UNSET, Expected
from serving.registry.events import Entry, Event, Score, State, folder_of
from serving.registry.files import compare, copy_hashed, hash_object, sweep
from serving.registry.log import EventLog
from serving.registry.lookup import entry_of, shelf_of, target_of
from serving.registry.split import AliasTarget, broken_target, normalised, pick, spelled
from serving.registry.store import LocalStore, open_store
from serving.registry.votes import PREFERRED, vote_faults
from serving.weights.checks import CONFIG_FILE, WEIGHTS_FILE, CheckedAdapter, Sites, check_adapter

_PUBLISHED_FILES = (CONFIG_FILE, WEIGHTS_FILE)


class Registry:
    """Published adapters under ``root``; see the head of this file for what is atomic.

    Args:
        root: A folder, which need not exist, or a URI (see ``object_store.py``). Nothing is read before the first
            question.
        reads_first: The first question reads the log. Otherwise only ``refresh`` does (and what writes): no question
            waits for the store, and nothing is there before.

    Raises:
        InputError: ``root`` cannot be a registry.
    """

    def __init__(self, root: str | Path, *, reads_first: bool = True) -> None:
        self._store = open_store(root)
        self.root: str = self._store.where if isinstance(self._store, LocalStore) else str(root)
        """What opens it again: an absolute folder, or the URI with its credentials."""
        self._log = EventLog(self._store, reads_first=reads_first)

    def __reduce__(self) -> tuple[type[Registry], tuple[str]]:
        return Registry, (self.root,)

    @property
    def where(self) -> str:
        """The folder or the URI, without credentials."""
        return self._store.where

    @property
    def damage(self) -> tuple[str, ...]:
        """Events of the log that cannot be read, and why; nothing is written while there are any."""
        return self._log.state.damage

    @property
    def edition(self) -> State:
        """What is known, as a thing that is replaced by another (``is not``) whenever that changes. Reads nothing."""
        return self._log.known

    def exists(self) -> bool:
        """True if there is something to read: the folder, or the bucket.

        Raises:
            InputError: there is no such bucket.
            RegistryUnreachableError: the store does not answer.
        """
        return self._store.exists()

    def refresh(self) -> bool:
        """Fetch the events that have been added; True if there were any. Cheap: one small request if there were none.

        Raises:
            RegistryUnreachableError: the store does not answer; questions are answered as before.
        """
        return self._log.refresh()

    def publish(
        self,
        name: str,
        adapter_dir: Path,
        base: BaseIdentity,
        *,
        metrics: Mapping[str, float],
        lineage: Mapping[str, str | int | float | None],
        max_rank: int | None = None,
        sites: Sites | None = None,
        must_be_new: bool = False,
        by: str | None = None,
        note: str | None = None,
    ) -> Manifest:
        """Check ``adapter_dir`` and publish a copy of it as the next version of ``name``.

        Args:
            name: A safe name; see ``serving.manifest.NAME_RULE``.
            adapter_dir: A LoRA in PEFT's format. Only its configuration and weights are copied.
            base: The base that it was trained on.
            metrics: What was measured on it; finite numbers.
            lineage: Where it comes from.
            max_rank: Largest rank to accept; none if left out.
            sites: The base's linear layers, module path -> (out, in); with them each site's place and shape is checked.
            must_be_new: Publish only where nobody else has published under this name.
            by: Who publishes it; user@host if left out.
            note: Why.

        Raises:
            InputError: every rule that is broken by name, adapter, metrics or lineage. Nothing has been published.
            ConflictError: it ``must_be_new``, and is not.
            MachineError: the registry cannot be made or written.
            RegistryUnreachableError: it does not answer.
        """
        faults = [*([] if is_safe_name(name) else [Fault("name", NAME_RULE, name)]), *changes.text_faults(by, note)]
        checked = None
        try:
            checked = check_adapter(adapter_dir, base, max_rank=max_rank, sites=sites)
        except InputError as error:
            faults += error.faults
        facts = {"metrics": dict(metrics), "lineage": dict(lineage), "created_at": datetime.now(UTC)}
        draft = _draft(name, base, checked, facts, faults)
        self.refresh()  # a store that does not answer is told before anything is copied
        with self._store.scratch() as folder:
            with disk_trouble("the registry", folder if self._is_remote else Path(self.root)):
                files = {file: copy_hashed(adapter_dir / file, folder / file) for file in _PUBLISHED_FILES}
            draft = draft.model_copy(update={"files": files})
            for file in files:
                self._store.upload(folder / file, f"{folder_of(draft)}/{file}")

        manifest = self._log.append(by, note, changes.publish(draft, must_be_new=must_be_new)).manifest
        with contextlib.suppress(LoraloomError):  # it is published, whatever becomes of old files
            self.sweep([name])
        return manifest

    def resolve(self, reference: str, sticky: str | None = None) -> Manifest:
        """The manifest that ``name``, ``name@version`` or ``name@alias`` leads to.

        Args:
            reference: ``name`` alone follows ``prod`` where there is such an alias, else ``latest``.
            sticky: Where the alias splits by weight, the same key gets the same version; without one, chance decides.

        Raises:
            InputError: it is not a reference.
            NotFoundError: there is no such name, version or alias; the message says what there is.
            CorruptAdapterError: it may have been lost with damaged events of the log.
        """
        parsed = parse_reference(reference)
        target = target_of(self._log.state, parsed)
        if not isinstance(target, int):
            chance = random.random()  # noqa: S311 -- a share of traffic, not a secret
            target = pick(target, str(chance) if sticky is None else sticky)
        return self.manifest(parsed.name, target)

    def resolve_one(self, reference: str) -> Manifest:
        """As ``resolve``, for who means one version and not a share of requests.

        Raises:
            InputError: it is not a reference, or its alias splits over several versions.
            NotFoundError, CorruptAdapterError: as ``resolve``.
        """
        parsed = parse_reference(reference)
        target = target_of(self._log.state, parsed)
        if not isinstance(target, int):
            raise InputError([Fault("adapter", f"must be one version; it splits over {spelled(target)}", reference)])
        return self.manifest(parsed.name, target)

    def manifest(self, name: str, version: int) -> Manifest:
        """The manifest of one version.

        Raises:
            NotFoundError: there is no such version.
            CorruptAdapterError: as ``resolve``.
        """
        return self.entry(name, version).manifest

    def entry(self, name: str, version: int) -> Entry:
        """All that is known of one version: its manifest, who published it, when and why, and its scores.

        Raises:
            NotFoundError: there is no such version.
            CorruptAdapterError: as ``resolve``.
        """
        return entry_of(self._log.state, name, version)

    def location(self, manifest: Manifest) -> str:
        """Where the files of a version lie: a folder or a URI, for people."""
        return f"{self.where}/{self._folder(manifest)}"

    def path(self, manifest: Manifest) -> Path:
        """The folder of a version; only for a registry that is a folder itself (``fetch`` makes one of any)."""
        return Path(self.root) / self._folder(manifest)

    def names(self) -> list[str]:
        """All names that have a version, sorted."""
        return sorted(name for name, shelf in self._log.state.shelves.items() if shelf.entries)

    def versions(self, name: str) -> list[int]:
        """The versions of ``name``, ascending; none if there is no such name."""
        return sorted(shelf_of(self._log.state, name).entries)

    def aliases(self, name: str, edition: State | None = None) -> dict[str, AliasTarget]:
        """The aliases of ``name``, ``latest`` with them, and what they point to (in an earlier ``edition``); none if
        there is no such name.
        """
        return shelf_of(self._log.state if edition is None else edition, name).pointing()

    def scores(self, name: str, version: int) -> dict[str, Score]:
        """The scores of one version, by metric.

        Raises:
            NotFoundError: there is no such version.
        """
        return dict(self.entry(name, version).scores)

    def target(self, reference: str) -> AliasTarget:
        """What a reference leads to: a version, or several by weight.

        Raises:
            InputError: it is not a reference.
            NotFoundError: there is no such name, version or alias.
            CorruptAdapterError: as ``resolve``.
        """
        return target_of(self._log.state, parse_reference(reference))

    def history(self, name: str) -> list[Event]:
        """All events of ``name``, oldest first; none if there never was such a name."""
        return list(shelf_of(self._log.state, name).history)

    def move(
        self,
        name: str,
        alias: str,
        target: int | Mapping[int, float],
        *,
        by: str | None = None,
        note: str | None = None,
        expect: Expected = UNSET,
    ) -> Event:
        """Point ``alias`` of ``name`` to a version, or to several by weight; the event that did it.

        An alias that points there already is left alone, and the event that brought it there is returned.

        Args:
            name: The adapter.
            alias: Any alias but ``latest``; made if it is not there.
            target: A version, or version -> weight (finite, above 0; normalised to a sum of 1).
            by: Who moves it; user@host if left out.
            note: Why.
            expect: What it points to now as far as the caller knows, None for nothing: with it, a move that the caller
                has not seen is not overwritten. Left out, the last one to move wins, and the history has both.

        Raises:
            InputError: every rule that is broken.
            NotFoundError: there is no such name or version.
            ConflictError: the alias does not point to what was expected; the message says who moved it when.
            CorruptRegistryError, MachineError, RegistryUnreachableError: the registry cannot be written.
        """
        faults = [*changes.alias_faults(name, alias), *broken_target(target, "target"), *changes.text_faults(by, note)]
        if faults:
            raise InputError(faults)
        try:
            return self._log.append(by, note, changes.move(name, alias, normalised(target), expect))
        except changes.UnchangedError as unchanged:
            return unchanged.event

    def rollback(
        self, name: str, alias: str = DEFAULT_ALIAS, *, by: str | None = None, note: str | None = None
    ) -> Event:
        """Point ``alias`` to what it pointed to before its last move; the event that did it.

        Done again, it goes back further: a rollback undoes a move and is no move itself, so two of them never lead back
        to where they began. Targets of which a version has been removed are passed over.

        Raises:
            InputError: ``alias`` is no alias that can be moved.
            NotFoundError: there is no such name or alias.
            ConflictError: there is nothing to go back to.
            CorruptRegistryError, MachineError, RegistryUnreachableError: the registry cannot be written.
        """
        faults = [*changes.alias_faults(name, alias), *changes.text_faults(by, note)]
        if faults:
            raise InputError(faults)

        return self._log.append(by, note, changes.roll_back(name, alias))

    def remove(self, reference: str, *, force: bool = False, by: str | None = None, note: str | None = None) -> Event:
        """Remove a version (``support@7``), or take an alias away (``support@canary``); the event that did it.

        A removed version cannot be resolved any more, and its number is not given again. Its files stay for a day, for
        servers that are about to load it; see ``sweep``.

        Args:
            reference: What to remove.
            force: Remove a version that aliases point to. They go with it; ``latest`` falls back.
            by: Who removes it; user@host if left out.
            note: Why.

        Raises:
            InputError: the reference names neither a version nor an alias that can be taken away.
            NotFoundError: there is no such version or alias.
            ConflictError: aliases point to it, and ``force`` is not set; they are named.
            CorruptRegistryError, MachineError, RegistryUnreachableError: the registry cannot be written.
        """
        parsed = parse_reference(reference)
        faults = [*changes.removable(parsed), *changes.text_faults(by, note)]
        if faults:
            raise InputError(faults)
        name, version, alias = parsed
        if version is not None:
            return self._log.append(by, note, changes.remove_version(name, version, force))
        return self._log.append(by, note, changes.remove_alias(name, alias or ""))

    def record_scores(
        self, reference: str, scores: Mapping[str, Score], *, by: str | None = None, note: str | None = None
    ) -> Event:
        """Keep ``scores``, metric -> score, with a version; a metric that it has already is replaced.

        Raises:
            InputError: the reference leads to several versions, or there is no score.
            NotFoundError: there is no such version.
            CorruptRegistryError, MachineError, RegistryUnreachableError: the registry cannot be written.
        """
        self.refresh()
        faults = [*changes.text_faults(by, note)]
        if not scores:
            faults.append(Fault("scores", "must hold at least one metric", dict(scores)))
        if PREFERRED in scores:
            faults.append(Fault("scores", f"must not hold {PREFERRED}, which is counted from votes", PREFERRED))
        if faults:
            raise InputError(faults)
        manifest = self.resolve_one(reference)
        return self._log.append(by, note, changes.score(manifest.name, manifest.version, scores))

    def record_vote(
        self, models: Sequence[str], better: str | None, *, by: str | None = None, note: str | None = None
    ) -> Event:
        """Keep what somebody said of answers side by side; it counts for the score ``preferred`` of each version.

        Args:
            models: Whose answers they were: 2 to 6 different versions (``support@7``), one of which may be ``base``.
            better: The one of them whose answer was the best; None where none was.
            by: Who said it; user@host if left out.
            note: Why.

        Raises:
            InputError: it is no vote.
            NotFoundError: one of the versions is not there.
            CorruptRegistryError, MachineError, RegistryUnreachableError: the registry cannot be written.
        """
        faults = [*vote_faults(models, better), *changes.text_faults(by, note)]
        if faults:
            raise InputError(faults)
        return self._log.append(by, note, changes.vote(models, better))

    def verify(self, manifest: Manifest) -> None:
        """Read every file of a version and compare it with the SHA-256 in its manifest.

        Raises:
            CorruptAdapterError: all files that are missing or differ.
            RegistryUnreachableError: the store does not answer.
        """
        compare(manifest, {name: hash_object(self._store, self._key(manifest, name)) for name in manifest.files})

    def fetch(self, manifest: Manifest, folder: Path) -> None:
        """Copy the files of a version into ``folder``, which must be empty, and verify what was copied.

        Raises:
            CorruptAdapterError: all files that are missing or differ.
            RegistryUnreachableError: the store does not answer.
            MachineError: ``folder`` cannot be written.
        """
        with disk_trouble("the copy of an adapter", folder):
            found = {
                name: hash_object(self._store, self._key(manifest, name), folder / name) for name in manifest.files
            }
        compare(manifest, found)

    def sweep(self, names: Iterable[str] | None = None) -> list[str]:
        """Remove the files that no version needs: what a crash left, and what was removed, once they are a day old.

        Args:
            names: Where to look; everywhere if left out.

        Returns:
            The folders that were removed; none while the log is damaged, because what it lost may need them.

        Raises:
            RegistryUnreachableError, MachineError: the store does not answer, or cannot be written.
        """
        self.refresh()  # who judges by an old state removes what was published since
        return [] if self.damage else sweep(self._store, self._log.state, names)

    @property
    def _is_remote(self) -> bool:
        return not isinstance(self._store, LocalStore)

    def _folder(self, manifest: Manifest) -> str:
        entry = shelf_of(self._log.state, manifest.name).entries.get(manifest.version)
        return entry.folder if entry and entry.manifest.digest == manifest.digest else folder_of(manifest)

    def _key(self, manifest: Manifest, file: str) -> str:
        return f"{self._folder(manifest)}/{file}"


def _draft(
    name: str, base: BaseIdentity, checked: CheckedAdapter | None, facts: Mapping[str, object], faults: list[Fault]
) -> Manifest:
    """The manifest as far as it is known before the files are copied; raises ``faults`` and its own as one
    InputError.
    """
    # Where the adapter itself is at fault, a stand-in lets the other fields still be looked at.
    adapter = asdict(checked or CheckedAdapter(rank=1, alpha=1.0, rslora=False, target_modules=(), parameters=0))
    document = {"name": name, "version": 1, "base": base, "files": {}, **adapter, **facts}
    return parse_spec(document, Manifest, "publish", faults=faults)
