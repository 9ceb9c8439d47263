from __future__ import annotations

import pickle

import pytest

from cluster.errors import (
    ABSENT,
    ConflictError,
    Fault,
    InputError,
    LoraloomError,
    MachineError,
    NotFoundError,
)

ONE = Fault("demo.yaml: train.steps", "must be greater than 0", -1)
TWO = Fault("demo.yaml: base", "is required", ABSENT)


@pytest.mark.parametrize(
    "error",
    [InputError([ONE, TWO]), NotFoundError("no such trial: t9"), ConflictError("in use"), MachineError("no GPU")],
)
def test_errors_survive_pickling(error: LoraloomError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.exit_code == error.exit_code


def test_faults_and_their_absent_value_survive_pickling() -> None:
    again = pickle.loads(pickle.dumps(InputError([ONE, TWO])))
    assert again.faults == [ONE, TWO]
    assert again.faults[1].value is ABSENT


def test_a_fault_says_place_rule_and_value() -> None:
    assert str(ONE) == "demo.yaml: train.steps: must be greater than 0, got -1"
    assert str(TWO) == "demo.yaml: base: is required"


def test_a_fault_whose_value_is_none_says_so() -> None:
    assert str(Fault("f", "must be a number", None)) == "f: must be a number, got None"


def test_long_values_are_shortened() -> None:
    text = str(Fault("f", "must be short", "x" * 1000))
    assert len(text) < 250
    assert text.endswith("...")


def test_one_fault_stands_alone_and_several_are_counted() -> None:
    assert str(InputError([ONE])) == str(ONE)
    assert str(InputError([ONE, TWO])).splitlines() == ["2 faults:", f"  {ONE}", f"  {TWO}"]


def test_exit_codes_differ() -> None:
    kinds = (LoraloomError, InputError, NotFoundError, ConflictError, MachineError)
    assert [kind.exit_code for kind in kinds] == [1, 2, 3, 4, 5]
