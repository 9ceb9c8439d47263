"""What all tests share: a quiet environment without network, the marks that depend on the machine, the tiny base."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile

# Before any library reads them.
os.environ.update(
    XDG_CACHE_HOME=tempfile.mkdtemp(
        prefix="loraloom-tests-"
    ),  # quantised bases are no business of the user's own cache
    HF_HUB_OFFLINE="1",  # a test that needs the network would pass or fail by the weather
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_USAGE_STATS_ENABLED="0",  # tests are not usage; elsewhere Ray's own default stands
    VLLM_NO_USAGE_STATS="1",
    TQDM_DISABLE="1",
    NO_COLOR="1",
    COLUMNS="160",  # rich would break messages where a test looks for them
)
os.environ.pop("RAY_ADDRESS", None)

from pathlib import Path

import pytest
from absl import logging as absl_logging

from cluster.machine import find_gpus
from tests.browser import find_chromium

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# absl, which the ROUGE scorer brings, remembers the standard error of its import. That is pytest's own file of captured
# output, and absl closes it when a library configures logging (uvicorn does) while `capsys` puts another in its place:
# every later test of the process fails then. The real standard error it never closes.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__

# A shell ignores SIGINT for what it starts in the background, and children inherit that: the tests of Ctrl-C send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """The same with SIGHUP, which `nohup` has ignored, and what ends well in an earlier test of this process too.
    Children of a process that handles it are as the system has it.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda _number, _frame: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run. Continuous integration has the programs: there a missing one fails."""
    lacking: dict[str, str] = {}
    if _any(items, "gpu") and not find_gpus():
        lacking["gpu"] = "needs a CUDA GPU"
    if "CI" not in os.environ:
        if _any(items, "browser") and not find_chromium():
            lacking["browser"] = "needs a Chromium (see `make tools`)"
        if _any(items, "prometheus") and not shutil.which("prometheus"):
            lacking["prometheus"] = "needs Prometheus (see `make tools`)"
    for item in items:
        for mark, reason in lacking.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


def _any(items: list[pytest.Item], mark: str) -> bool:
    return any(item.get_closest_marker(mark) for item in items)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer (tests/tiny.py), read only."""
    from tests.tiny import make_base

    return make_base(tmp_path_factory.mktemp("bases") / "tiny")
