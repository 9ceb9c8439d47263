from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from tests.tuning.compare.make import SPACE, make_sweep
from tuning.compare.importance import LEAST_TRIALS, MOST_TRIALS, Point, importance, points
from tuning.results import read_sweep
from tuning.space import Domain

DOMAINS = {knob: Domain.model_validate(domain) for knob, domain in SPACE.items()}


def drawn(trials: int, seed: int = 0) -> list[Point]:
    """Only the learning rate matters, and a little the targets."""
    rng = random.Random(seed)
    found: list[Point] = []
    for _ in range(trials):
        knobs = {knob: domain.draw(rng) for knob, domain in DOMAINS.items()}
        rate = (math.log10(knobs["learning_rate"]) + 3.5) ** 2  # pyright: ignore[reportArgumentType]
        found.append((knobs, rate + 0.4 * (knobs["target_modules"] != "all-linear") + 0.05 * rng.random()))
    return found


def test_what_matters_comes_first_and_what_does_not_is_near_nothing() -> None:
    found = importance(DOMAINS, drawn(200))
    assert found
    shares = {share.knob: share for share in found.shares}
    assert [share.knob for share in found.shares[:2]] == ["learning_rate", "target_modules"]
    assert shares["learning_rate"].low > 0.5
    assert shares["dropout"].high < 0.15
    assert shares["rank"].high < 0.15
    assert sum(share.share for share in found.shares) == pytest.approx(1)
    assert found.trials == 200


def test_few_trials_say_that_little_is_sure() -> None:
    few, many = importance(DOMAINS, drawn(12)), importance(DOMAINS, drawn(400))
    assert few
    assert many

    def width(found: object) -> float:
        return max(share.high - share.low for share in found.shares)  # pyright: ignore[reportAttributeAccessIssue]

    assert width(few) > 3 * width(many)
    for share in (*few.shares, *many.shares):
        assert 0 <= share.low <= share.share <= share.high <= 1 + 1e-9


def test_the_same_trials_give_the_same_answer() -> None:
    assert importance(DOMAINS, drawn(30)) == importance(DOMAINS, drawn(30))


def test_nothing_is_told_of_too_few_or_of_equals() -> None:
    assert importance(DOMAINS, drawn(LEAST_TRIALS - 1)) is None
    assert importance(DOMAINS, [(knobs, 1.0) for knobs, _ in drawn(20)]) is None
    one = drawn(1)[0][0]
    assert importance(DOMAINS, [(one, float(index)) for index in range(20)]) is None


def test_a_knob_that_never_differed_is_left_out() -> None:
    found = importance(DOMAINS, [({**knobs, "rank": 8}, score) for knobs, score in drawn(20)])
    assert found
    assert "rank" not in {share.knob for share in found.shares}


def test_a_long_sweep_is_looked_at_all_over() -> None:
    found = importance(DOMAINS, drawn(MOST_TRIALS * 2 + 7))
    assert found
    assert found.trials == MOST_TRIALS * 2 + 7
    assert found.shares[0].knob == "learning_rate"


def test_trials_that_diverged_are_the_worst_and_running_ones_do_not_count(tmp_path: Path) -> None:
    sweep = read_sweep(make_sweep(tmp_path / "made", 22))
    found = points(sweep)
    assert len(found) == 22
    assert [score for _, score in found].count(math.inf) == 2
    assert importance(sweep.spec.space, found)
    for trial in sweep.trials[:5]:
        trial.state = "running"
    assert len(points(sweep)) == 17


def test_whole_numbers_and_values_just_outside_a_range() -> None:
    domains = {"warmup_steps": Domain(int_range=[0, 9]), "dropout": Domain(uniform=[0.0, 0.1])}
    rng = random.Random(0)
    found: list[Point] = []
    for _ in range(40):
        steps = rng.randint(0, 9)
        found.append(({"warmup_steps": steps, "dropout": rng.choice([0.1000000001, 0.05])}, float(steps)))
    shares = importance(domains, found)
    assert shares
    assert shares.shares[0].knob == "warmup_steps"
