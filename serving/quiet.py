"""Importing vLLM and Ray Serve LLM without what they do to a process's logging and terminal.

Ray Serve LLM replaces the root logger's handlers by one that prints JSON of every library
(ray/llm/_internal/serve/observability); vLLM prints on stdout, where results belong, and both are told of old Python
features by their own dependencies.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Generator

_VLLM_LEVEL = "VLLM_LOGGING_LEVEL"


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Run the block with warnings and INFO records hidden, and give the root logger back as it was.

    Only the process's own output is meant; replicas log in full to Ray's log files.
    """
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, root.manager.disable
    is_users_choice = _VLLM_LEVEL in os.environ
    os.environ.setdefault(_VLLM_LEVEL, "ERROR")
    logging.disable(max(disabled, logging.INFO))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)
        if not is_users_choice:
            del os.environ[_VLLM_LEVEL]
