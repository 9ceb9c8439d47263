"""What people say of versions side by side: which one is better. Counted here, told as one more score.

A vote names the models whose answers somebody saw next to each other, and the better one of them, or none. Where it
names more than two, the better one has won against each other one, and of these nothing is known among themselves; so
what is counted are pairs, and chance alone gives each model half of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cluster.errors import Fault, InputError
from serving.manifest import AdapterReference, parse_reference

BASE = "base"
"""The base, among versions. No version reads so: they have an @."""
PREFERRED = "preferred"
"""The metric's name."""
MOST_MODELS = 6
"""Answers that somebody can still compare."""
SOURCE = "votes"
"""What stands where other scores name their file of rows."""
_Z = 1.959963984540054
"""Of a 95 % interval: the normal distribution's 97.5th percentile."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Pairs with one other model."""

    won: int = 0
    lost: int = 0
    tied: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.won + other.won, self.lost + other.lost, self.tied + other.tied)

    @property
    def pairs(self) -> int:
        """All of them."""
        return self.won + self.lost + self.tied


@dataclass(frozen=True, slots=True)
class Votes:
    """All votes on one version."""

    count: int = 0
    """Votes that named it in a pair."""
    against: dict[str, Tally] = field(default_factory=dict[str, Tally])
    """Id of the other model -> the pairs with it."""

    def after(self, own: str, models: Sequence[str], better: str | None) -> Votes:
        """These and one vote more, which names ``own`` among its ``models``."""
        one = Tally(won=int(better == own), lost=int(better not in (own, None)), tied=int(better is None))
        # Of one that lost, nothing is known but that it lost to the better one.
        others = [model for model in models if model != own and (not one.lost or model == better)]
        against = self.against | {other: self.against.get(other, Tally()) + one for other in others}
        return Votes(self.count + 1, against)

    def preferred(self) -> tuple[float, float, float]:
        """The share of its pairs that it won, ties as half, and Wilson's 95 % interval; there must be a vote.

        Pairs of one vote say nearly the same thing, so the interval is that of as many trials as there are votes, not
        pairs (Wilson, JASA 22:209, 1927).
        """
        tallies = self.against.values()
        share = sum(tally.won + tally.tied / 2 for tally in tallies) / sum(tally.pairs for tally in tallies)
        shrunk = 1 / (1 + _Z**2 / self.count)
        middle = shrunk * (share + _Z**2 / (2 * self.count))
        half = shrunk * _Z * math.sqrt(share * (1 - share) / self.count + _Z**2 / (4 * self.count**2))
        return share, max(0.0, middle - half), min(1.0, middle + half)


def vote_faults(models: Sequence[str], better: str | None) -> Iterator[Fault]:
    """Why something is no vote."""
    if not 2 <= len(models) <= MOST_MODELS or len(set(models)) != len(models):
        yield Fault("models", f"must be 2 to {MOST_MODELS} different models", list(models))
    broken = [model for model in models if model != BASE and version_of(model) is None]
    if broken:
        yield Fault("models", f"must be versions, such as support@7, or {BASE}", broken)
    if better is not None and better not in models:
        yield Fault("better", "must be one of the models, or null where none is", better)


def version_of(model: str) -> AdapterReference | None:
    """``support@7`` taken apart; None for what names no version."""
    try:
        reference = parse_reference(model)
    except InputError:
        return None
    return reference if reference.version is not None and str(reference) == model else None
