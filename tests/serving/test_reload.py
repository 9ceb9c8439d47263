from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import NotFoundError
from cluster.schema import parse_spec
from serving.reload import Reload, fixed_faults, on_hangup
from serving.spec import ServeSpec


def spec(**fields: Any) -> ServeSpec:
    return parse_spec({"base": {"model": "/models/tiny"}, "registry": "/registry", **fields}, ServeSpec, "serve.yaml")


class Server:
    """A file that changes, and what the server did."""

    def __init__(self) -> None:
        self.file: ServeSpec | Exception = spec()
        self.restarts: list[ServeSpec] = []
        self.told: list[str] = []
        self.outcome: str | None = None
        self.reload = Reload(spec(), self.read, self.restarts.append, lambda: self.outcome, self.told.append)

    def read(self) -> ServeSpec:
        if isinstance(self.file, Exception):
            raise self.file
        return self.file


def test_nothing_happens_unless_it_is_asked_for() -> None:
    server = Server()
    server.reload.look()
    assert (server.restarts, server.told) == ([], [])


def test_a_hangup_reads_the_file_and_restarts_once() -> None:
    server = Server()
    server.file = spec(pin=["support"])
    before = signal.getsignal(signal.SIGHUP)
    with on_hangup(server.reload):
        os.kill(os.getpid(), signal.SIGHUP)
        server.reload.look()
        server.reload.look()
    assert signal.getsignal(signal.SIGHUP) == before
    assert server.restarts == [server.file]
    assert "reloaded" in server.told[0]


@pytest.mark.parametrize(
    ("after", "fixed"),
    [
        (spec(), []),
        (spec(engine={"max_loras": 2}, pin=["support"], queue={"waiting": 5}), []),
        (spec(replicas=2, http={"port": 1}), ["http.port", "replicas"]),
        (
            spec(base={"model": "/models/tiny", "name": "other"}, cluster={"num_cpus": 1}),
            ["base.served_name", "cluster"],
        ),
        (spec(base={"model": "/models/other"}, drain_s=1), ["base.served_name", "drain_s"]),
        (spec(base={"model": "/models/new/tiny"}), []),
    ],
)
def test_what_only_a_new_start_can_change(after: ServeSpec, fixed: list[str]) -> None:
    assert [fault.where for fault in fixed_faults(spec(), after)] == fixed


@pytest.mark.parametrize("file", [spec(replicas=2), NotFoundError("serve.yaml: no such file")])
def test_a_file_that_cannot_be_used_changes_nothing(file: ServeSpec | Exception, tmp_path: Path) -> None:
    server = Server()
    server.file = file
    server.reload.ask()
    server.reload.look()
    assert server.restarts == []
    assert "goes on as it was" in server.told[0]
    server.file = spec()
    server.reload.ask()
    server.reload.look()
    assert len(server.restarts) == 1


def changed(server: Server, file: ServeSpec) -> None:
    server.file = file
    server.reload.ask()
    server.reload.look()


def test_replicas_that_do_not_start_are_given_up() -> None:
    server = Server()
    server.outcome = "an old failure is nothing to us"
    server.reload.look()
    assert server.restarts == []
    server.outcome = None
    changed(server, spec(engine={"max_loras": 2}))
    server.reload.look()
    server.outcome = "the new replicas do not start: no memory"
    server.reload.look()
    assert server.restarts == [server.file, spec()]
    assert "no memory" in server.told[-1]
    server.reload.look()
    assert len(server.restarts) == 2


def test_what_has_come_through_is_not_gone_back_from() -> None:
    server = Server()
    changed(server, spec(engine={"max_loras": 2}))
    server.outcome = ""
    server.reload.look()
    server.outcome = "a replica that died much later"
    server.reload.look()
    assert server.restarts == [server.file]


def test_what_has_never_run_is_not_gone_back_to() -> None:
    server = Server()
    changed(server, spec(engine={"max_loras": 2}))
    changed(server, spec(engine={"max_loras": 3}))
    server.outcome = "no memory"
    server.reload.look()
    assert server.restarts[-1] == spec()
