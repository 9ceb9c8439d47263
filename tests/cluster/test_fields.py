"""Fields in ``--help``: whatever the models say, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from typing import Literal

import pytest

from cluster.fields import Field, fields_of
from cluster.rules import StrictModel


class Inner(StrictModel):
    size: int = 3
    """How many."""
    kind: Literal["a", "b"] | None = None
    """Which."""


class Outer(StrictModel):
    name: str
    """Its name,
    in two lines."""
    inner: Inner = Inner()
    """Not shown: its fields are."""
    optional: Inner | None = None
    """Not shown either."""
    many: dict[str, Inner] = {}
    """By knob."""
    on: bool = True
    """A switch."""


def test_fields_in_the_order_of_the_file() -> None:
    assert list(fields_of(Outer)) == [
        Field("name", "required", "Its name, in two lines."),
        Field("inner.size", "3", "How many."),
        Field("inner.kind", "null", "Which. One of a, b."),
        Field("optional.size", "3", "How many."),
        Field("optional.kind", "null", "Which. One of a, b."),
        Field("many.KNOB", "", "By knob."),
        Field("many.KNOB.size", "3", "How many."),
        Field("many.KNOB.kind", "null", "Which. One of a, b."),
        Field("on", "true", "A switch."),
    ]


@pytest.mark.parametrize(("command", "field"), [("sweep", "train.learning_rate"), ("serve", "engine.max_lora_rank")])
def test_help_of_a_command_lists_its_files_fields(command: str, field: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loraloom", command, "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    assert "Usage" in done.stdout
    assert field in done.stdout
