"""A real sweep, as Ray's own dashboard and a real Prometheus show it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
import yaml

from cluster.prometheus import GRAFANA
from tests.ports import free_port
from tests.ray_dashboard import ask as ask_dashboard
from tests.ray_dashboard import read_token
from tests.tuning.make import sweep_document, write_rows
from tests.waiting import wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Running:
    """A sweep that runs, and Ray's dashboard."""

    process: subprocess.Popen[str]
    folder: Path
    temp: Path
    url: str
    stderr: Path

    def get(self, path: str) -> Any:
        """What the dashboard's API answers."""
        return ask_dashboard(self.url + path).raise_for_status().json()

    def log(self, label: str) -> str:
        """An actor's log; empty where there is none yet, as until the agent that reads it is known to the dashboard."""
        (actor,) = [actor for actor in self.actors() if actor["reprName"] == label]
        path = f"/api/v0/logs/file?node_id={actor['address']['nodeId']}&actor_id={actor['actorId']}&lines=-1"
        answer = ask_dashboard(self.url + path)
        return answer.text if answer.is_success else ""

    def actors(self) -> list[dict[str, Any]]:
        return list(self.get("/logical/actors")["data"]["actors"].values())

    def sidecar(self) -> psutil.Process:
        """The process behind the tab Metrics."""
        children = psutil.Process(self.process.pid).children()
        (found,) = [child for child in children if "tuning.compare.sidecar" in child.cmdline()]
        return found

    def host(self) -> psutil.Process:
        """The process that holds the base."""
        (pid,) = [actor["pid"] for actor in self.actors() if str(actor["reprName"]).startswith("host ")]
        return psutil.Process(pid)


@pytest.fixture(scope="module")
def sweep(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two trials that go on until they are told to stop, on one host."""
    folder = tmp_path_factory.mktemp("dashboard")
    temp = Path(tempfile.mkdtemp(prefix="d-", dir="/tmp"))
    document = sweep_document(
        tiny_base,
        write_rows(folder / "rows.jsonl"),
        name="shown",
        train={"steps": 1_000_000, "eval_every": 20, "batch_size": 2},
        space={"rank": {"choice": [2, 8]}, "target_modules": {"choice": [["q_proj", "v_proj"]]}},
        search={"algorithm": "grid"},
        cluster={
            "num_cpus": 2,
            "num_gpus": 0,
            "temp_dir": str(temp),
            "dashboard_port": free_port(),
            "object_store_memory_mib": 100,
        },
    )
    (folder / "sweep.yaml").write_text(yaml.safe_dump(document))
    command = [sys.executable, str(ROOT / "loraloom.py"), "sweep", "sweep.yaml", "--dir", "out"]
    stderr = folder / "stderr"
    # The tests' own machine may have a Grafana.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_GRAFANA", "RAY_PROMETHEUS"))
    }
    with (
        stderr.open("w") as errors,
        subprocess.Popen(command, cwd=folder, stderr=errors, text=True, env=environment) as process,
    ):
        try:
            url = f"http://127.0.0.1:{document['cluster']['dashboard_port']}"
            running = Running(process, folder / "out", temp, url, stderr)

            def has_begun() -> bool:
                return all(len(reports(running, trial)) > 1 for trial in ("t000", "t001"))

            wait_until(has_begun, process, timeout_s=240)  # a busy machine takes its time
            yield running
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(60)
            shutil.rmtree(temp, ignore_errors=True)


def reports(running: Running, trial: str) -> list[dict[str, Any]]:
    path = running.folder / trial / "result.json"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


LABELS = {
    f"t00{index} rank={rank} alpha={2 * rank} targets=q_proj,v_proj lr=0.0002" for index, rank in enumerate((2, 8))
}


def test_trials_and_hosts_read_as_themselves(sweep: Running) -> None:
    told = (
        rf"^dashboard  {re.escape(sweep.url)}; its tab Metrics compares the trials \(from afar, tunnel port \d+ too\); "
        r"the token it asks for: ray get-auth-token$"
    )
    assert re.search(told, sweep.stderr.read_text(), re.MULTILINE)
    wanted = {*LABELS, "host cpu slots=4 sweep=shown", "broker sweep=shown"}
    wait_until(lambda: wanted <= {actor["reprName"] for actor in sweep.actors()})


def test_tasks_and_job_progress_read_as_trials(sweep: Running) -> None:
    def tasks() -> set[str]:
        return {task["name"] for task in sweep.get("/api/v0/tasks?detail=1&limit=1000")["data"]["result"]["result"]}

    wait_until(lambda: {f"{label}.train" for label in LABELS} <= tasks())
    job = sweep.get("/api/jobs/")[0]["job_id"]
    query = f"filter_keys=job_id&filter_predicates==&filter_values={job}&summary_by=lineage"

    def progress() -> str:
        return json.dumps(sweep.get(f"/api/v0/tasks/summarize?{query}"))

    wait_until(lambda: all(label in progress() for label in LABELS))


def test_the_job_carries_the_sweep_s_name(sweep: Running) -> None:
    (job,) = sweep.get("/api/jobs/")
    assert job["metadata"]["job_name"] == "sweep shown"


def test_log_prefixes_read_as_trials(sweep: Running) -> None:
    """Before a worker's lines Ray puts what its log says in a line that begins with `:actor_name:`."""
    for label in (*LABELS, "host cpu slots=4 sweep=shown"):
        log = wait_until(lambda label=label: sweep.log(label))
        assert f":actor_name:{label}\n" in log


def test_the_tab_metrics_is_the_comparison_and_nobody_else_can_read_it(sweep: Running) -> None:
    answer = sweep.get("/api/grafana_health")
    assert answer["result"], answer

    def health() -> bool:
        try:
            return sweep.get("/api/prometheus_health")["result"]
        except httpx.HTTPStatusError:  # Ray itself gives our page five seconds
            return False

    wait_until(health)
    place = answer["data"]["grafanaHost"]
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{24,}", place)
    document = httpx.get(f"{place}/data.json", timeout=30).json()
    (shown,) = document["sweeps"]
    assert {trial["name"]: trial["knobs"]["rank"] for trial in shown["trials"]} == {"t000": 2, "t001": 8}
    assert shown["state"] == "running"
    assert httpx.get(f"{place.rpartition('/')[0]}/data.json", timeout=30).status_code == 404
    assert httpx.get(f"{sweep.url}/api/grafana_health", timeout=30).status_code == 401
    assert place.rpartition("/")[2] not in " ".join(sweep.sidecar().cmdline())
    assert sweep.sidecar().nice() > psutil.Process().nice(), "trials that train on the same cores go first"


@pytest.mark.browser
def test_in_ray_s_dashboard_the_tab_shows_the_trials(sweep: Running, browser: Browser) -> None:
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    context.add_cookies([{"name": "ray-authentication-token", "value": read_token(), "url": sweep.url}])
    page = context.new_page()
    ours = sweep.get("/api/grafana_health")["data"]["grafanaHost"].rpartition("/")[0] + "/"
    complaints: list[str] = []  # of our page: those of Ray's own scripts are none of ours

    def hear(said: ConsoleMessage) -> None:
        if said.type in ("error", "warning") and said.location["url"].startswith(ours):
            complaints.append(said.text)

    page.on("console", hear)
    page.on("pageerror", lambda error: complaints.append(str(error)) if ours in (error.stack or "") else None)
    page.goto(f"{sweep.url}/#/metrics")
    frame = page.frame_locator("iframe").first
    frame.locator("tr[data-key='out/t001']").wait_for(timeout=60_000)
    assert "not Grafana" in frame.locator("#note").inner_text()
    before = int(frame.locator("tr[data-key='out/t001'] td[data-column=steps]").inner_text())
    wait_until(lambda: int(frame.locator("tr[data-key='out/t001'] td[data-column=steps]").inner_text()) > before)
    assert complaints == []
    context.close()


@contextlib.contextmanager
def prometheus(folder: Path) -> Generator[str]:
    """As `loraloom metrics` starts it; its address."""
    command = [sys.executable, str(ROOT / "loraloom.py"), "metrics", "--json", f"--port={free_port()}"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield json.loads(process.stdout.readline())["url"]
        finally:
            family = psutil.Process(process.pid).children()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert not any(child.is_running() for child in family)


def ask(prometheus: str, query: str) -> list[dict[str, Any]]:
    """An instant query's answer; none while it is not up."""
    try:
        answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": query}, timeout=30)
    except httpx.TransportError:
        return []
    return answer.json()["data"]["result"] if answer.status_code == 200 else []


@pytest.mark.prometheus
def test_prometheus_has_the_series_while_it_runs_and_afterwards(sweep: Running, tmp_path: Path) -> None:
    """The last test of the sweep: it ends it."""
    eval_loss = 'ray_loraloom_trial_eval_loss{sweep="shown",trial="t001"}'
    with prometheus(tmp_path) as server:
        found = wait_until(lambda: ask(server, eval_loss))
        tags = found[0]["metric"]
        assert {key: tags[key] for key in ("sweep", "trial", "rank", "alpha", "targets")} == {
            "sweep": "shown", "trial": "t001", "rank": "8", "alpha": "16", "targets": "q_proj+v_proj",
        }  # fmt: skip
        assert re.fullmatch(r".+ 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d", tags["run"])
        for name in ("train_loss", "tokens_per_second", "steps"):
            assert wait_until(lambda name=name: ask(server, f'ray_loraloom_trial_{name}{{sweep="shown"}}'))
        wait_until(lambda: ask(server, 'ray_loraloom_trial_state{sweep="shown",state="running",trial="t000"} == 1'))
        slots = wait_until(lambda: ask(server, 'ray_loraloom_host_slots_used{device="cpu",sweep="shown"}'))
        assert slots[0]["value"][1] == "2"
        efficiency = wait_until(lambda: ask(server, 'ray_loraloom_host_pack_efficiency{sweep="shown"}'))
        assert 0.1 < float(efficiency[0]["value"][1]) <= 1
        memory = wait_until(lambda: ask(server, 'ray_loraloom_host_memory_bytes{sweep="shown"}'))
        assert float(memory[0]["value"][1]) > 1e8

        for panel in json.loads(GRAFANA.read_text())["panels"]:
            for target in panel["targets"]:
                query = target["expr"].replace("$sweep", "shown").replace("$run", ".*").replace("$__range", "5m")
                series = wait_until(lambda query=query: ask(server, query))
                labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
                assert all(labels <= one["metric"].keys() for one in series), (panel["title"], series)

        # Nothing is reported any more, for more than forty seconds: the driver keeps the series alive.
        host = sweep.host()
        host.suspend()
        try:
            time.sleep(10)  # a report may have been on its way
            last = reports(sweep, "t001")[-1]["eval_loss"]
            time.sleep(45)
            assert reports(sweep, "t001")[-1]["eval_loss"] == last
            value = ask(server, f"timestamp({eval_loss})")
            assert value
            assert time.time() - float(value[0]["value"][1]) < 15, "scraped just now, not remembered"
            assert float(ask(server, eval_loss)[0]["value"][1]) == pytest.approx(last)
        finally:
            host.resume()

        sidecar = sweep.sidecar()
        sweep.process.send_signal(signal.SIGTERM)
        assert sweep.process.wait(90) == 130
        after = ask(server, f"last_over_time({eval_loss}[1h])")
        assert len(after) == 1
        assert float(after[0]["value"][1]) > 0
        state = 'last_over_time(ray_loraloom_trial_state{sweep="shown"}[1h]) == 1'
        ends = {(one["metric"]["trial"], one["metric"]["state"]) for one in ask(server, state)}
        assert ends == {("t000", "stopped"), ("t001", "stopped")}, "the driver has waited until its end was told"
    assert not sidecar.is_running(), "the page ends with the sweep"
