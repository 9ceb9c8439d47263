"""The rows that the shipped tasks of lm-evaluation-harness ask."""

from __future__ import annotations

from configs.evaluate.demo_questions import WISHES, load


def test_the_right_choice_is_the_ticket() -> None:
    rows = load()["test"].to_list()
    assert len(rows) == 100
    assert {row["ticket"].partition("/")[0] for row in rows} == set(WISHES)
    for row in rows:
        assert row["tickets"][row["right"]] == row["ticket"]
        assert len(set(row["tickets"])) == len(WISHES)
        assert {ticket.partition("/")[2] for ticket in row["tickets"]} == {row["ticket"].partition("/")[2]}
