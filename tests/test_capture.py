from __future__ import annotations

import logging.config
from importlib import import_module

import pytest
from absl import logging as absl_logging


@pytest.mark.usefixtures("capsys")
def test_what_pytest_captures_outlives_a_library_that_configures_logging() -> None:
    """Else pytest, too, fails at the end of this test, and at all that come after it in the process."""
    import_module("rouge_score.rouge_scorer")
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
    assert not absl_logging.get_absl_handler().python_handler.stream.closed
