"""What the server counts and measures, by adapter and by key, through Ray's metrics to Prometheus.

Prometheus sees each name with Ray's prefix: ``ray_loraloom_requests_total`` and so on. Units and suffixes are those of
https://prometheus.io/docs/practices/naming/. A request costs one tuple in a list here: ``flush`` adds them up once a
second and hands them over, since a call of Ray's costs 8.5 us (measured), and a request would make a dozen.
Ray keeps of a histogram the buckets only: its ``_sum`` is made of the middles of buckets, so that means are rough and
quantiles are as fine as the buckets.

The ``MAX_LABELS`` versions of adapters that are in use have series of their own, and others are counted together as
``adapter="other"``; keys likewise. At 1,000 adapters a replica so has some 13,000 series instead of 66,000. One that
nobody has asked for in ``FORGOTTEN_AFTER_S`` makes room for a new one, or a version published after months would never
be seen. What Ray was told of once it shows until the replica ends, so that also ends, at ``MAX_LABELS_EVER``.
Histograms go by name, without the version. There is no series for each pair of key and adapter.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

MAX_LABELS = 200
MAX_LABELS_EVER = 10 * MAX_LABELS
FORGOTTEN_AFTER_S = 3600.0
MAX_SAMPLES = 10_000
"""Samples of one histogram series between two flushes; more are left out, at 10,000 a second."""
OTHER = "other"
BASE = "base"

_log = logging.getLogger(__name__)

Tags = tuple[str, ...]
_Ended = tuple[str, str, str, str | None, int, int, float | None, float | None, float | None]


class Metric(NamedTuple):
    """One metric, as Ray is told of it."""

    kind: Literal["counter", "gauge", "histogram"]
    tags: tuple[str, ...]
    text: str
    boundaries: tuple[float, ...] = ()


_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
_ADAPTER = ("adapter", "version")

METRICS: dict[str, Metric] = {
    "loraloom_requests_total": Metric("counter", (*_ADAPTER, "status"), "Requests that ended, by HTTP status"),
    "loraloom_errors_total": Metric("counter", (*_ADAPTER, "code"), "Requests that ended in an error, by its code"),
    "loraloom_prompt_tokens_total": Metric("counter", _ADAPTER, "Tokens of prompts"),
    "loraloom_completion_tokens_total": Metric("counter", _ADAPTER, "Tokens of answers"),
    "loraloom_key_requests_total": Metric("counter", ("key", "status"), "Requests that ended, by API key"),
    "loraloom_key_tokens_total": Metric("counter", ("key", "kind"), "Tokens, prompt or completion, by API key"),
    "loraloom_adapter_loads_total": Metric("counter", _ADAPTER, "Loads of an adapter into the engine"),
    "loraloom_adapter_load_failures_total": Metric("counter", _ADAPTER, "Loads that failed"),
    "loraloom_adapter_evictions_total": Metric("counter", _ADAPTER, "Adapters taken out of the engine"),
    "loraloom_key_file_faults_total": Metric("counter", (), "Times that the file of API keys turned out broken"),
    "loraloom_time_to_first_token_seconds": Metric(
        "histogram", ("adapter",), "From a request's arrival to its first token, the queue included", _SECONDS
    ),
    "loraloom_time_per_output_token_seconds": Metric(
        "histogram", ("adapter",), "Mean time between the tokens of an answer after its first", _TOKEN_SECONDS
    ),
    "loraloom_queue_seconds": Metric("histogram", ("adapter",), "Wait for a place in the engine", _SECONDS),
    "loraloom_adapter_load_seconds": Metric("histogram", ("adapter",), "Time to load an adapter", _SECONDS),
    "loraloom_requests_running": Metric("gauge", (), "Requests in the engine"),
    "loraloom_requests_waiting": Metric("gauge", (), "Requests that wait for a place in the engine"),
    "loraloom_adapters_resident": Metric("gauge", (), "Adapters that the engine holds"),
}
"""Every metric of the server, by name."""


class Labels:
    """The values of a tag that are in use, at most ``most`` at a time, and ``other`` for the rest. A step is O(1)."""

    def __init__(self, most: int = MAX_LABELS, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._seen: OrderedDict[str, float] = OrderedDict()
        """When each was seen last, the longest ago first."""
        self._ever: set[str] = set()

    def bounded(self, value: str) -> str:
        """``value``, or ``other``."""
        if value not in self._seen and not self._has_room(value):
            return OTHER
        self._seen[value] = self._clock()
        self._seen.move_to_end(value)
        self._ever.add(value)
        return value

    def _has_room(self, value: str) -> bool:
        if len(self._ever) >= MAX_LABELS_EVER and value not in self._ever:
            return False
        if len(self._seen) >= self._most:
            oldest = next(iter(self._seen))
            if self._clock() - self._seen[oldest] < FORGOTTEN_AFTER_S:
                return False
            del self._seen[oldest]
        return True


class Metrics:
    """Gathers values on one event loop; ``flush`` hands them to Ray. All methods are for one thread."""

    def __init__(self, max_labels: int = MAX_LABELS) -> None:
        self._adapters = Labels(max_labels)
        self._names = Labels(max_labels)
        self._keys = Labels(max_labels)
        self._ended: list[_Ended] = []
        self._counts: defaultdict[tuple[str, Tags], float] = defaultdict(float)
        self._gauges: dict[str, Callable[[], float]] = {}
        self._samples: defaultdict[tuple[str, Tags], list[float]] = defaultdict(list)
        self._ray: dict[str, Any] = {}
        self._is_broken = False

    def request(
        self,
        model: str,
        key: str,
        status: int,
        *,
        error: str | None = None,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
        queue_s: float | None = None,
        first_token_s: float | None = None,
        total_s: float | None = None,
    ) -> None:
        """A request has ended.

        Args:
            model: ``base``, or the immutable id of the adapter (``support@7``); only what exists, or clients could make
                labels. "" for a request that never came so far.
            key: The key's id.
            status: Of the HTTP answer; 499 where the client left.
            error: The code of the error, if it ended in one.
            prompt_tokens: Tokens of the prompt.
            completion_tokens: Tokens of the answer.
            queue_s: How long it waited for its place, if it came so far.
            first_token_s: From its arrival to the first token, if there was one.
            total_s: From its arrival to its end.
        """
        self._ended.append(
            (model, key, str(status), error, prompt_tokens, completion_tokens, queue_s, first_token_s, total_s)
        )

    def _fold(self) -> None:
        """Add up the requests that have ended."""
        ended, self._ended = self._ended, []
        for request in ended:
            self._count(*request)

    def _count(
        self,
        model: str,
        key: str,
        code: str,
        error: str | None,
        prompt_tokens: int,
        completion_tokens: int,
        queue_s: float | None,
        first_token_s: float | None,
        total_s: float | None,
    ) -> None:
        counts, adapter, who = self._counts, self._adapter(model), self._keys.bounded(key)
        counts["loraloom_requests_total", (*adapter, code)] += 1
        counts["loraloom_key_requests_total", (who, code)] += 1
        if error is not None:
            counts["loraloom_errors_total", (*adapter, error)] += 1
        if prompt_tokens:
            counts["loraloom_prompt_tokens_total", adapter] += prompt_tokens
            counts["loraloom_key_tokens_total", (who, "prompt")] += prompt_tokens
        if completion_tokens:
            counts["loraloom_completion_tokens_total", adapter] += completion_tokens
            counts["loraloom_key_tokens_total", (who, "completion")] += completion_tokens
        name = (self._names.bounded(adapter[0]),)
        if queue_s is not None:
            self._observe("loraloom_queue_seconds", name, queue_s)
        if first_token_s is not None:
            self._observe("loraloom_time_to_first_token_seconds", name, first_token_s)
            if total_s is not None and completion_tokens > 1:
                each = (total_s - first_token_s) / (completion_tokens - 1)
                self._observe("loraloom_time_per_output_token_seconds", name, each)

    def load(self, model: str, seconds: float, *, failed: bool = False) -> None:
        """An adapter was loaded, or could not be."""
        adapter = self._adapter(model)
        if failed:
            self._counts["loraloom_adapter_load_failures_total", adapter] += 1
            return
        self._counts["loraloom_adapter_loads_total", adapter] += 1
        self._observe("loraloom_adapter_load_seconds", (self._names.bounded(adapter[0]),), seconds)

    def eviction(self, model: str) -> None:
        """An adapter was taken out of the engine."""
        self._counts["loraloom_adapter_evictions_total", self._adapter(model)] += 1

    def key_file_fault(self) -> None:
        """The file of API keys turned out broken; to be called once for each new ``KeyRing.trouble``."""
        self._counts["loraloom_key_file_faults_total", ()] += 1

    def watch(self, name: str, read: Callable[[], float]) -> None:
        """Read a gauge at every flush: ``loraloom_requests_running`` and its like."""
        if METRICS[name].kind != "gauge":
            raise ValueError(f"{name} is not a gauge")
        self._gauges[name] = read

    def flush(self) -> None:
        """Hand over what came together since the last time; to be called every second, also where nothing did, or Ray
        lets the gauges go. Without a running Ray counts are kept until there is one, and samples up to ``MAX_SAMPLES``.

        Takes some 6 us for each request, and 10 us for each series that changed and each sample: a thread of its own
        would hold the interpreter no less.
        """
        import ray

        self._fold()
        if not ray.is_initialized():
            return
        counts, self._counts = self._counts, defaultdict(float)
        samples, self._samples = self._samples, defaultdict(list)
        try:
            for (name, tags), amount in counts.items():
                self._metric(name).inc(amount, _tagged(name, tags))
            for (name, tags), values in samples.items():
                metric, named = self._metric(name), _tagged(name, tags)
                for value in values:
                    metric.observe(value, named)
            for name, read in self._gauges.items():
                self._metric(name).set(float(read()), {})
        except Exception:  # noqa: BLE001 -- metrics must not take the server down, whatever Ray makes of them
            if not self._is_broken:
                _log.exception("metrics are lost")
            self._is_broken = True

    def pending(self) -> Mapping[tuple[str, Tags], float]:
        """Counts that were not handed over yet, for tests."""
        self._fold()
        return self._counts

    def _adapter(self, model: str) -> tuple[str, str]:
        model = self._adapters.bounded(model)
        name, _, version = model.partition("@")
        return name, version

    def _observe(self, name: str, tags: Tags, value: float) -> None:
        values = self._samples[name, tags]
        if len(values) < MAX_SAMPLES:
            values.append(value)

    def _metric(self, name: str) -> Any:
        metric = self._ray.get(name)
        if metric is None:
            from ray.util import metrics

            about = METRICS[name]
            if about.kind == "histogram":
                metric = metrics.Histogram(name, about.text, boundaries=list(about.boundaries), tag_keys=about.tags)
            else:
                made = metrics.Counter if about.kind == "counter" else metrics.Gauge
                metric = made(name, about.text, tag_keys=about.tags)
            self._ray[name] = metric
        return metric


def _tagged(name: str, tags: Tags) -> dict[str, str]:
    return dict(zip(METRICS[name].tags, tags, strict=True))
