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
from tests.shared_ray import SharedRay

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# absl, which the ROUGE scorer brings, remembers the standard error of its import. That is pytest's own file of captured
# output, and absl closes it when a library configures logging (uvicorn does) while `capsys` puts another in its place:
# every later test of the process fails then. The real standard error it never closes.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__

# A shell ignores SIGINT for what it starts in the background, and children inherit that: the tests of Ctrl-C send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


shared_ray = SharedRay()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The same with SIGHUP, which `nohup` has ignored, and what ends well in an earlier test of this process too.
    Children of a process that handles it are as the system has it.
    """
    shared_ray.before(item)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda _number, _frame: None)


def pytest_sessionfinish() -> None:
    shared_ray.close()


@pytest.fixture(scope="module")
def local_ray() -> str:
    """The address of a Ray with two CPUs and no dashboard, which other files of tests share."""
    return shared_ray.address()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that this machine cannot run, and sort the files."""
    shared_ray.find_users(items)
    _skip(items)
    _longest_files_first(items)


def _longest_files_first(items: list[pytest.Item]) -> None:
    """Several processes end at about the same time if none of them begins a long file last."""
    seconds: dict[Path, float] = {}
    for item in items:
        cost = 30.0 if item.get_closest_marker("slow") else 10.0 if item.get_closest_marker("ray") else 0.3
        seconds[item.path] = seconds.get(item.path, 0.0) + cost
    items.sort(key=lambda item: -seconds[item.path])


def _skip(items: list[pytest.Item]) -> None:
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
