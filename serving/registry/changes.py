"""What may be done to a registry: pure functions from its newest state to the event that changes it, or a refusal.

Each returns the decision that ``serving.registry.log.EventLog.append`` calls, again if another writer was faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from cluster.errors import ConflictError, Fault
from serving.manifest import LATEST, NAME_RULE, AdapterReference, Manifest, is_alias, is_safe_name
from serving.registry.events import Moved, Published, Removed, Score, Scored, Shelf, Stamp, State, Voted
from serving.registry.lookup import existing_shelf, no_alias, shelf_of
from serving.registry.split import AliasTarget, normalised, spelled, versions_of
from serving.registry.votes import version_of


class Unset:
    """The type of ``UNSET``."""

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset()
"""No expectation of what an alias points to."""

Expected = int | Mapping[int, float] | None | Unset
_MOST_CHARACTERS = 500


class UnchangedError(Exception):
    """Nothing is to be done; ``event`` did it before."""

    def __init__(self, event: Moved) -> None:
        super().__init__(event)
        self.event = event


def publish(draft: Manifest, *, must_be_new: bool) -> Callable[[State, Stamp], Published]:
    """``draft`` becomes the next version of its name; where it ``must_be_new``, unless the name has versions."""

    def decide(state: State, stamp: Stamp) -> Published:
        shelf = shelf_of(state, draft.name)
        if must_be_new and shelf.entries:
            raise ConflictError(f"the adapter {draft.name} is there already")
        version = shelf.last_version + 1
        return Published(**stamp._asdict(), manifest=draft.model_copy(update={"version": version}))

    return decide


def move(name: str, alias: str, target: AliasTarget, expect: Expected) -> Callable[[State, Stamp], Moved]:
    """``alias`` points to ``target``, which is normalised.

    Raises:
        NotFoundError: there is no such name or version.
        ConflictError: the alias does not point to ``expect``.
        UnchangedError: it points there already.
    """

    def decide(state: State, stamp: Stamp) -> Moved:
        shelf = existing_shelf(state, name, versions_of(target))
        before = shelf.aliases.get(alias)
        if not isinstance(expect, Unset) and before != (expected := None if expect is None else normalised(expect)):
            raise ConflictError(_unexpected(shelf, name, alias, expected))
        last = shelf.last_move(alias)
        if before == target and isinstance(last, Moved):
            raise UnchangedError(last)
        return Moved(**stamp._asdict(), name=name, alias=alias, target=target, before=before)

    return decide


def roll_back(name: str, alias: str) -> Callable[[State, Stamp], Moved]:
    """``alias`` points to what it pointed to before.

    Raises:
        NotFoundError: there is no such name, and never was such an alias.
        ConflictError: there is nothing to go back to.
    """

    def decide(state: State, stamp: Stamp) -> Moved:
        shelf = existing_shelf(state, name)
        if shelf.last_move(alias) is None:
            raise no_alias(shelf, name, alias)
        before, target = shelf.aliases.get(alias), shelf.way_back(alias)
        if target is None:
            raise ConflictError(
                f"{name}@{alias} points to {spelled(before)}, and there is nothing earlier to go back to"
            )
        return Moved(**stamp._asdict(), name=name, alias=alias, target=target, before=before, rollback=True)

    return decide


def remove_version(name: str, version: int, force: bool) -> Callable[[State, Stamp], Removed]:
    """The version is removed, and with ``force`` the aliases that point to it.

    Raises:
        NotFoundError: there is no such version.
        ConflictError: aliases point to it.
    """

    def decide(state: State, stamp: Stamp) -> Removed:
        shelf = existing_shelf(state, name, (version,))
        pointing = sorted(alias for alias, target in shelf.pointing().items() if version in versions_of(target))
        if pointing and not force:
            raise ConflictError(
                f"{name}@{version} is what {', '.join(pointing)} points to: move that first, or force the removal"
            )
        going = tuple(alias for alias in pointing if alias != LATEST)
        return Removed(**stamp._asdict(), name=name, version=version, aliases=going)

    return decide


def remove_alias(name: str, alias: str) -> Callable[[State, Stamp], Moved]:
    """The alias is taken away.

    Raises:
        NotFoundError: there is no such name or alias.
    """

    def decide(state: State, stamp: Stamp) -> Moved:
        shelf = existing_shelf(state, name)
        if alias not in shelf.aliases:
            raise no_alias(shelf, name, alias)
        return Moved(**stamp._asdict(), name=name, alias=alias, target=None, before=shelf.aliases[alias])

    return decide


def score(name: str, version: int, scores: Mapping[str, Score]) -> Callable[[State, Stamp], Scored]:
    """The version has ``scores``.

    Raises:
        NotFoundError: there is no such version.
    """

    def decide(state: State, stamp: Stamp) -> Scored:
        existing_shelf(state, name, (version,))
        return Scored(**stamp._asdict(), name=name, version=version, scores=dict(scores))

    return decide


def vote(models: Sequence[str], better: str | None) -> Callable[[State, Stamp], Voted]:
    """Somebody's vote on ``models``, which has no faults.

    Raises:
        NotFoundError: one of the versions is not there.
    """

    def decide(state: State, stamp: Stamp) -> Voted:
        for reference in filter(None, map(version_of, models)):
            existing_shelf(state, reference.name, (reference.version or 0,))
        return Voted(**stamp._asdict(), models=tuple(models), better=better)

    return decide


def removable(reference: AdapterReference) -> Iterator[Fault]:
    """Why a reference does not say what to remove."""
    if reference.version is None and reference.alias in (None, LATEST):
        yield Fault("adapter", f"must say what to remove: a version ({reference.name}@1) or an alias", str(reference))


def alias_faults(name: str, alias: str) -> Iterator[Fault]:
    """Why there can be no such alias that is moved by hand."""
    if not is_safe_name(name):
        yield Fault("name", NAME_RULE, name)
    if alias == LATEST:
        yield Fault("alias", "is always the highest version, and cannot be moved", alias)
    elif not is_alias(alias):
        yield Fault("alias", "must start with a-z and hold only a-z, 0-9, '.', '_' and '-', at most 63 of them", alias)


def text_faults(by: str | None, note: str | None) -> Iterator[Fault]:
    """Why the history cannot keep a name or a note: they are printed in tables and terminals."""
    for where, text in (("by", by), ("note", note)):
        if text is not None and not (text.strip() and text.isprintable() and len(text) <= _MOST_CHARACTERS):
            yield Fault(where, f"must be one line of 1 to {_MOST_CHARACTERS} printable characters", text)


def _unexpected(shelf: Shelf, name: str, alias: str, expected: AliasTarget | None) -> str:
    last = shelf.last_move(alias)
    now = f"{name}@{alias} points to {spelled(shelf.aliases.get(alias))}, not to {spelled(expected)} as expected"
    if last is None:
        return f"{now}: it was never moved"
    note = f" ({last.note})" if last.note else ""
    return f"{now}: {last.by} moved it at {last.at:%Y-%m-%d %H:%M:%S %Z}{note}"
