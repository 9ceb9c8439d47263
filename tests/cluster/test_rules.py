"""Rules between fields: which run on a faulty document, and which are left out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pydantic import PositiveInt, ValidationError

from cluster.errors import InputError
from cluster.rules import Broken, BrokenRules, StrictModel, broken_rules, rule
from cluster.schema import parse_spec


class Range(StrictModel):
    low: int
    high: int = 10

    @rule
    def _order(self) -> Iterator[Broken]:
        if self.low >= self.high:
            yield "low", f"must be below high ({self.high})"


class Plan(StrictModel):
    steps: PositiveInt
    warm: PositiveInt = 1
    window: Range = Range(low=0)
    maybe: Range | None = None
    named: dict[str, Range] = {}

    @rule
    def _warm(self) -> Iterator[Broken]:
        if self.warm > self.steps:
            yield "warm", "must not exceed steps"

    @rule
    def _window(self) -> Iterator[Broken]:
        if self.window.high > self.steps:
            yield "window.high", "must not exceed steps"

    @rule
    def _names(self) -> Iterator[Broken]:
        for name, entry in self.named.items():
            if entry.high > self.steps:
                yield f"named.{name}", "must not exceed steps"


def found(document: object) -> list[Broken]:
    return broken_rules(Plan, document, {})


def test_a_whole_model_keeps_its_rules() -> None:
    assert Plan(steps=10).broken() == []
    with pytest.raises(ValidationError) as caught:
        Plan(steps=3, warm=4)
    (detail,) = caught.value.errors()
    error = detail.get("ctx", {})["error"]
    assert isinstance(error, BrokenRules)
    assert error.rules == [("warm", "must not exceed steps"), ("window.high", "must not exceed steps")]


def test_a_rule_is_left_out_where_a_field_that_it_reads_is_wrong_or_missing() -> None:
    assert found({"steps": "many", "warm": 4}) == []
    assert found({"warm": 4}) == []
    assert found({"steps": 3, "warm": 4, "window": {"high": "x", "low": 1}}) == [("warm", "must not exceed steps")]


def test_rules_of_nested_models_and_of_those_around_them_both_run() -> None:
    document = {
        "steps": 5,
        "warm": "x",
        "window": {"low": 9, "high": 9},
        "maybe": {"low": 11, "colour": "red"},
        "named": {"a": {"low": 3, "high": 2}, "b": {"low": "x", "high": 7}},
    }
    assert found(document) == [
        ("window.low", "must be below high (9)"),
        ("maybe.low", "must be below high (10)"),
        ("named.a.low", "must be below high (2)"),
        ("window.high", "must not exceed steps"),
        ("named.b", "must not exceed steps"),
    ]


@pytest.mark.parametrize("document", [None, [], 3, {"steps": []}, {"window": 3, "named": {"a": 3}, "maybe": []}])
def test_anything_may_stand_in_a_document(document: object) -> None:
    assert found(document) == []


def test_each_fault_is_told_once() -> None:
    with pytest.raises(InputError) as caught:
        parse_spec({"steps": 0, "window": {"low": 30}, "named": {"a": {"low": 3, "high": 2}}}, Plan, "plan.yaml")
    assert [str(fault) for fault in caught.value.faults] == [
        "plan.yaml: steps: must be greater than 0, got 0",
        "plan.yaml: window.low: must be below high (10)",
        "plan.yaml: named.a.low: must be below high (2)",
    ]


def test_a_mistake_in_a_rule_of_a_whole_model_is_not_hidden() -> None:
    class Wrong(StrictModel):
        low: int = 0

        @rule
        def _typo(self) -> Iterator[Broken]:
            yield "low", str(self.lwo)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownArgumentType, reportUnknownMemberType]

    with pytest.raises(AttributeError, match="lwo"):
        Wrong()
