"""Start, join and leave Ray, so that nothing of it is left when a command ends.

A Ray that is started here lives in a private folder and ends with the ``with`` block, whatever ends the block: an
exception and Ctrl-C too, and ``kill -9`` (see ``reaper``). One that is joined is only left again; this program's
packages travel to its workers.

Token authentication stays on, as Ray 2.60 has it by default: Ray's own ports listen on every interface of the machine
(it has no option for that), and the token is what keeps others out. A Ray that is joined is shown the token too, where
there is one; without RAY_AUTH_MODE, Ray itself does that for ``auto`` only. The dashboard listens on 127.0.0.1.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import uuid
from collections.abc import Generator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._private import parameter, services
from ray._private.authentication.authentication_token_setup import (
    generate_and_save_token,
    maybe_enable_token_auth_if_token_available,
)
from ray._raylet import AuthenticationTokenLoader  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import AuthenticationError, RayError
from ray.job_config import JobConfig

from cluster.errors import MachineError
from cluster.machine import port_is_free
from cluster.reaper import SESSION_VARIABLE, end_processes, reaper, session_processes
from cluster.signals import handle_sigterm, ignore_sigterm, uninterrupted
from cluster.spec import MAX_TEMP_DIR_BYTES, ClusterSpec

_log = logging.getLogger(__name__)
_PACKAGES = ("cluster", "serving", "tuning")
_JOIN_TIMEOUT_S = 5.0
_CLIENT_TRIES = 3
_NICENESS = "RAY_worker_niceness"
AUTH_MODE = "RAY_AUTH_MODE"
METRICS_EVERY_S = 5.0
"""Seconds between two exports of a process's figures, in a Ray that is started here; Ray's own default is ten."""
_METRICS_INTERVAL = "metrics_report_interval_ms"


@contextlib.contextmanager
def connect(
    spec: ClusterSpec | None = None,
    *,
    job_name: str,
    cpus: int | None = None,
    log_to_driver: bool = False,
    yields_to_others: bool = True,
    variables: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Generator[str | None]:
    """Run the block inside the Ray that ``spec`` describes; ``None`` starts one with Ray's defaults.

    Inside another ``connect``, or where this process has called ``ray.init`` itself, nothing is started or ended.

    Args:
        spec: where work runs.
        job_name: what the dashboard's list of jobs shows.
        cpus: CPUs of a Ray that is started here, where ``spec.num_cpus`` does not say.
        log_to_driver: print what the workers print.
        yields_to_others: Workers of a Ray that is started here let all other programs of the machine go first (Ray
            starts them at niceness 15). False gives them an equal share: somebody waits for their answers.
        variables: more environment variables for a Ray that is started here.
        metadata: what else the dashboard's API tells of the job (Ray Client cannot carry it).

    Yields:
        The dashboard's ``HOST:PORT``; None where there is none, or where nothing was started or joined.

    Raises:
        MachineError: Ray cannot be started or joined; the message says what to do.
    """
    if ray.is_initialized():
        yield None
        return
    spec = spec or ClusterSpec()
    job = JobConfig(metadata={"job_name": job_name, **(metadata or {})}, ray_namespace=spec.namespace)
    common: dict[str, Any] = {
        "log_to_driver": log_to_driver,
        "logging_level": logging.WARNING,
        "namespace": spec.namespace,
    }
    more = {**({} if yields_to_others else {_NICENESS: "0"}), **(variables or {})}
    enter = (
        _started(spec, job, cpus, common, more) if spec.address is None else _joined(spec, spec.address, job, common)
    )
    with _signals_restored(), enter as dashboard:
        yield dashboard or None


@contextlib.contextmanager
def _started(
    spec: ClusterSpec, job: JobConfig, cpus: int | None, common: dict[str, Any], variables: Mapping[str, str]
) -> Generator[str | None]:
    """Start Ray in a folder of its own, with more environment ``variables``; end its processes and remove the folder on
    the way out.
    """
    if spec.dashboard_port is not None and not port_is_free(spec.dashboard_port):
        raise MachineError(
            f"dashboard_port {spec.dashboard_port} is taken; choose another, or null for the next free one"
        )
    folder = make_folder(spec.temp_dir)
    session = uuid.uuid4().hex
    variables = {SESSION_VARIABLE: session, **variables, **spec.env}
    with reaper(session, None if spec.keep_logs else folder):
        try:
            try:
                with environment(variables), _quiet_auth(), _own_groups(), _own_agent_port():
                    ensure_token()
                    context: Any = ray.init(
                        address="local",  # a new Ray even where RAY_ADDRESS is set
                        num_cpus=spec.num_cpus or cpus,
                        num_gpus=spec.num_gpus,
                        object_store_memory=spec.object_store_memory_mib and spec.object_store_memory_mib * 2**20,
                        include_dashboard=spec.dashboard,
                        dashboard_host="127.0.0.1",
                        dashboard_port=spec.dashboard_port,
                        job_config=job,
                        _system_config=system_config(os.environ),
                        _temp_dir=str(folder / "r"),  # a level deeper: Ray makes this folder writable for everybody
                        **common,
                    )
            except (OSError, RuntimeError, ValueError) as error:
                raise MachineError(f"Ray does not start: {error}\nTry `loraloom doctor`.") from error
            handle_sigterm()  # again: Ray has set a handler that ends Ray first, whose library then aborts the program
            yield context.dashboard_url
        finally:
            with uninterrupted():
                before = session_processes(session)
                ray.shutdown()
                ignore_sigterm()  # again: Ray's library has let go of it
                end_processes(before | session_processes(session))
                if not spec.keep_logs:
                    shutil.rmtree(folder, ignore_errors=True)


def system_config(variables: Mapping[str, str]) -> dict[str, Any]:
    """Ray's internal settings for one that is started here, where ``variables``, its environment, do not say: the
    processes that join it take them from there.
    """
    return {} if f"RAY_{_METRICS_INTERVAL}" in variables else {_METRICS_INTERVAL: int(1000 * METRICS_EVERY_S)}


@contextlib.contextmanager
def _joined(spec: ClusterSpec, address: str, job: JobConfig, common: dict[str, Any]) -> Generator[str | None]:
    """Join a running Ray, and leave it again."""
    if address != "auto":
        _require_listener(address)
    runtime_env: dict[str, Any] = {}
    if spec.env:
        runtime_env["env_vars"] = dict(spec.env)
    if spec.ship_code:
        root = Path(__file__).resolve().parent.parent
        runtime_env["py_modules"] = [str(root / name) for name in _PACKAGES]
    if not address.startswith("ray://"):
        common = {**common, "job_config": job}  # Ray Client cannot carry one: the job goes without a name there
    context: Any = None
    for tries_left in reversed(range(_CLIENT_TRIES)):
        try:
            with _quiet_auth():
                maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
                context = ray.init(address=address, runtime_env=runtime_env, **common)
            break
        except (OSError, RuntimeError, RayError) as error:
            if not tries_left or not _client_server_died(error):
                raise MachineError(join_trouble(address, error)) from error
            _log.warning("Ray's server for this client died at its start; asking %s for another", address)
    handle_sigterm()
    try:
        yield context.dashboard_url
    finally:
        with uninterrupted():
            ray.shutdown()


def make_folder(parent: str | None) -> Path:
    """A new folder for Ray that only this user can enter, with a path short enough for sockets."""
    base = Path(parent or tempfile.gettempdir())
    if parent is None and len(str(base).encode()) > MAX_TEMP_DIR_BYTES:
        base = Path("/tmp")  # noqa: S108 -- TMPDIR is too long for sockets; mkdtemp makes a private folder in it
    try:
        base.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="loom-", dir=base))
    except OSError as error:
        raise MachineError(f"{base}: Ray's folder cannot be made here ({error.strerror}); set temp_dir") from error


def _require_listener(address: str) -> None:
    """Ask the port first: Ray itself waits for minutes where nobody answers."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_JOIN_TIMEOUT_S).close()
    except OSError as error:
        raise MachineError(
            f"nothing answers at {address} ({error}); is that Ray running, and is this its port?"
        ) from error


def _client_server_died(error: Exception) -> bool:
    """True if the process that Ray Client starts for each client ended before it could serve.

    On a busy machine that happens by chance, for it is forked from a process that runs gRPC's threads, and the next one
    lives (https://github.com/ray-project/ray/pull/63408). The proxy sees a zombie, or that it ended, or waits in vain.
    """
    signs = ("ZombieProcess", "Starting Ray client server failed", "Proxy failed to Connect to backend")
    return isinstance(error, ConnectionAbortedError) and any(sign in str(error) for sign in signs)


def join_trouble(address: str, error: Exception) -> str:
    """Why Ray at ``address`` cannot be joined, and what to do: the server's own reason where it sends a traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = traceback_reason(lines) or lines[0]
    if address == "auto" and "RAY_ADDRESS" not in os.environ:
        return f"no Ray is running on this machine ({reason}); start one with `ray start --head`, or leave address out"
    told = f" (RAY_ADDRESS={os.environ['RAY_ADDRESS']})" if address == "auto" else ""
    trouble = f"cannot join Ray at {address}{told}: {reason}"
    if os.environ.get(AUTH_MODE) != "token":  # there is none, or the user does not want it
        mode = f"set {AUTH_MODE}=token, and " if AUTH_MODE in os.environ else ""
        trouble += f"\nIf it wants a token: {mode}put its `ray get-auth-token` into ~/.ray/auth_token"
    return trouble


def traceback_reason(lines: list[str]) -> str | None:
    """The exception's own line, the first one, of the last traceback that is in the lines; None where there is none."""
    last = max((index for index, line in enumerate(lines) if line.startswith("Traceback")), default=len(lines))
    return next((line for line in lines[last + 1 :] if line.strip() and not line[0].isspace()), None)


def asks_for_token(variables: Mapping[str, str]) -> bool:
    """Whether a Ray that is started here with these ``variables`` of the user's asks for its token."""
    return {**os.environ, **variables}.get(AUTH_MODE, "token").lower() == "token"


def ensure_token() -> None:
    """Have a token where Ray looks for it, readable for its owner alone, unless RAY_AUTH_MODE says that none counts.

    ``ray start`` makes none, and goes without authentication where there is none; ``ray.init`` leaves the file's mode
    to the umask.

    Raises:
        MachineError: there is none, and it cannot be made.
    """
    if os.environ.get(AUTH_MODE, "token").lower() != "token":
        return
    loader = AuthenticationTokenLoader.instance()
    loader.reset_cache()
    try:
        if not loader.has_token(ignore_auth_mode=True):
            with _private_files(), _quiet_auth():
                generate_and_save_token()
            loader.reset_cache()
    except OSError as error:
        raise MachineError(f"Ray's token cannot be made: {error.filename}: {error.strerror}") from error
    except AuthenticationError as error:
        raise MachineError(f"Ray's token cannot be read: {str(error).partition('. ')[0]}") from error
    token = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):
        if token.stat().st_mode & 0o077:
            token.chmod(0o600)


@contextlib.contextmanager
def _private_files() -> Generator[None]:
    """What is made in the block is its owner's alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Generator[None]:
    """Set variables for the processes that are started in the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet_auth() -> Generator[None]:
    """Ray announces at every start that token authentication is on, and that it has made a token; so it should be."""
    logger = logging.getLogger("ray._private.authentication.authentication_token_setup")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _own_groups() -> Generator[None]:
    """Have Ray start its processes in groups of their own.

    What ends this program's group with a signal, as ``timeout`` does, would else end Ray first, and the trials with it.
    """
    plain: Any = services.ConsolePopen  # pyright: ignore[reportPrivateImportUsage]
    services.ConsolePopen = partial(plain, process_group=0)  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield
    finally:
        services.ConsolePopen = plain  # pyright: ignore[reportPrivateImportUsage]


@contextlib.contextmanager
def _own_agent_port() -> Generator[None]:
    """Have the kernel choose the port of the node's agent, as it does the others.

    ``ray.init`` takes 52365 and has no word for another. Where a second Ray of this machine has that, the agent goes on
    without being known to the dashboard, which then answers 500 for every log.
    """
    module: Any = parameter
    plain = module.RayParams
    module.RayParams = partial(plain, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        module.RayParams = plain


@contextlib.contextmanager
def _signals_restored() -> Generator[None]:
    """Leave SIGTERM as it was before: Ray sets a handler, and so do we."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
