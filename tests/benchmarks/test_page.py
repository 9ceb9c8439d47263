from __future__ import annotations

import json

import pytest

from tests.benchmarks import page


@pytest.mark.browser
@pytest.mark.timeout(200)
def test_it_runs_small(capsys: pytest.CaptureFixture[str]) -> None:
    page.main(["--trials", "12", "--reports", "5", "--rounds", "1"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures.pop("trials") == 12
    assert {f"draw_{view}_ms" for view in page.VIEWS} < figures.keys()
    assert all(value > 0 for name, value in figures.items() if name != "megabytes")
