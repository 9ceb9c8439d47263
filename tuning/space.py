"""What may vary between trials: the domain of a knob, and the trials of a grid or of a random search.

Grid and random searches are drawn before anything starts, so every trial's configuration can be checked first and the
same seed gives the same trials whatever the cluster looks like.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import Field

from cluster.rules import Broken, StrictModel, rule

Number = TypeVar("Number")
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Pair = Annotated[list[Number], Field(min_length=2, max_length=2)]
Value = bool | int | float | str | list[str] | None


class Domain(StrictModel):
    """The values that a knob may take; exactly one of the fields is given."""

    choice: list[Value] | None = Field(default=None, min_length=1)
    """One of these values."""
    uniform: Pair[float] | None = None
    """A number between the two, all equally likely."""
    loguniform: Pair[float] | None = None
    """A number between the two (both above 0), its logarithm uniform: the natural choice for a learning rate."""
    int_range: Pair[Int64] | None = None
    """A whole number from the first to the second, both included."""

    @rule
    def _one_kind(self) -> Iterator[Broken]:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            yield "", "give exactly one of choice, uniform, loguniform, int_range"
        elif self.choice is not None:
            if len({repr(value) for value in self.choice}) < len(self.choice):
                yield "", "choice holds the same value twice"
        else:
            low, high = self.bounds
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                yield "", "the first bound must be below the second, both finite"
            elif self.loguniform and low <= 0:
                yield "", "both bounds of loguniform must be above 0"

    @property
    def bounds(self) -> tuple[float, float]:
        """The ends of a range; not for ``choice``."""
        bounds = self.uniform or self.loguniform or self.int_range or (math.nan, math.nan)
        return bounds[0], bounds[1]

    def examples(self) -> list[Value]:
        """Values whose validity decides that of the whole domain: every choice, or both ends of the range."""
        return list(self.choice or self.uniform or self.loguniform or self.int_range or [])

    @property
    def size(self) -> int | None:
        """How many values there are; None for a range of numbers."""
        if self.choice is not None:
            return len(self.choice)
        return self.int_range[1] - self.int_range[0] + 1 if self.int_range else None

    def values(self) -> Sequence[Value]:
        """All of them; only where ``size`` is a number."""
        if self.int_range:
            return range(self.int_range[0], self.int_range[1] + 1)
        return self.choice or []

    def draw(self, rng: random.Random) -> Value:
        """One value; takes a single number from ``rng`` whatever the kind, so that knobs do not shift each other's
        draws.
        """
        point = rng.random()
        if self.choice is not None:
            return self.choice[int(point * len(self.choice))]
        low, high = self.bounds
        if self.int_range:
            return int(low + math.floor(point * (high - low + 1)))
        if self.loguniform:
            return math.exp(math.log(low) + point * (math.log(high) - math.log(low)))
        return low + point * (high - low)


Space = Mapping[str, Domain]


def grid(space: Space) -> Iterator[dict[str, Value]]:
    """Every combination of the choices, the last knob varying fastest; all domains must be choices."""
    yield from _combinations(space)


def _combinations(space: Space) -> Iterator[dict[str, Value]]:
    for values in itertools.product(*(domain.values() for domain in space.values())):
        yield dict(zip(space, values, strict=True))


def draw_trials(space: Space, count: int, seed: int) -> list[dict[str, Value]]:
    """``count`` random configurations, none twice; a finite space must hold as many.

    Where a hundred draws in a row have found nothing new, what is left of a finite space is shuffled and dealt out.
    Ranges of numbers are not exhausted: there a configuration comes twice if need be.
    """
    rng = random.Random(seed)  # noqa: S311 - a search, not a secret
    seen: set[str] = set()
    trials: list[dict[str, Value]] = []
    while len(trials) < count:
        trial: dict[str, Any] = {}
        for _ in range(100):
            trial = {name: domain.draw(rng) for name, domain in space.items()}
            if repr(trial) not in seen:
                break
        else:
            if space_size(space) is not None:
                rest = [one for one in _combinations(space) if repr(one) not in seen]
                return [*trials, *rng.sample(rest, len(rest))[: count - len(trials)]]
        seen.add(repr(trial))
        trials.append(trial)
    return trials


def space_size(space: Space) -> int | None:
    """How many configurations there are; None where a knob has a range of numbers."""
    sizes = [domain.size for domain in space.values()]
    return None if None in sizes else math.prod(size for size in sizes if size is not None)


def grid_size(space: Space) -> int:
    """How many trials ``grid`` yields."""
    return math.prod(len(domain.examples()) for domain in space.values())
