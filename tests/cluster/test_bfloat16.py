from __future__ import annotations

from cluster.bfloat16 import cpu_multiplies_bfloat16


def test_this_machine_is_asked() -> None:
    """The question is none of torch's public ones: a torch that has it no more fails here."""
    assert cpu_multiplies_bfloat16() in (True, False)
