"""The benchmark runs, both sides end in the same losses, and its last line is the result."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks import sweep


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Tune leaves its loggers' files open
def test_both_sides_come_to_the_same_losses(capsys: pytest.CaptureFixture[str]) -> None:
    sweep.main(["--trials", "2", "--steps", "6", "--slots", "2", "--compute-dtype", "float32", "--asha"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    early = result.pop("asha")
    assert set(early) == {"speedup", "loraloom_s", "baseline_s"}
    assert set(result) == {*early, "median_loss_difference", "largest_loss_difference"}
    assert result["largest_loss_difference"] < 1e-4
