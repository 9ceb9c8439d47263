"""Questions to a registry's state: what a reference leads to, and what to say where it leads nowhere."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.errors import LoraloomError, NotFoundError
from serving.manifest import DEFAULT_ALIAS, LATEST, AdapterReference
from serving.registry.errors import CorruptAdapterError
from serving.registry.events import Entry, Shelf, State
from serving.registry.split import AliasTarget


def shelf_of(state: State, name: str) -> Shelf:
    """The shelf of ``name``; an empty one if there is no such name."""
    return state.shelves.get(name) or Shelf()


def existing_shelf(state: State, name: str, versions: Iterable[int] = ()) -> Shelf:
    """The shelf of ``name``, on which there are ``versions``.

    Raises:
        NotFoundError: there is no such name, or one of the versions is not there.
        CorruptAdapterError: it may have been lost with damaged events.
    """
    shelf = shelf_of(state, name)
    if not shelf.entries:
        raise _missing(state, name)
    for version in versions:
        if version not in shelf.entries:
            raise _missing(state, name, version)
    return shelf


def entry_of(state: State, name: str, version: int) -> Entry:
    """One version.

    Raises:
        NotFoundError, CorruptAdapterError: as ``existing_shelf``.
    """
    return existing_shelf(state, name, (version,)).entries[version]


def target_of(state: State, reference: AdapterReference) -> AliasTarget:
    """What a reference leads to; a name alone follows ``prod`` where there is such an alias, else ``latest``.

    Raises:
        NotFoundError, CorruptAdapterError: as ``existing_shelf``; or there is no such alias.
    """
    if reference.version is not None:
        existing_shelf(state, reference.name, (reference.version,))
        return reference.version
    shelf = existing_shelf(state, reference.name)
    pointing = shelf.pointing()
    alias = reference.alias or (DEFAULT_ALIAS if DEFAULT_ALIAS in pointing else LATEST)
    if alias not in pointing:
        raise no_alias(shelf, reference.name, alias)
    return pointing[alias]


def no_alias(shelf: Shelf, name: str, alias: str) -> NotFoundError:
    """There is no such alias, and which there are."""
    there = ", ".join(sorted(shelf.pointing()))
    return NotFoundError(f"{name}@{alias}: {name} has no alias {alias} (it has: {there})")


def _missing(state: State, name: str, version: int | None = None) -> LoraloomError:
    shelf = shelf_of(state, name)
    reference = name if version is None else f"{name}@{version}"
    removed = shelf.removed.get(version or 0)
    if removed:
        why = f" ({removed.note})" if removed.note else ""
        return NotFoundError(f"{reference}: it was removed by {removed.by} at {removed.at:%Y-%m-%d %H:%M:%S %Z}{why}")
    if state.damage:
        return CorruptAdapterError(f"{reference} is not found, and may be lost: {'; '.join(state.damage)}")
    if version is not None and shelf.entries:
        there = ", ".join(map(str, sorted(shelf.entries)))
        return NotFoundError(f"{reference}: there is no such version (there are: {there})")
    names = sorted(name for name, shelf in state.shelves.items() if shelf.entries)
    there = f"there are: {', '.join(names)}" if names else "it is empty"
    return NotFoundError(f"{reference}: there is no such adapter in the registry ({there})")
