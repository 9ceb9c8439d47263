from __future__ import annotations

import logging.config
from importlib import import_module

import pytest


@pytest.mark.usefixtures("capsys")
def test_what_pytest_captures_outlives_a_library_that_configures_logging() -> None:
    """Else pytest fails at the end of this test, and at all that come after it in the process."""
    import_module("rouge_score.rouge_scorer")
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
