"""One Ray for all tests of a process that need an ordinary one: to start and end it costs ten seconds."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

FIXTURE = "local_ray"


class SharedRay:
    """Starts at the first use. Ends before a test of a file that does not use it: such files start their own."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._address = ""
        self._files: set[Path] = set()

    def find_users(self, items: list[pytest.Item]) -> None:
        """Remember the files with a test that uses it."""
        self._files = {item.path for item in items if FIXTURE in getattr(item, "fixturenames", ())}

    def address(self) -> str:
        """Start it if it does not run; returns the ``HOST:PORT`` at which other processes can join."""
        if not self._address:
            import ray

            from cluster.connect import connect
            from cluster.spec import ClusterSpec

            spec = ClusterSpec(dashboard=False, num_cpus=2, num_gpus=0)
            self._open.enter_context(connect(spec, job_name="tests"))
            self._address = ray.get_runtime_context().gcs_address
        return self._address

    def before(self, item: pytest.Item) -> None:
        """End it if ``item`` is in a file that does not use it."""
        if item.path not in self._files:
            self.close()

    def close(self) -> None:
        """End it, with everything that tests have left in it."""
        self._address = ""
        self._open.close()
