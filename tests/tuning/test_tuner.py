"""What Ray Tune is told of while a sweep runs, and no longer."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tuning.make import sweep_spec
from tuning.spec import SweepSpec
from tuning.tuner import TUNE_VARIABLES, quiet_tune


@pytest.fixture
def loggers() -> Iterator[list[logging.Logger]]:
    """Tune's, and that of its snapshots, which tell everything."""
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.tune.execution.experiment_state")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
    yield loggers
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


def break_off(spec: SweepSpec, loggers: list[logging.Logger]) -> None:
    with quiet_tune(spec, 4):
        assert not any(logger.isEnabledFor(logging.INFO) for logger in loggers)
        assert loggers[0].isEnabledFor(logging.WARNING)
        assert not loggers[1].isEnabledFor(logging.ERROR)
        assert os.environ.items() >= TUNE_VARIABLES.items()
        assert ("TUNE_MAX_PENDING_TRIALS_PG" in os.environ) == (spec.search.algorithm == "random")
        raise KeyboardInterrupt


@pytest.mark.parametrize("algorithm", ["random", "tpe"])
def test_tune_is_quiet_while_it_runs_and_then_as_before(
    algorithm: str, loggers: list[logging.Logger], tmp_path: Path
) -> None:
    spec = sweep_spec(tmp_path, tmp_path / "rows.jsonl", search={"algorithm": algorithm, "trials": 3})
    variables = dict(os.environ)
    with pytest.raises(KeyboardInterrupt):
        break_off(spec, loggers)
    assert [logger.level for logger in loggers] == [logging.INFO] * 2
    assert dict(os.environ) == variables
