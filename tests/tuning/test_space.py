"""Domains of knobs, and the trials that a grid or a seed makes of them."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.errors import InputError
from cluster.schema import parse_spec
from tuning.space import Domain, draw_trials, grid, grid_size, space_size

WIDE = {
    "rank": Domain(choice=[1, 4, 16]),
    "learning_rate": Domain(loguniform=[1e-4, 1e-2]),
    "dropout": Domain(uniform=[0.0, 0.5]),
    "batch_size": Domain(int_range=[2, 4]),
}


def rules_of(document: Any) -> list[str]:
    with pytest.raises(InputError) as error:
        parse_spec(document, Domain, "space")
    return [str(fault) for fault in error.value.faults]


@pytest.mark.parametrize(
    "document",
    [
        {"choice": [1]},
        {"choice": [1, 2.5, "mlp", ["q_proj"], True]},
        {"uniform": [0, 1]},
        {"loguniform": [1e-5, 1]},
        {"int_range": [-3, 3]},
    ],
)
def test_good_domains(document: Any) -> None:
    assert parse_spec(document, Domain, "space").model_dump(exclude_none=True) == document


@pytest.mark.parametrize(
    ("document", "rule"),
    [
        ({}, "give exactly one of"),
        ({"choice": [1], "uniform": [0, 1]}, "give exactly one of"),
        ({"choice": None}, "give exactly one of"),
        ({"choice": []}, "must hold at least 1"),
        ({"choice": [1, 2, 1]}, "choice holds the same value twice"),
        ({"choice": [["q"], ["q"]]}, "choice holds the same value twice"),
        ({"uniform": [1, 1]}, "the first bound must be below the second"),
        ({"int_range": [2, 1]}, "the first bound must be below the second"),
        ({"uniform": [0, math.inf]}, "both finite"),
        ({"uniform": [math.nan, 1]}, "both finite"),
        ({"loguniform": [0, 1]}, "both bounds of loguniform must be above 0"),
        ({"loguniform": [-1, 1]}, "both bounds of loguniform must be above 0"),
        ({"uniform": [1]}, "must hold at least 2"),
        ({"uniform": [1, 2, 3]}, "must hold at most 2"),
        ({"int_range": [0.5, 2]}, "must be a valid integer"),
        ({"lognormal": [1, 2]}, "unknown key"),
        ([1, 2], "must be a mapping of keys to values"),
    ],
)
def test_bad_domains(document: Any, rule: str) -> None:
    assert any(rule in found for found in rules_of(document))


def test_draws_stay_within_and_reach_their_bounds() -> None:
    rng = random.Random(0)
    ranks = [WIDE["rank"].draw(rng) for _ in range(200)]
    sizes = [WIDE["batch_size"].draw(rng) for _ in range(200)]
    rates = [WIDE["learning_rate"].draw(rng) for _ in range(400)]
    shares = [WIDE["dropout"].draw(rng) for _ in range(400)]
    assert all(rank in ranks for rank in (1, 4, 16))
    assert all(size in sizes for size in (2, 3, 4))
    assert all(rank in (1, 4, 16) for rank in ranks)
    assert all(size in (2, 3, 4) for size in sizes)
    assert all(isinstance(size, int) for size in sizes)
    assert all(isinstance(rate, float) and 1e-4 <= rate <= 1e-2 for rate in rates)
    assert all(isinstance(share, float) and 0 <= share <= 0.5 for share in shares)
    # Half of all learning rates below the geometric mean, half of all shares below the arithmetic one.
    assert sum(isinstance(rate, float) and rate < 1e-3 for rate in rates) / 400 == pytest.approx(0.5, abs=0.08)
    assert sum(isinstance(share, float) and share < 0.25 for share in shares) / 400 == pytest.approx(0.5, abs=0.08)


def test_examples_are_the_choices_or_the_ends() -> None:
    assert WIDE["rank"].examples() == [1, 4, 16]
    assert WIDE["batch_size"].examples() == [2, 4]
    assert WIDE["learning_rate"].examples() == [1e-4, 1e-2]


def test_a_grid_is_every_combination_once_the_last_knob_fastest() -> None:
    space = {"a": Domain(choice=[1, 2]), "b": Domain(choice=["x", "y", "z"]), "c": Domain(choice=[["q"]])}
    combinations = list(grid(space))
    assert len(combinations) == grid_size(space) == 6
    assert [(trial["a"], trial["b"]) for trial in combinations] == list(itertools.product([1, 2], "xyz"))
    assert list(grid({})) == [{}]
    assert grid_size({}) == 1


def test_the_same_seed_draws_the_same_trials_and_more_of_them_begin_the_same() -> None:
    assert draw_trials(WIDE, 8, seed=3) == draw_trials(WIDE, 20, seed=3)[:8]
    assert draw_trials(WIDE, 8, seed=3) != draw_trials(WIDE, 8, seed=4)


def test_changing_one_knob_s_domain_does_not_change_the_draws_of_the_others() -> None:
    narrow = {**WIDE, "learning_rate": Domain(choice=[1e-3])}
    for ours, theirs in zip(draw_trials(WIDE, 5, seed=1), draw_trials(narrow, 5, seed=1), strict=True):
        assert {**ours, "learning_rate": 0} == {**theirs, "learning_rate": 0}


@pytest.mark.parametrize("size", [2, 7, 300])
def test_a_finite_space_is_drawn_whole_and_nothing_twice(size: int) -> None:
    """Also where chance alone would take long to find the last ones."""
    space = {"a": Domain(int_range=[1, size]), "b": Domain(choice=["x", ["y"], None])}
    drawn = draw_trials(space, 3 * size, seed=0)
    assert space_size(space) == 3 * size
    assert len(set(map(repr, drawn))) == 3 * size
    assert all(1 <= trial["a"] <= size for trial in drawn if isinstance(trial["a"], int))
    for fewer in (1, size, 3 * size - 1):
        assert draw_trials(space, fewer, seed=0) == drawn[:fewer]


def test_a_range_of_numbers_has_no_size() -> None:
    assert space_size(WIDE) is None
    assert space_size({}) == 1


def test_a_domain_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        WIDE["rank"].choice = [2]
