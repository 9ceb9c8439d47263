"""The benchmark runs, and ends with its JSON line."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks import start


@pytest.mark.ray
@pytest.mark.full
def test_hosts_and_trials_begin(capsys: pytest.CaptureFixture[str]) -> None:
    start.main(["--hidden", "64", "--layers", "1", "--rounds", "1", "--trials", "2"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) == {"first_host_s", "second_host_s", "transformers_s", "attach_s", "slowest_attach_s"}
    assert all(seconds > 0 for seconds in result.values())
