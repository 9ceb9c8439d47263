from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import ray

from cluster.connect import connect, join_trouble, traceback_reason
from cluster.errors import MachineError
from cluster.nodes import check_nodes
from cluster.reaper import SESSION_VARIABLE, session_processes
from cluster.spec import ClusterSpec
from tests.ports import free_port
from tests.ray_dashboard import ask
from tests.waiting import wait_until

SMALL = ClusterSpec(dashboard=False, object_store_memory_mib=100)


@ray.remote(num_cpus=0)
def variables(names: list[str]) -> list[str]:
    return [os.environ.get(name, "") for name in names]


def gone(session: str, within_s: float = 10.0) -> bool:
    """Whether the processes of a session end within a time."""
    _, alive = psutil.wait_procs(session_processes(session), timeout=within_s)
    return not alive


@pytest.mark.ray
def test_ray_starts_as_the_spec_says_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, short_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # left over from another day
    spec = SMALL.model_copy(update={"env": {"GREETING": "hello"}, "temp_dir": str(short_folder), "namespace": "mine"})
    with connect(spec, job_name="a name", cpus=3):
        greeting, session = ray.get(variables.remote(["GREETING", SESSION_VARIABLE]))
        assert greeting == "hello"
        assert ray.cluster_resources()["CPU"] == 3
        assert ray.get_runtime_context().namespace == "mine"
        (folder,) = short_folder.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        mine = psutil.Process().children(recursive=True)
        processes = session_processes(session)
        (reaper,) = filter(_is_reaper, mine)
        still = {child.pid for child in mine if child.is_running()}
        assert still - {reaper.pid} <= {item.pid for item in processes}
        with connect(job_name="inner"):
            assert ray.get(variables.remote(["GREETING"])) == ["hello"]
        assert ray.is_initialized()
        (node,) = check_nodes()
        assert node["cpus"] == 3
        assert node["trouble"] == ""
    assert not ray.is_initialized()
    assert not session_processes(session)
    assert not any(process.is_running() for process in {*processes, reaper})
    assert list(short_folder.iterdir()) == []
    assert SESSION_VARIABLE not in os.environ
    assert "GREETING" not in os.environ
    assert capfd.readouterr() == ("", "")


def _is_reaper(process: psutil.Process) -> bool:
    try:
        return any("cluster.reaper" in word for word in process.cmdline())
    except psutil.Error:  # it has just ended
        return False


@pytest.mark.ray
def test_beside_another_ray_the_dashboard_has_logs(short_folder: Path) -> None:
    """Where Ray's own port for the agent, which reads them, is taken."""
    spec = SMALL.model_copy(update={"dashboard": True, "dashboard_port": free_port(), "temp_dir": str(short_folder)})
    with socket.socket() as other:
        with contextlib.suppress(OSError):  # a Ray of another test may have it already
            other.bind(("", 52365))
            other.listen()
        with connect(spec, job_name="logs", cpus=1) as dashboard:
            node = ray.get_runtime_context().get_node_id()

            def logs() -> str:
                answer = ask(f"http://{dashboard}/api/v0/logs?node_id={node}")
                return answer.text if answer.is_success else ""

            assert "raylet.out" in wait_until(logs, timeout_s=60)


@pytest.mark.ray
def test_an_exception_ends_ray_too_and_logs_stay_where_they_are_wanted(short_folder: Path) -> None:
    spec = SMALL.model_copy(update={"temp_dir": str(short_folder), "keep_logs": True})
    seen: list[str] = []

    def work() -> None:
        with connect(spec, job_name="interrupted"):
            seen.extend(ray.get(variables.remote([SESSION_VARIABLE])))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert not ray.is_initialized()
    assert not session_processes(*seen)
    assert list(short_folder.glob("*/r/session_*/logs/raylet.out"))


@pytest.mark.ray
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_a_program_that_is_ended(end: signal.Signals, short_folder: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(short_folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert driver.stdout is not None
    with driver, driver.stdout:
        session = driver.stdout.readline().strip()
        time.sleep(2.5)  # as long as the reaper may take to learn of all
        processes = session_processes(session)
        assert len(processes) > 3
        driver.send_signal(end)
        if end == signal.SIGINT:
            time.sleep(0.3)
        if end != signal.SIGKILL:
            driver.send_signal(end)  # impatient, or `timeout`: must not cut the clearing short
        driver.wait(timeout=30)
        assert driver.returncode == {signal.SIGINT: -2, signal.SIGTERM: -2, signal.SIGKILL: -9}[end]
    # Also those that no longer carry the session's name.
    _, alive = psutil.wait_procs(processes, timeout=15)
    assert not alive
    assert gone(session)
    wait_until(lambda: not list(short_folder.iterdir()), timeout_s=5)


DRIVER = """
import os, sys, time
import ray
from cluster.connect import connect
from cluster.reaper import SESSION_VARIABLE
from cluster.spec import ClusterSpec

@ray.remote(num_cpus=0)
def session():
    return os.environ[SESSION_VARIABLE]

with connect(ClusterSpec(dashboard=False, object_store_memory_mib=100, temp_dir=sys.argv[1]), job_name="driver"):
    print(ray.get(session.remote()), flush=True)
    time.sleep(60)
"""


GUEST = """
import json, os, sys
import ray
from cluster.connect import connect
from cluster.spec import ClusterSpec

@ray.remote(num_cpus=0)
def look():
    import cluster.errors
    return os.environ["GREETING"], cluster.errors.__file__

for _ in range(2):
    with connect(ClusterSpec(address=sys.argv[1], env={"GREETING": "hello"}), job_name="guest"):
        print(json.dumps(ray.get(look.remote())))
    assert not ray.is_initialized()
"""


class RunningRay(NamedTuple):
    """A Ray that somebody else has started."""

    port: int
    """Of its control store."""
    client_port: int
    deaths: Path
    """For each file in this folder, a process that Ray Client starts for a client dies at once."""


@pytest.mark.ray
@pytest.mark.parametrize("client", [False, True], ids=["gcs", "client"])
def test_a_running_ray_is_joined_gets_our_code_and_goes_on(
    client: bool, running_ray: RunningRay, tmp_path: Path
) -> None:
    address = f"ray://127.0.0.1:{running_ray.client_port}" if client else f"127.0.0.1:{running_ray.port}"
    done = visit(address, tmp_path)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 2
    for greeting, source in answers:
        assert greeting == "hello"
        assert "py_modules_files" in source


@pytest.mark.ray
def test_a_client_server_that_dies_at_its_start_is_asked_for_again(running_ray: RunningRay, tmp_path: Path) -> None:
    (running_ray.deaths / "one").touch()
    done = visit(f"ray://127.0.0.1:{running_ray.client_port}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "died at its start; asking ray://" in done.stderr
    assert list(running_ray.deaths.iterdir()) == []


def test_the_last_line_of_a_servers_traceback_is_the_reason() -> None:
    trouble = ConnectionAbortedError(
        "Initialization failure from server:\nTraceback (most recent call last):\nE: why\n"
    )
    assert join_trouble("ray://h:1", trouble).startswith("cannot join Ray at ray://h:1: E: why")
    chained = [
        "Traceback (most",
        "  File",
        "ValueError: first",
        "",
        "During",
        "",
        "Traceback (most",
        "E: why",
        "and how",
    ]
    assert traceback_reason(chained) == "E: why"
    assert traceback_reason(["no", "such"]) is None
    assert join_trouble("h:1", ConnectionError("why\nand how")).startswith("cannot join Ray at h:1: why")


def test_what_is_missing_for_a_token_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode, words in ((None, "token: put its"), ("disabled", "token: set RAY_AUTH_MODE=token, and put its")):
        monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
        if mode is not None:
            monkeypatch.setenv("RAY_AUTH_MODE", mode)
        assert words in join_trouble("h:1", ConnectionError("why"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert "If it wants a token" not in join_trouble("h:1", ConnectionError("why"))


def visit(address: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run ``GUEST``: a program of its own, which nobody has told RAY_AUTH_MODE; elsewhere, so that its workers do not
    find our code here.
    """
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", GUEST, address],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


DYING = """
import os, sys

if "--mode=specific-server" in sys.orig_argv:
    for death in os.listdir({folder!r}):
        os.unlink(os.path.join({folder!r}, death))
        os._exit(1)
"""


@pytest.fixture(scope="module")
def running_ray() -> Iterator[RunningRay]:
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    deaths, code = folder / "deaths", folder / "code"
    deaths.mkdir()
    code.mkdir()
    (code / "sitecustomize.py").write_text(DYING.format(folder=str(deaths)))
    ports = free_port(), free_port()
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=1"]
    command += [f"--port={ports[0]}", f"--ray-client-server-port={ports[1]}", f"--temp-dir={folder}"]
    command += ["--include-dashboard=false", "--object-store-memory=100000000", "--disable-usage-stats"]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "PYTHONPATH": str(code)}
    environment["RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S"] = "12"  # how long the proxy waits for one that died
    with (folder / "out").open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as head:
        try:
            for port in ports:
                wait_for(port, head)
            yield RunningRay(*ports, deaths)
        finally:
            mine = psutil.Process(head.pid).children(recursive=True)
            head.terminate()
            head.wait(timeout=60)
            _, alive = psutil.wait_procs(mine, timeout=10)
            for process in alive:
                process.kill()
    shutil.rmtree(folder)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder for Ray; pytest's own have paths that are too long for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert server.poll() is None, "Ray ended before it listened"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    pytest.fail(f"nothing listens on {port}")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_answers_is_told_at_once(scheme: str) -> None:
    address = f"{scheme}127.0.0.1:{free_port()}"
    with (
        pytest.raises(MachineError, match=f"nothing answers at {address}"),
        connect(ClusterSpec(address=address), job_name="x"),
    ):
        pass


def test_a_dashboard_port_that_is_taken_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        spec = ClusterSpec(dashboard_port=other.getsockname()[1])
        with pytest.raises(MachineError, match=r"dashboard_port \d+ is taken"), connect(spec, job_name="x"):
            pass


def test_a_temporary_folder_that_cannot_be_made_is_told(short_folder: Path) -> None:
    (short_folder / "file").touch()
    spec = ClusterSpec(temp_dir=str(short_folder / "file"))
    with pytest.raises(MachineError, match="set temp_dir"), connect(spec, job_name="x"):
        pass


@pytest.mark.ray
def test_a_ray_that_does_not_start_is_told_and_cleared_away(short_folder: Path) -> None:
    spec = SMALL.model_copy(update={"temp_dir": str(short_folder), "object_store_memory_mib": 10**9})
    with pytest.raises(MachineError, match="Ray does not start"), connect(spec, job_name="x"):
        pass
    assert not ray.is_initialized()
    assert list(short_folder.iterdir()) == []
