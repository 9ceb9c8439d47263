from __future__ import annotations

import pytest

from cluster.errors import InputError
from serving.evaluate.intervals import Estimate
from serving.evaluate.metrics import METRICS
from serving.evaluate.promotion import Candidate, Condition, decide, parse_condition


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("exact_match > prod", Condition("exact_match", ">", "prod", 0.0)),
        ("exact_match>prod", Condition("exact_match", ">", "prod", 0.0)),
        ("  f1 >= prod + 0.02 ", Condition("f1", ">=", "prod", 0.02)),
        ("rouge > support@3 - .5", Condition("rouge", ">", "support@3", -0.5)),
        ("perplexity < base", Condition("perplexity", "<", "base", 0.0)),
        ("perplexity <= 3.5e0", Condition("perplexity", "<=", None, 3.5)),
        ("contains > stable-2", Condition("contains", ">", "stable-2", 0.0)),
    ],
)
def test_conditions(text: str, condition: Condition) -> None:
    assert parse_condition(text, METRICS) == condition
    assert parse_condition(str(condition), METRICS) == condition


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "must be a condition"),
        ("exact_match", "must be a condition"),
        ("exact_match = prod", "must be a condition"),
        ("exact_match > prod and f1 > prod", "must be a condition"),
        ("exact_match > prod +", "must be a condition"),
        ("exact_match > 0.5 + 0.1", "must be a condition"),
        ("exact_match > -1", "must be a condition"),
        ("prod < exact_match", "must be one of --metric"),
        ("bleu > prod", "must be one of --metric"),
        ("f1 > prod", "must be one of --metric"),
        ("exact_match < prod", "must use > or >=, as exact_match is better where it is higher"),
        ("perplexity > prod", "must use < or <=, as perplexity is better where it is lower"),
    ],
)
def test_what_is_no_condition(text: str, rule: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_condition(text, ("exact_match", "perplexity"))
    assert rule in str(caught.value)
    assert "--promote-if" in str(caught.value)


def estimate(value: float, around: float = 0.1) -> Estimate:
    return Estimate(value, value - around, value + around, 50)


def candidates(*values: float, floor: float = 0.0, around: float = 0.1) -> dict[str, Candidate]:
    return {
        f"support@{version}": Candidate(f"support@{version}", estimate(value), estimate(value - floor, around))
        for version, value in enumerate(values, 1)
    }


MATCH = Condition("exact_match", ">", "prod", 0.0)


def test_the_best_that_satisfies_it_wins() -> None:
    found = decide(MATCH, candidates(0.6, 0.9, 0.9, floor=0.5), estimate(0.5), confident=False)
    assert (found.winner, found.supported) == ("support@2", True)
    assert "support@2 has exact_match 0.9, prod 0.5, paired difference +0.4 [0.3, 0.5]" in found.reason


def test_nothing_satisfies_it() -> None:
    found = decide(MATCH, candidates(0.5, 0.4), estimate(0.5), confident=False)
    assert (found.winner, found.supported) == (None, False)
    assert found.reason == "no version satisfies exact_match > prod (prod has 0.5)"
    equal = Condition("exact_match", ">=", "prod", 0.0)
    assert decide(equal, candidates(0.5, 0.4), estimate(0.5), confident=False).winner == "support@1"
    assert decide(MATCH, {}, estimate(0.5), confident=False).winner is None


def test_a_margin() -> None:
    margin = Condition("exact_match", ">", "prod", 0.2)
    assert decide(margin, candidates(0.6), estimate(0.5), confident=False).winner is None
    found = decide(margin, candidates(0.75, floor=0.5), estimate(0.5), confident=False)
    assert (found.winner, found.supported) == ("support@1", False)  # the difference may be as little as 0.15
    assert "the interval allows for the contrary" in found.reason


def test_confident_asks_for_more_than_the_value() -> None:
    close = candidates(0.55, floor=0.5)
    assert decide(MATCH, close, estimate(0.5), confident=False).winner == "support@1"
    found = decide(MATCH, close, estimate(0.5), confident=True)
    assert found.winner is None
    assert "beyond chance" in found.reason
    # The best by value is in doubt, the second is not.
    mixed = {
        "support@1": Candidate("support@1", estimate(0.9), estimate(0.4, around=0.5)),
        "support@2": Candidate("support@2", estimate(0.8), estimate(0.3)),
    }
    assert decide(MATCH, mixed, estimate(0.5), confident=True).winner == "support@2"


def test_lower_is_better_for_perplexity() -> None:
    found = decide(
        Condition("perplexity", "<", "prod", 0.0), candidates(3.0, 2.0, 5.0, floor=4.0), estimate(4.0), confident=True
    )
    assert (found.winner, found.supported) == ("support@2", True)


def test_a_number() -> None:
    number = Condition("exact_match", ">", None, 0.5)
    one = {"support@1": Candidate("support@1", estimate(0.55), None)}
    assert decide(number, one, None, confident=False).winner == "support@1"
    assert decide(number, one, None, confident=True).winner is None
    sure = {"support@1": Candidate("support@1", estimate(0.7), None)}
    assert decide(number, sure, None, confident=True).supported


def test_too_few_rows_support_nothing() -> None:
    one = {"support@1": Candidate("support@1", Estimate(0.9, None, None, 1), Estimate(0.4, None, None, 1))}
    found = decide(MATCH, one, Estimate(0.5, None, None, 1), confident=False)
    assert (found.winner, found.supported) == ("support@1", False)
