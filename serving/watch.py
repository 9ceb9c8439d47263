"""Looking after the application: until it answers, and for as long as it is served.

Ray Serve starts a replica that has died again and again, without end, and calls the application UNHEALTHY meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from cluster.errors import LoraloomError
from serving.failure import explain

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview

APPLICATION = "loraloom"
FRONT_APPLICATION = "loraloom-front"
FRONT = "Front"
POLL_S = 1.0
"""A look takes a tenth of a second of a slow core, which the start has better use for."""
HEARTBEAT_S = 10.0
START_LIMIT_S = 1800.0
"""A large base may have to be downloaded first; after this, something waits for what never comes."""
WATCH_S = 5.0
ILL_LIMIT_S = 60.0
"""How long a server may stay without a working replica, unless its start took long (see ``patience_s``)."""

Progress = Callable[[str], None]
Look = Callable[[], "ApplicationStatusOverview | None"]


class ServeFailedError(LoraloomError):
    """The engine or the front did not start, or has ended for good; the message holds what they said."""


class Course(NamedTuple):
    """What has been seen of a server since it first answered."""

    state: str = "RUNNING"
    """Ray Serve's name of the application's state, or ``MISSING``."""
    ill_since: float | None = None
    """When it was first seen in other states than RUNNING, without a break; None while it runs."""


def follow(course: Course, state: str, now: float) -> Course:
    """The course after ``state`` was seen at ``now``."""
    if state == "RUNNING":
        return Course(state)
    return Course(state, now if course.ill_since is None else course.ill_since)


def is_lost(course: Course, now: float, patience_s: float) -> bool:
    """True if nothing is left to wait for: Ray Serve has given up, or it has not come back for ``patience_s``."""
    if course.state == "DEPLOY_FAILED":
        return True
    return course.ill_since is not None and now - course.ill_since > patience_s


def patience_s(start_s: float) -> float:
    """How long to wait for a server that took ``start_s`` to start: a replica that starts again needs that too."""
    return max(ILL_LIMIT_S, 2 * start_s)


def state_of(application: ApplicationStatusOverview | None) -> str:
    """Its state; RUNNING too where a replica has died, or is being replaced, even in vain, but every deployment has
    another one that answers.
    """
    if application is None:
        return "MISSING"
    state = str(application.status.value)
    deployments = application.deployments.values()
    # Ray annotates the keys as an enumeration, and fills in strings.
    answers = all(cast("dict[str, int]", each.replica_states).get("RUNNING") for each in deployments)
    return "RUNNING" if state in {"UNHEALTHY", "DEPLOYING", "DEPLOY_FAILED"} and answers else state


def look() -> ApplicationStatusOverview | None:
    """What Ray Serve reports of the replicas, or of the front where that is ill; None if it reports nothing, or cannot
    be reached now.
    """
    from ray import serve
    from ray.exceptions import RayError

    try:
        applications = serve.status().applications
    except RayError:
        return None
    front = applications.get(FRONT_APPLICATION)
    if front is not None and str(front.status.value) in {"DEPLOY_FAILED", "UNHEALTHY"}:
        return front
    return applications.get(APPLICATION)


def rollout() -> str | None:
    """How the replacement of the replicas ended: "" if all new ones run, else why they do not start; None while it is
    under way.
    """
    application = look()
    state = "MISSING" if application is None else str(application.status.value)
    if state == "DEPLOY_FAILED":
        return _failure(application, "the new replicas do not start")
    return "" if state == "RUNNING" else None


def wait_until_running(progress: Progress, started: float, look: Look = look) -> None:
    """Poll the application's state until every replica answers.

    Raises:
        ServeFailedError: it did not start, or not within ``START_LIMIT_S`` of ``started``.
    """
    told, told_at = "", 0.0
    while True:
        application = look()
        state = str(application.status.value) if application else "NOT_STARTED"
        if state == "RUNNING":
            return
        if application and state in {"DEPLOY_FAILED", "UNHEALTHY"}:
            raise ServeFailedError(_failure(application, "the server did not start"))
        now, elapsed = _summary(application), time.monotonic() - started
        if elapsed > START_LIMIT_S:
            headline = f"the server does not answer {elapsed:.0f} s after its start ({now})"
            raise ServeFailedError(_failure(application, headline))
        if now != told or elapsed - told_at > HEARTBEAT_S:
            progress(f"{elapsed:5.1f} s  {now}")
            told, told_at = now, elapsed
        time.sleep(POLL_S)


def watch(
    progress: Progress,
    patience_s: float,
    look: Look = look,
    every_s: float = WATCH_S,
    each_time: Callable[[], None] = lambda: None,
) -> None:
    """Wait for ever, or until the server is lost.

    Args:
        progress: Called with a line for people whenever the state changes.
        patience_s: How long it may stay without a working replica.
        look: Reports the application.
        every_s: Seconds between two looks.
        each_time: Called before each look.

    Raises:
        ServeFailedError: the engine or the front has ended and does not come back.
    """
    course = Course()
    while True:
        time.sleep(every_s)
        each_time()
        application, now = look(), time.monotonic()
        before, course = course, follow(course, state_of(application), now)
        if is_lost(course, now, patience_s):
            raise ServeFailedError(_failure(application, f"the server has ended ({course.state})"))
        if course.state != before.state:
            ill = f"the server is {course.state}: {_summary(application)}"
            progress(ill if course.ill_since is not None else "the server answers again")


def _summary(application: ApplicationStatusOverview | None) -> str:
    if application is None or not application.deployments:
        return "waiting for Ray Serve"
    parts: list[str] = []
    for name, deployment in sorted(application.deployments.items()):
        state = {"UPDATING": "starting", "HEALTHY": "ready"}.get(
            deployment.status.value, deployment.status.value.lower()
        )
        parts.append(f"{'front' if name == FRONT else 'engine'} {state}")
    return ", ".join(parts)


def _failure(application: ApplicationStatusOverview | None, headline: str) -> str:
    from ray._private.worker import global_worker

    node = global_worker.node  # None where this process has joined a Ray through Ray Client
    logs = Path(node.get_logs_dir_path()) if node else None
    messages = [application.message] if application else []
    messages += [state.message for state in application.deployments.values()] if application else []
    return explain(messages, logs, headline)
