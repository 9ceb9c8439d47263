from __future__ import annotations

import math
from collections import Counter

import pytest

from serving.registry.split import broken_target, normalised, pick, spelled, versions_of

KEYS = [f"user-{number}" for number in range(20_000)]


def chosen(weights: dict[int, float]) -> list[int]:
    return [pick(weights, key) for key in KEYS]


@pytest.mark.parametrize(
    "weights", [{7: 0.9, 8: 0.1}, {1: 1.0, 2: 1.0, 3: 1.0}, {1: 70, 2: 20, 3: 10}, {5: 0.999, 6: 0.001}]
)
def test_shares_are_those_of_the_weights(weights: dict[int, float]) -> None:
    counts, whole = Counter(chosen(weights)), sum(weights.values())
    for version, weight in weights.items():
        share = weight / whole
        deviation = math.sqrt(share * (1 - share) * len(KEYS))
        assert abs(counts[version] - share * len(KEYS)) < 5 * deviation + 1


def test_a_key_stays_and_the_order_of_weights_does_not_matter() -> None:
    assert chosen({7: 0.9, 8: 0.1}) == chosen({8: 1, 7: 9}) == chosen({8: 0.1, 7: 0.9})
    # As drawn when this was written: another hash would send users of a running split to other versions.
    assert [pick({7: 0.5, 8: 0.5}, key) for key in ("a", "b", "c", "d", "", "\ud800")] == [7, 8, 8, 7, 8, 8]


def test_changed_weights_move_only_the_keys_that_they_must() -> None:
    before, after = chosen({7: 0.9, 8: 0.1}), chosen({7: 0.8, 8: 0.2})
    moved = Counter((old, new) for old, new in zip(before, after, strict=True) if old != new)
    assert set(moved) == {(7, 8)}
    assert moved[7, 8] == pytest.approx(0.1 * len(KEYS), rel=0.15)


def test_a_new_version_takes_from_all_and_leaves_the_rest_alone() -> None:
    before, after = chosen({1: 1, 2: 1}), chosen({1: 1, 2: 1, 3: 1})
    assert {new for old, new in zip(before, after, strict=True) if old != new} == {3}
    assert Counter(before)[1] > Counter(after)[1]


def test_targets_are_normalised() -> None:
    assert normalised(7) == normalised({7: 0.2}) == 7
    assert normalised({8: 1, 7: 9}) == {7: 0.9, 8: 0.1}
    assert list(normalised({8: 1, 7: 9})) == [7, 8]  # pyright: ignore[reportArgumentType]
    assert versions_of({8: 0.1, 7: 0.9}) == (7, 8)
    assert versions_of(3) == (3,)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), True, "1", None, 1e-12])
def test_weights_that_are_none(weight: float) -> None:
    assert [fault.where for fault in broken_target({1: weight, 2: 1.0}, "target")] == ["target: 1"]
    assert list(broken_target({1: 0.5, 2: 3}, "target")) == []


def test_as_people_read_it() -> None:
    assert [spelled(None), spelled(7), spelled({7: 0.9, 8: 0.1})] == ["nothing", "7", "7 (0.9), 8 (0.1)"]
