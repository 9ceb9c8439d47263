from __future__ import annotations

import time
from collections.abc import Iterator
from typing import cast

import pytest

from serving import watch as watching
from serving.quiet import quiet
from serving.watch import Course, ServeFailedError, follow, is_lost, patience_s, state_of, wait_until_running, watch

with quiet():  # Ray Serve warns at its import
    from ray.serve._private.common import DeploymentStatus, DeploymentStatusTrigger, ReplicaState
    from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatusOverview


def application(state: str, replicas: dict[str, int] | None = None, message: str = "") -> ApplicationStatusOverview:
    deployment = DeploymentStatusOverview(
        status=DeploymentStatus.UNHEALTHY if state == "UNHEALTHY" else DeploymentStatus.UPDATING,
        status_trigger=DeploymentStatusTrigger.UNSPECIFIED,
        replica_states=cast("dict[ReplicaState, int]", replicas or {}),  # strings, as Ray itself fills in
        message=message,
    )
    return ApplicationStatusOverview(
        status=ApplicationStatus(state), message="", last_deployed_time_s=0, deployments={"engine": deployment}
    )


def course(*seen: tuple[str, float]) -> Course:
    result = Course()
    for state, now in seen:
        result = follow(result, state, now)
    return result


@pytest.mark.parametrize(
    ("seen", "now", "lost"),
    [
        ([("RUNNING", 0)], 1000, False),
        ([("DEPLOY_FAILED", 0)], 0, True),
        ([("UNHEALTHY", 10)], 70, False),
        ([("UNHEALTHY", 10)], 71, True),
        ([("UNHEALTHY", 10), ("MISSING", 40), ("UNHEALTHY", 60)], 71, True),
        ([("UNHEALTHY", 10), ("RUNNING", 40), ("UNHEALTHY", 60)], 120, False),
    ],
)
def test_when_a_server_is_lost(seen: list[tuple[str, float]], now: float, lost: bool) -> None:
    assert is_lost(course(*seen), now, patience_s(start_s=30)) is lost


def test_patience_is_longer_where_the_start_is() -> None:
    assert (patience_s(5), patience_s(100)) == (60, 200)


def test_a_server_with_another_replica_that_answers_is_not_ill() -> None:
    assert state_of(application("UNHEALTHY", {"RUNNING": 1, "STARTING": 1})) == "RUNNING"
    assert state_of(application("UNHEALTHY", {"RUNNING": 0, "STARTING": 2})) == "UNHEALTHY"
    assert state_of(application("DEPLOYING", {"RUNNING": 1, "STOPPING": 1})) == "RUNNING"
    assert state_of(application("DEPLOYING", {"STARTING": 1})) == "DEPLOYING"
    assert state_of(application("DEPLOY_FAILED", {"RUNNING": 1})) == "RUNNING"
    assert state_of(application("DEPLOY_FAILED", {"STARTING": 1})) == "DEPLOY_FAILED"
    assert state_of(None) == "MISSING"


def test_watching_tells_changes_and_ends_with_the_reason() -> None:
    reports: Iterator[ApplicationStatusOverview] = iter(
        [
            application("RUNNING"),
            application("UNHEALTHY"),
            application("UNHEALTHY"),
            application("RUNNING"),
            application("DEPLOY_FAILED", message="Traceback\nRuntimeError: no memory"),
        ]
    )
    told: list[str] = []
    with pytest.raises(ServeFailedError, match=r"(?s)the server has ended \(DEPLOY_FAILED\):.*RuntimeError: no memory"):
        watch(told.append, 60, lambda: next(reports), every_s=0)
    assert told == ["the server is UNHEALTHY: engine unhealthy", "the server answers again"]


def test_a_start_has_a_limit() -> None:
    late = time.monotonic() - watching.START_LIMIT_S - 1
    told: list[str] = []
    with pytest.raises(ServeFailedError, match=r"does not answer 180\d s after its start \(engine starting\)"):
        wait_until_running(told.append, late, lambda: application("DEPLOYING"))
    wait_until_running(told.append, late, lambda: application("RUNNING"))
    assert told == []
