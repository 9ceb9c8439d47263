"""What has happened to a registry, and what it holds after it: events, and the fold that makes a state of them.

Each event is one object of the log, numbered without gaps. A writer folds all events up to the last one, checks its
own against that state, and adds it under the next number, which only one writer can get: so every event fits the state
that it meets here, and the fold has nothing to refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import AwareDatetime, Field, FiniteFloat, PositiveInt, TypeAdapter, model_validator

from cluster.rules import StrictModel
from serving.manifest import LATEST, Manifest
from serving.registry.split import AliasTarget, versions_of
from serving.registry.votes import PREFERRED, SOURCE, Votes, version_of, vote_faults


class Score(StrictModel):
    """What one metric says of a version."""

    value: FiniteFloat
    """The metric's value."""
    low: FiniteFloat | None = None
    """Lower end of its 95 % confidence interval."""
    high: FiniteFloat | None = None
    """Upper end of it."""
    count: PositiveInt
    """Rows that it was measured on; votes."""
    data: str
    """Name of the file of rows; ``votes`` for what is counted from them."""
    data_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 of that file."""
    at: AwareDatetime
    """When it was measured."""


class Stamp(NamedTuple):
    """What every event carries; see ``_Event``."""

    seq: int
    id: str
    at: datetime
    by: str
    note: str | None


class _Event(StrictModel):
    seq: PositiveInt
    """Its number in the log, counted from 1."""
    id: str
    """Random; by it a writer whose answer was lost recognises its own event."""
    at: AwareDatetime
    """When it was written, in UTC, by the writer's clock."""
    by: str
    """Who did it: user@host unless another name was given."""
    note: str | None = None
    """Why, in the writer's words."""


class Published(_Event):
    """A version was published."""

    kind: Literal["published"] = "published"
    manifest: Manifest
    """What it is."""

    @property
    def name(self) -> str:
        """The adapter that it is about."""
        return self.manifest.name


class Adopted(_Event):
    """The versions of a registry from before there was a log; always its first event."""

    kind: Literal["adopted"] = "adopted"
    manifests: tuple[Manifest, ...]
    """What they are. Each lies in ``name/version/``."""


class Moved(_Event):
    """An alias was made, moved or taken away."""

    kind: Literal["moved"] = "moved"
    name: str
    """The adapter that it is about."""
    alias: str
    """The alias."""
    target: AliasTarget | None
    """What it points to now; null where it was taken away."""
    before: AliasTarget | None
    """What it pointed to before; null where there was none."""
    rollback: bool = False
    """True if it went back along its own history."""


class Removed(_Event):
    """A version was removed. Its number is not used again."""

    kind: Literal["removed"] = "removed"
    name: str
    """The adapter that it is about."""
    version: PositiveInt
    """The version."""
    aliases: tuple[str, ...] = ()
    """Aliases that pointed to it, and went with it."""


class Scored(_Event):
    """A version was evaluated."""

    kind: Literal["scored"] = "scored"
    name: str
    """The adapter that it is about."""
    version: PositiveInt
    """The version."""
    scores: dict[str, Score]
    """Metric -> score; a later score of the same metric replaces it."""


class Voted(_Event):
    """Somebody said which of several answers, side by side, was the best."""

    kind: Literal["voted"] = "voted"
    models: tuple[str, ...]
    """Whose answers they were: versions, and ``base`` for the base."""
    better: str | None
    """The one whose answer was the best; null where none was."""

    @model_validator(mode="after")
    def _is_a_vote(self) -> Self:
        """One that was altered behind the registry's back is damage, and no sum that cannot be divided."""
        for fault in vote_faults(self.models, self.better):
            raise ValueError(str(fault))
        return self


Event = Published | Moved | Removed | Scored | Adopted | Voted
EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


@dataclass(frozen=True)
class Entry:
    """One version."""

    manifest: Manifest
    folder: str
    """Where its files lie, below the registry."""
    at: datetime
    by: str
    note: str | None
    scores: dict[str, Score] = field(default_factory=dict[str, Score])
    """Metric -> score; of the votes, what they come to."""
    votes: Votes = field(default_factory=Votes)


@dataclass
class Shelf:
    """All that is known of one name. A state's shelves are not changed once the state is there."""

    entries: dict[int, Entry] = field(default_factory=dict[int, Entry])
    """The versions that are there, ascending."""
    removed: dict[int, Removed] = field(default_factory=dict[int, Removed])
    folders: dict[str, datetime | None] = field(default_factory=dict[str, "datetime | None"])
    """Folders of all its versions, and since when no version needs them; None where one does."""
    aliases: dict[str, AliasTarget] = field(default_factory=dict[str, AliasTarget])
    """Without ``latest``."""
    earlier: dict[str, list[AliasTarget]] = field(default_factory=dict[str, list[AliasTarget]])
    """What each alias pointed to before, oldest first, without what has been rolled back."""
    history: list[Event] = field(default_factory=list[Event])

    @property
    def last_version(self) -> int:
        """The highest number that was ever given."""
        return max([*self.entries, *self.removed], default=0)

    def pointing(self) -> dict[str, AliasTarget]:
        """Every alias and its target, ``latest`` with them."""
        return {**({LATEST: max(self.entries)} if self.entries else {}), **self.aliases}

    def last_move(self, alias: str) -> Moved | Removed | None:
        """The event that made ``alias`` what it is."""
        for event in reversed(self.history):
            if isinstance(event, Moved) and event.alias == alias:
                return event
            if isinstance(event, Removed) and alias in event.aliases:
                return event
        return None

    def way_back(self, alias: str) -> AliasTarget | None:
        """The newest of the earlier targets of ``alias`` whose versions are all still there."""
        for target in reversed(self.earlier.get(alias, [])):
            if all(version in self.entries for version in versions_of(target)):
                return target
        return None

    def copy(self) -> Shelf:
        """A shelf that can be changed without changing this one."""
        earlier = {alias: list(targets) for alias, targets in self.earlier.items()}
        return Shelf(
            dict(self.entries), dict(self.removed), dict(self.folders), dict(self.aliases), earlier, list(self.history)
        )


@dataclass(frozen=True)
class State:
    """What a registry holds after its first ``seq`` events."""

    seq: int = 0
    shelves: dict[str, Shelf] = field(default_factory=dict[str, Shelf])
    damage: tuple[str, ...] = ()
    """Events that cannot be read, and why. Their versions and moves are missing here."""


def fold(state: State, events: Iterable[Event], seq: int, damage: Iterable[str] = ()) -> State:
    """The state after ``events``, which bring the log to ``seq``; ``state`` stays as it is, for who reads it now."""
    shelves = dict(state.shelves)
    copied: set[str] = set()

    def shelf(name: str) -> Shelf:
        if name not in copied:
            shelves[name] = shelves[name].copy() if name in shelves else Shelf()
            copied.add(name)
        return shelves[name]

    for event in events:
        if isinstance(event, Adopted):
            for manifest in event.manifests:
                _put(shelf(manifest.name), event, manifest, f"{manifest.name}/{manifest.version}", manifest.created_at)
        elif isinstance(event, Voted):
            _count(event, shelf)
        else:
            _apply(shelf(event.name), event)
    return State(seq, shelves, (*state.damage, *damage))


def folder_of(manifest: Manifest) -> str:
    """Where the files of a version are put: by content, so that the same adapter is kept once for each name."""
    return f"{manifest.name}/{manifest.digest[:16]}"


def _apply(shelf: Shelf, event: Published | Moved | Removed | Scored) -> None:
    if isinstance(event, Published):
        _put(shelf, event, event.manifest, folder_of(event.manifest), event.at)
        return
    shelf.history.append(event)
    if isinstance(event, Moved):
        _move(shelf, event)
    elif isinstance(event, Removed):
        entry = shelf.entries.pop(event.version, None)
        shelf.removed[event.version] = event
        for alias in event.aliases:
            shelf.aliases.pop(alias, None)
        if entry and all(other.folder != entry.folder for other in shelf.entries.values()):
            shelf.folders[entry.folder] = event.at
    elif event.version in shelf.entries:
        entry = shelf.entries[event.version]
        shelf.entries[event.version] = replace(entry, scores={**entry.scores, **event.scores})


def _count(event: Voted, shelf: Callable[[str], Shelf]) -> None:
    """Count a vote for each version that it names; one that was removed meanwhile has no record."""
    for model in event.models:
        reference = version_of(model)
        if reference is None:
            continue
        about, version = shelf(reference.name), reference.version or 0
        if about.history[-1:] != [event]:  # one on two versions of a name is still one
            about.history.append(event)
        if version in about.entries:
            entry = about.entries[version]
            votes = entry.votes.after(model, event.models, event.better)
            value, low, high = votes.preferred()
            score = Score(value=value, low=low, high=high, count=votes.count, data=SOURCE, at=event.at)
            about.entries[version] = replace(entry, scores={**entry.scores, PREFERRED: score}, votes=votes)


def _put(shelf: Shelf, event: Published | Adopted, manifest: Manifest, folder: str, at: datetime) -> None:
    shelf.entries[manifest.version] = Entry(manifest, folder, at, event.by, event.note)
    shelf.folders[folder] = None
    if shelf.history[-1:] != [event]:  # one that adopts several versions of a name is still one
        shelf.history.append(event)


def _move(shelf: Shelf, event: Moved) -> None:
    earlier = shelf.earlier.setdefault(event.alias, [])
    if event.rollback:
        while earlier and earlier.pop() != event.target:
            pass
    elif event.before is not None:
        earlier.append(event.before)
    if event.target is None:
        shelf.aliases.pop(event.alias, None)
    else:
        shelf.aliases[event.alias] = event.target
