"""What an alias points to: one version, or several by weight, and which of them a key gets.

A key (a user, a session) is bound by weighted rendezvous hashing, in its logarithmic form (Schindelhauer and
Schomaker, Weighted Distributed Hash Tables, SPAA 2005): each version draws ``-weight / ln(u)`` with ``u`` in (0, 1)
hashed from the key and the version, and the highest draw wins. The draw of a version depends on nothing but the key
and its own weight, so a changed weight moves only the keys that the new shares ask for, and always in its direction.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping

from cluster.errors import Fault

AliasTarget = int | dict[int, float]
"""A version, or version -> share; shares are above 0 and add up to 1."""

_DIGITS = 10


def pick(weights: Mapping[int, float], sticky_key: str) -> int:
    """The version that ``sticky_key`` gets: always the same for the same weights, on every machine.

    Args:
        weights: Version -> weight, finite and above 0; at least one.
        sticky_key: Whatever shall stay with its version.
    """
    return max(sorted(weights), key=lambda version: weights[version] / -math.log(_unit(f"{version}\0{sticky_key}")))


def versions_of(target: AliasTarget) -> tuple[int, ...]:
    """The versions that a target leads to, ascending."""
    return (target,) if isinstance(target, int) else tuple(sorted(target))


def normalised(target: int | Mapping[int, float]) -> AliasTarget:
    """``target`` with shares that add up to 1; a version that has all of them stands alone. It broke no rule."""
    if isinstance(target, int):
        return target
    if len(target) == 1:
        return next(iter(target))
    whole = math.fsum(target.values())
    return {version: round(target[version] / whole, _DIGITS) for version in sorted(target)}


def broken_target(target: int | Mapping[int, float], where: str) -> Iterator[Fault]:
    """The rules that a target breaks by itself; whether its versions exist is the registry's to say."""
    if isinstance(target, int):
        return
    if not target:
        yield Fault(where, "must have at least one version", dict(target))
    for version, weight in target.items():
        if not _is_weight(weight):
            yield Fault(f"{where}: {version}", f"the weight must be finite and at least {10**-_DIGITS:g}", weight)


def spelled(target: AliasTarget | None) -> str:
    """``target`` as people read it: ``7``, ``7 (0.9), 8 (0.1)``, or ``nothing``."""
    if target is None:
        return "nothing"
    if isinstance(target, int):
        return str(target)
    return ", ".join(f"{version} ({share:.4g})" for version, share in target.items())


def _is_weight(weight: object) -> bool:
    if not isinstance(weight, int | float) or isinstance(weight, bool):
        return False
    return math.isfinite(weight) and weight >= 10**-_DIGITS


def _unit(text: str) -> float:
    """A number in (0, 1) from 52 bits of a hash: neither end, whose logarithm would decide for every weight."""
    bits = int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 12
    return (bits + 0.5) / 2**52
