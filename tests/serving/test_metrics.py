from __future__ import annotations

import asyncio
import re
import urllib.request
from typing import Any

import pytest
import ray

from serving.metrics import FORGOTTEN_AFTER_S, MAX_LABELS, MAX_LABELS_EVER, MAX_SAMPLES, METRICS, OTHER, Labels, Metrics
from tests.waiting import wait_until


def test_names_and_units_are_as_prometheus_wants_them() -> None:
    for name, metric in METRICS.items():
        assert re.fullmatch(r"loraloom_[a-z_]+", name)
        assert name.endswith("_total") == (metric.kind == "counter")
        assert name.endswith("_seconds") == (metric.kind == "histogram")
        assert list(metric.boundaries) == sorted(metric.boundaries)


def test_a_request_is_counted_by_adapter_and_by_key() -> None:
    metrics = Metrics()
    for _ in range(2):
        metrics.request("support@7", "alice", 200, prompt_tokens=10, completion_tokens=5, queue_s=0.1)
    metrics.request("base", "bob", 429, error="queue_full")
    assert dict(metrics.pending()) == {
        ("loraloom_requests_total", ("support", "7", "200")): 2,
        ("loraloom_key_requests_total", ("alice", "200")): 2,
        ("loraloom_prompt_tokens_total", ("support", "7")): 20,
        ("loraloom_completion_tokens_total", ("support", "7")): 10,
        ("loraloom_key_tokens_total", ("alice", "prompt")): 20,
        ("loraloom_key_tokens_total", ("alice", "completion")): 10,
        ("loraloom_requests_total", ("base", "", "429")): 1,
        ("loraloom_key_requests_total", ("bob", "429")): 1,
        ("loraloom_errors_total", ("base", "", "queue_full")): 1,
    }


def test_labels_are_bounded() -> None:
    metrics = Metrics()
    for number in range(1000):
        metrics.request(f"a{number}@1", f"k{number}", 200, queue_s=0.1)
    pending = metrics.pending()
    requests = {tags: count for (name, tags), count in pending.items() if name == "loraloom_requests_total"}
    assert len(requests) == MAX_LABELS + 1
    assert requests[OTHER, "", "200"] == 1000 - MAX_LABELS
    assert pending["loraloom_key_requests_total", (OTHER, "200")] == 1000 - MAX_LABELS
    assert len(vars(metrics)["_samples"]) == MAX_LABELS + 1


def test_a_label_that_is_out_of_use_makes_room_for_a_new_one() -> None:
    now = 0.0
    labels = Labels(2, clock=lambda: now)
    assert [labels.bounded(value) for value in ("a@1", "b@1", "a@2")] == ["a@1", "b@1", OTHER]
    now = FORGOTTEN_AFTER_S / 2
    assert labels.bounded("a@1") == "a@1"
    now = FORGOTTEN_AFTER_S
    assert [labels.bounded(value) for value in ("a@2", "b@1", "a@1")] == ["a@2", OTHER, "a@1"]


def test_labels_are_bounded_over_all_time_too() -> None:
    now = 0.0
    labels = Labels(2, clock=lambda: now)
    given: list[str] = []
    for number in range(2 * MAX_LABELS_EVER):
        now += FORGOTTEN_AFTER_S
        given.append(labels.bounded(f"a@{number}"))
    assert len(set(given) - {OTHER}) == MAX_LABELS_EVER
    now += FORGOTTEN_AFTER_S
    assert labels.bounded("a@0") == "a@0"


def test_without_ray_everything_is_kept_within_bounds() -> None:
    assert not ray.is_initialized()
    metrics = Metrics()
    metrics.watch("loraloom_requests_waiting", lambda: 3)
    for _ in range(MAX_SAMPLES + 5):
        metrics.load("support@1", 0.5)
    metrics.flush()
    assert metrics.pending()["loraloom_adapter_loads_total", ("support", "1")] == MAX_SAMPLES + 5
    assert [len(values) for values in vars(metrics)["_samples"].values()] == [MAX_SAMPLES]
    with pytest.raises(ValueError, match="not a gauge"):
        metrics.watch("loraloom_requests_total", lambda: 3)


@ray.remote(num_cpus=0)
class Replica:
    """As a replica does it: on an event loop, in a worker."""

    async def serve(self) -> None:
        self.metrics = Metrics()
        self.metrics.watch("loraloom_requests_waiting", lambda: 3)
        for _ in range(4):
            self.metrics.request(
                "support@7",
                "alice",
                200,
                prompt_tokens=10,
                completion_tokens=5,
                queue_s=0.02,
                first_token_s=0.2,
                total_s=0.26,
            )
        self.metrics.request("base", "bob", 429, error="queue_full")
        self.metrics.load("support@7", 0.3)
        self.metrics.load("sales@1", 0.3, failed=True)
        self.metrics.eviction("sales@2")
        self.metrics.key_file_fault()
        self.task = asyncio.create_task(self.report())

    async def report(self) -> None:
        while True:
            self.metrics.flush()
            await asyncio.sleep(0.5)


WANTED = {
    "ray_loraloom_requests_total adapter=support status=200 version=7": 4,
    "ray_loraloom_requests_total adapter=base status=429 version=": 1,
    "ray_loraloom_errors_total adapter=base code=queue_full version=": 1,
    "ray_loraloom_prompt_tokens_total adapter=support version=7": 40,
    "ray_loraloom_completion_tokens_total adapter=support version=7": 20,
    "ray_loraloom_key_requests_total key=alice status=200": 4,
    "ray_loraloom_key_tokens_total key=alice kind=completion": 20,
    "ray_loraloom_adapter_loads_total adapter=support version=7": 1,
    "ray_loraloom_adapter_load_failures_total adapter=sales version=1": 1,
    "ray_loraloom_adapter_evictions_total adapter=sales version=2": 1,
    "ray_loraloom_key_file_faults_total": 1,
    "ray_loraloom_requests_waiting": 3,
    "ray_loraloom_queue_seconds_count adapter=support": 4,
    "ray_loraloom_time_to_first_token_seconds_bucket adapter=support le=0.1": 0,
    "ray_loraloom_time_to_first_token_seconds_bucket adapter=support le=0.25": 4,
    "ray_loraloom_time_per_output_token_seconds_bucket adapter=support le=0.01": 0,
    "ray_loraloom_time_per_output_token_seconds_bucket adapter=support le=0.02": 4,
    "ray_loraloom_time_per_output_token_seconds_count adapter=support": 4,
    "ray_loraloom_adapter_load_seconds_count adapter=support": 1,
}


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_prometheus_reads_them_from_rays_endpoint() -> None:
    replica: Any = Replica.remote()
    ray.get(replica.serve.remote())
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def complete() -> dict[str, float]:
        found = scrape(url)
        return found if found.keys() >= WANTED.keys() else {}  # one flush may be exported in parts

    found = wait_until(complete)
    assert {name: found.get(name) for name in WANTED} == WANTED


OURS = ("adapter", "version", "status", "code", "key", "kind", "le")


def scrape(url: str) -> dict[str, float]:
    """Our series, by name and those labels that are ours."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    series: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("ray_loraloom_"):
            head, _, value = line.rpartition(" ")
            name, _, labels = head.partition("{")
            shown = [f"{key}={text}" for key, text in sorted(re.findall(r'(\w+)="([^"]*)"', labels)) if key in OURS]
            series[" ".join([name, *shown])] = float(value)
    return series
