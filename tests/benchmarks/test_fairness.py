"""The benchmark runs, and ends with its JSON line."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks import fairness


def test_a_flood_is_held_back(capsys: pytest.CaptureFixture[str]) -> None:
    fairness.main(["--flood", "40", "--running", "2", "--waiting", "20", "--seconds", "1"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) == {
        f"{run}_{what}"
        for run in ("alone", "fair", "unfair")
        for what in ("median_s", "p95_s", "share", "requests", "refused")
    }
    assert result["alone_share"] == 1
    assert result["fair_share"] > 2 * result["unfair_share"]
    assert result["fair_refused"] == 0
