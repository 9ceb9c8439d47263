"""The door with everything real behind it but vLLM: a registry, a cache, keys, limits, the queue."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serving.access.admission import Admission
from serving.access.key_file import KeyEntry, KeyFile, KeyLimits, KeyScopes, change_keys, key_digest, new_key
from serving.access.keys import KeyRing
from serving.access.limits import Limiter
from serving.adapters.cache import AdapterCache
from serving.adapters.catalogue import Catalogue, ServedBase
from serving.adapters.follower import Follower
from serving.adapters.holdings import Holdings
from serving.http.door import Door
from serving.http.usage import count_outputs
from serving.manifest import Manifest
from serving.metrics import Metrics
from serving.registry import Registry
from tests.serving.engines import RecordingEngine
from tests.serving.make import identity, make_adapter

pytest.importorskip("vllm")

LIMIT = 10_000


class Model:
    """Answers like vLLM's app, and generates as its engine does: one output for each token."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.left = 0
        self.generating = 0

    async def generate(self, tokens: int) -> AsyncGenerator[Any, None]:
        self.generating += 1
        try:
            for number in range(tokens):
                await self.go_on.wait()
                await asyncio.sleep(0)
                outputs = [SimpleNamespace(token_ids=[number])]
                yield SimpleNamespace(prompt_token_ids=[1, 2, 3], outputs=outputs)
        finally:
            self.generating -= 1

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.seen.append(body)
        fault = body.get("fault")
        if fault == "vllm":
            error = {"message": "too long", "type": "BadRequestError", "param": "prompt", "code": 400}
            return JSONResponse({"error": error}, status_code=400)
        if fault == "engine":
            error = {"message": "EngineCore died", "type": "InternalServerError", "param": None, "code": 500}
            return JSONResponse({"error": error}, status_code=500)
        if fault == "crash":
            raise RuntimeError("a bug")
        if body.get("stream"):
            return StreamingResponse(self._stream(body), media_type="text/event-stream")
        tokens = [output async for output in self.generate(body.get("max_tokens", 3))]
        if fault == "late":
            return JSONResponse({"error": {"message": "too late", "code": 500}}, status_code=500)
        return JSONResponse({"model": body["model"], "tokens": len(tokens)})

    async def _stream(self, body: dict[str, Any]) -> AsyncGenerator[str, None]:
        async for _ in self.generate(body.get("max_tokens", 3)):
            yield f"data: {body['model']}\n\n"

    async def echo(self, request: Request) -> Response:
        return Response(await request.body())

    async def who(self, request: Request) -> Response:
        return JSONResponse({"key": request.scope["loraloom.key"].id})


class Setting:
    def __init__(
        self,
        folder: Path,
        base: Path,
        *,
        keys: KeyLimits | None = None,
        running: int = 8,
        waiting: int = 8,
        longest: int = 128,
        clock: Callable[[], float] = time.monotonic,
        **door: Any,
    ) -> None:
        self.registry = Registry(folder / "registry")
        for number in range(3):
            adapter = make_adapter(folder / f"adapter-{number}", base, seed=number)
            self.registry.publish("support" if number < 2 else "sales", adapter, identity(base), metrics={}, lineage={})
        self.model = Model()
        count_outputs(self.model)
        self.engine = RecordingEngine()
        served = ServedBase("tiny", identity(base), 16, longest, datetime.now(UTC))
        self.server_side = Registry(folder / "registry")
        self.server_side.refresh()
        self.catalogue = Catalogue(served, self.server_side)
        self.cache = cache = AdapterCache(self.server_side, folder / "cache")
        self.holdings = Holdings(self.engine, SimpleNamespace(lora_requests={}), cache, 2)
        self.follower = Follower(self.server_side, self.catalogue, self.holdings, [])
        self.metrics = Metrics()
        self.admission = Admission(running=running, waiting=waiting, timeout_s=5)
        self.key = new_key()
        routes = [
            Route("/v1/completions", self.model.complete, methods=["POST"]),
            Route("/v1/chat/completions", self.model.complete, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.model.echo, methods=["POST"]),
            Route("/who", self.model.who),
            Route("/metrics", self.model.who),
            Route("/health", self.model.who),
            Route("/v1/votes", self.model.echo, methods=["POST"]),
        ]
        self.door = Door(
            Starlette(routes=routes),
            catalogue=self.catalogue,
            follower=self.follower,
            holdings=self.holdings,
            keys=self._ring(folder / "keys.yaml", keys) if keys else None,
            limiter=Limiter(clock=clock),
            admission=self.admission,
            metrics=self.metrics,
            max_body_bytes=LIMIT,
            is_open=keys is None,
            **door,
        )
        transport = httpx.ASGITransport(self.door, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://door")

    def _ring(self, path: Path, limits: KeyLimits) -> KeyRing:
        entry = KeyEntry(
            sha256=key_digest(self.key),
            scopes=KeyScopes(adapters=["sup*"], base=False),
            limits=limits,
        )
        change_keys(path, lambda _: KeyFile(keys={"alice": entry}), create=True)
        return KeyRing(path)

    async def post(
        self, model: object = "tiny", headers: dict[str, str] | None = None, **fields: Any
    ) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"model": model, **fields}, headers=headers)

    def counted(self) -> dict[Any, float]:
        return {
            tags: count for (name, tags), count in self.metrics.pending().items() if name.endswith("requests_total")
        }


Make = Callable[..., Setting]
Work = Callable[[Setting], Coroutine[Any, Any, None]]


@pytest.fixture
def run(tmp_path: Path, base: Path) -> Callable[..., None]:
    def run(work: Work, **options: Any) -> None:
        async def all_of_it() -> None:
            setting = Setting(tmp_path, base, **options)
            async with setting.client:
                await work(setting)
            assert setting.door.running == 0
            assert setting.admission.running == setting.admission.waiting == 0
            assert setting.model.generating == 0

        asyncio.run(asyncio.wait_for(all_of_it(), 60))

    return run


Run = Callable[..., None]


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.json()["error"]


def test_the_engine_sees_immutable_ids_and_the_answer_says_who_spoke(run: Run) -> None:
    async def work(here: Setting) -> None:
        for asked, answers in (("tiny", "tiny"), ("support", "support@2"), ("support@1", "support@1")):
            response = await here.post(asked, headers={"x-request-id": "mine"})
            assert response.json() == {"model": answers, "tokens": 3}
            assert response.headers["x-loraloom-model"] == answers
            assert response.headers["x-request-id"] == "mine"
        assert here.engine.order == ["+support@2", "+support@1"]
        here.metrics.flush()
        assert [body["model"] for body in here.model.seen] == ["tiny", "support@2", "support@1"]

    run(work)


def test_a_promotion_counts_for_new_requests_and_not_for_those_under_way(run: Run) -> None:
    async def work(here: Setting) -> None:
        here.registry.move("support", "prod", 1)
        await here.follower.catch_up()
        here.model.go_on.clear()
        running = asyncio.create_task(here.post("support"))
        while not here.model.seen:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        here.registry.move("support", "prod", 2)
        await here.follower.catch_up()
        here.model.go_on.set()
        assert (await here.post("support")).json()["model"] == "support@2"
        assert (await running).json()["model"] == "support@1"

    run(work)


def test_a_move_loads_the_new_version_before_anybody_asks(run: Run) -> None:
    async def work(here: Setting) -> None:
        here.registry.move("support", "prod", 1)
        await here.follower.catch_up()
        await here.post("support")
        await here.follower.catch_up()
        here.registry.move("support", "prod", 2)
        await here.follower.catch_up()
        for _ in range(200):
            if "support@2" in here.holdings.resident:
                break
            await asyncio.sleep(0.01)
        assert here.engine.order == ["+support@1", "+support@2"]

    run(work)


def test_pins_are_loaded_first_stay_and_follow_their_alias(run: Run) -> None:
    async def work(here: Setting) -> None:
        here.registry.move("support", "prod", 1)
        await here.follower.catch_up()
        pinning = Follower(here.server_side, here.catalogue, here.holdings, ["support@prod"])
        await pinning.begin(["sales"])
        assert here.engine.order == ["+support@1", "+sales@1"]
        await here.post("support@2")
        assert here.engine.order[2:] == ["+support@2", "-sales@1"]
        here.registry.move("support", "prod", 2)
        await pinning.catch_up()
        await here.post("sales")
        assert here.engine.order[4:] == ["+sales@1", "-support@1"]

    run(work)


def test_what_was_published_a_moment_ago_is_found(run: Run) -> None:
    async def work(here: Setting) -> None:
        source = here.registry.path(here.registry.resolve("sales"))
        assert (await here.post("new")).status_code == 404
        here.registry.publish("new", source, here.registry.resolve("sales").base, metrics={}, lineage={})
        assert (await here.post("new")).json()["model"] == "new@1"

    run(work)


@pytest.mark.parametrize(
    "model",
    [
        "nobody",
        "support@9",
        "../x",
        "/etc/passwd",
        "%2e%2e/x",
        "a\0b",
        "x" * 5_000,
        "tiny:support@1",
        "SUPPORT",
        "@",
        "é",
    ],
)
def test_names_that_lead_nowhere(run: Run, model: str) -> None:
    async def work(here: Setting) -> None:
        response = await here.post(model)
        assert response.status_code == 404
        error = error_of(response)
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "model", "model_not_found")
        assert len(error["message"]) < 300
        assert here.engine.order == here.model.seen == []

    run(work)


def test_errors_of_the_app_get_the_same_shape(run: Run) -> None:
    async def work(here: Setting) -> None:
        response = await here.post("support", fault="vllm")
        assert response.status_code == 400
        expected = {"message": "too long", "type": "invalid_request_error", "param": "prompt", "code": None}
        assert error_of(response) == expected
        assert response.headers["x-loraloom-model"] == "support@2"
        response = await here.post("support", fault="crash", headers={"x-request-id": "r1"})
        assert response.status_code == 500
        assert error_of(response)["code"] == "internal_error"
        assert "a bug" not in response.text
        response = await here.client.get("/nowhere")
        assert (response.status_code, error_of(response)["message"]) == (404, "GET /nowhere: Not Found")
        response = await here.client.get("/v1/completions")
        assert (response.status_code, response.headers["allow"]) == (405, "POST")
        error_of(response)

    run(work)


def test_bodies(run: Run) -> None:
    async def work(here: Setting) -> None:
        json_type = {"content-type": "application/json"}
        response = await here.client.post("/v1/completions", content=b"x" * (LIMIT + 1), headers=json_type)
        assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")
        response = await here.client.post("/v1/completions", content=b"{", headers=json_type)
        assert (response.status_code, error_of(response)["code"]) == (400, "invalid_json")
        response = await here.post(5)
        assert (response.status_code, error_of(response)["param"]) == (400, "model")
        assert here.model.seen == []

    run(work)


def test_keys_scopes_and_limits(run: Run) -> None:
    async def work(here: Setting) -> None:
        mine = {"authorization": f"Bearer {here.key}"}
        assert (await here.post("support")).status_code == 401
        assert (await here.client.get("/who")).status_code == 401
        assert (await here.client.get("/health")).json() == {"key": "anonymous"}
        assert (await here.client.get("/who", headers=mine)).json() == {"key": "alice"}
        assert (await here.client.get("/metrics", headers=mine)).status_code == 403
        for model in ("sales", "tiny", "no-such"):
            response = await here.post(model, headers=mine)
            assert (response.status_code, error_of(response)["code"]) == (403, "insufficient_scope")
        statuses: list[int] = []
        for _ in range(4):
            response = await here.post("support", headers=mine)
            statuses.append(response.status_code)
        assert statuses == [200, 200, 200, 429]
        assert int(response.headers["retry-after"]) >= 1
        assert response.headers["x-ratelimit-limit-requests"] == "3"

    run(work, keys=KeyLimits(requests_per_minute=3))


def test_a_full_queue(run: Run) -> None:
    async def work(here: Setting) -> None:
        here.model.go_on.clear()
        asked = [asyncio.create_task(here.post("support")) for _ in range(6)]
        await until(lambda: sum(task.done() for task in asked) == 3)
        assert (here.admission.running, here.admission.waiting) == (1, 2)
        refused = [task.result() for task in asked if task.done()]
        assert [response.status_code for response in refused] == [429] * 3
        assert {error_of(response)["code"] for response in refused} == {"queue_full"}
        here.model.go_on.set()
        await asyncio.gather(*asked)
        assert sorted(task.result().status_code for task in asked) == [200, 200, 200, 429, 429, 429]

    run(work, running=1, waiting=2)


class Visitor:
    """A client that can leave: plain ASGI."""

    def __init__(self, door: Door, body: dict[str, Any], *, key: str = "", is_whole: bool = True) -> None:
        self.messages: list[dict[str, Any]] = []
        self._gone = asyncio.Event()
        self._body: bytes | None = json.dumps(body).encode()
        self._is_whole = is_whole
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"authorization", f"Bearer {key}".encode())],
            "client": ("127.0.0.1", 1),
        }
        self.task = asyncio.create_task(door(scope, self._receive, self._send))  # pyright: ignore[reportArgumentType]

    def leave(self) -> None:
        self._gone.set()

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": not self._is_whole}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.messages.append(message)


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def test_a_client_that_leaves_the_queue_gives_its_place_up(run: Run) -> None:
    async def work(here: Setting) -> None:
        here.model.go_on.clear()
        first = asyncio.create_task(here.post("support"))
        await until(lambda: here.admission.running == 1)
        second = Visitor(here.door, {"model": "support"})
        await until(lambda: here.admission.waiting == 1)
        second.leave()
        await second.task
        assert here.admission.waiting == 0
        assert second.messages == []
        here.model.go_on.set()
        assert (await first).status_code == 200
        assert len(here.model.seen) == 1

    run(work, running=1)


def test_a_client_that_leaves_in_mid_stream_ends_the_generation(run: Run) -> None:
    async def work(here: Setting) -> None:
        here.model.go_on.set()
        visitor = Visitor(here.door, {"model": "support", "stream": True, "max_tokens": 10_000_000})
        await until(lambda: len(visitor.messages) > 3)
        assert here.model.generating == 1
        visitor.leave()
        with contextlib.suppress(asyncio.CancelledError):
            await visitor.task
        await until(lambda: not here.model.generating)

    run(work)


def test_a_stream_is_counted_token_by_token(run: Run) -> None:
    async def work(here: Setting) -> None:
        response = await here.post("support", stream=True, max_tokens=7)
        assert response.text.count("data: support@2") == 7
        await here.post("nobody")

    seen: list[Setting] = []

    async def keep(here: Setting) -> None:
        seen.append(here)
        await work(here)

    run(keep)
    counts = {(name, tags): count for (name, tags), count in seen[0].metrics.pending().items()}
    assert counts["loraloom_completion_tokens_total", ("support", "2")] == 7
    assert counts["loraloom_prompt_tokens_total", ("support", "2")] == 3
    assert counts["loraloom_errors_total", ("", "", "model_not_found")] == 1


def test_more_answers_than_the_engine_works_on_are_refused(run: Run) -> None:
    async def work(here: Setting) -> None:
        assert (await here.post("support", prompt=["a", "b"], n=2)).status_code == 200
        refused: list[dict[str, Any]] = [
            {"prompt": ["a"] * 5},
            {"prompt": "a", "n": 5},
            {"prompt": "a", "use_beam_search": True},
        ]
        for fields in refused:
            response = await here.post("support", **fields)
            assert response.status_code == 400
            assert error_of(response)["param"] == list(fields)[-1]
        assert len(here.model.seen) == 1

    run(work, max_sequences=4)


class SlowStore:
    """Holds up the cache's fetches until it is told to go on."""

    def __init__(self, here: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on = threading.Event()
        self._hold = here.cache.hold
        monkeypatch.setattr(here.cache, "hold", self._slowly)

    def _slowly(self, manifest: Manifest) -> Path:
        assert self.go_on.wait(20)
        return self._hold(manifest)


def test_a_fetch_takes_no_place_in_the_engine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(here: Setting) -> None:
        store = SlowStore(here, monkeypatch)
        cold = asyncio.create_task(here.post("support"))
        await until(lambda: here.door.running == 1)
        await asyncio.sleep(0.05)
        assert here.admission.running == 0
        assert (await here.post("tiny")).status_code == 200
        assert not cold.done()
        store.go_on.set()
        assert (await cold).json()["model"] == "support@2"

    run(work, running=1)


def test_a_fetch_that_takes_too_long(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(here: Setting) -> None:
        store = SlowStore(here, monkeypatch)
        response = await here.post("support")
        assert (response.status_code, error_of(response)["code"]) == (503, "queue_timeout")
        assert int(response.headers["retry-after"]) >= 1
        store.go_on.set()

    run(work, wait_s=0.1)


def test_an_adapter_that_finds_no_place_in_time(run: Run) -> None:
    async def work(here: Setting) -> None:
        for model in ("support@1", "support@2"):  # loaded, so that the next requests for them take no time
            assert (await here.post(model)).status_code == 200
        here.model.go_on.clear()
        running = [asyncio.create_task(here.post(model)) for model in ("support@1", "support@2")]
        await until(lambda: here.model.generating == 2)
        response = await here.post("sales")
        assert (response.status_code, error_of(response)["code"]) == (503, "queue_timeout")
        assert here.admission.running == 2
        here.model.go_on.set()
        assert [response.status_code for response in await asyncio.gather(*running)] == [200, 200]
        assert (await here.post("sales")).status_code == 200

    run(work, wait_s=1)


def test_failures_of_a_dead_engine_are_worth_another_try(run: Run) -> None:
    dead: list[bool] = []

    async def work(here: Setting) -> None:
        assert (await here.post("support", fault="engine")).status_code == 500
        dead.append(True)
        for fault in ("engine", "crash"):
            response = await here.post("support", fault=fault)
            assert (response.status_code, error_of(response)["code"]) == (503, "unavailable")
            assert response.headers["retry-after"] == "1"
        assert (await here.post("support", fault="vllm")).status_code == 400

    run(work, is_engine_dead=lambda: bool(dead))


def test_a_body_that_does_not_arrive(run: Run) -> None:
    async def work(here: Setting) -> None:
        visitor = Visitor(here.door, {"model": "support"}, is_whole=False)
        await visitor.task
        assert visitor.messages[0]["status"] == 408
        assert json.loads(visitor.messages[1]["body"])["error"]["code"] == "request_timeout"

    run(work, body_timeout_s=0.1)


def test_bodies_of_all_routes_are_bounded(run: Run) -> None:
    async def work(here: Setting) -> None:
        path = "/v1/unload_lora_adapter"
        assert (await here.client.post(path, content=b"x" * LIMIT)).content == b"x" * LIMIT
        response = await here.client.post(path, content=b"x" * (LIMIT + 1))
        assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")

    run(work)


def test_a_chat_that_leaves_its_length_open_fits_in_a_small_limit(run: Run) -> None:
    async def work(here: Setting) -> None:
        mine = {"authorization": f"Bearer {here.key}"}
        body = {"model": "support", "messages": [{"role": "user", "content": "Hello"}]}
        for _ in range(3):  # what is charged at first is given back
            response = await here.client.post("/v1/chat/completions", json=body, headers=mine)
            assert response.status_code == 200, response.text

    run(work, keys=KeyLimits(tokens_per_minute=1000), longest=100_000)


def test_a_client_that_leaves_before_the_first_token_pays_for_its_prompt(run: Run) -> None:
    async def work(here: Setting) -> None:
        here.model.go_on.clear()
        visitor = Visitor(here.door, {"model": "support", "prompt": "x" * 4000, "stream": True}, key=here.key)
        await until(lambda: here.model.generating == 1)
        visitor.leave()
        with contextlib.suppress(asyncio.CancelledError):
            await visitor.task
        here.model.go_on.set()
        response = await here.post("support", headers={"authorization": f"Bearer {here.key}"})
        assert 8_900 < int(response.headers["x-ratelimit-remaining-tokens"]) < 9_050

    run(work, keys=KeyLimits(tokens_per_minute=10_000), clock=lambda: 0.0)  # it lets 167 more through each second


def test_a_client_that_left_is_sent_no_answer_and_counted_as_gone(run: Run) -> None:
    async def work(here: Setting) -> None:
        here.model.go_on.clear()
        visitors = [
            Visitor(here.door, {"model": "support", "max_tokens": 1, **more}) for more in ({}, {"fault": "late"})
        ]
        await until(lambda: here.model.generating == 2)
        for visitor in visitors:
            visitor.leave()
        await asyncio.sleep(0.05)
        here.model.go_on.set()
        for visitor in visitors:
            await visitor.task
            assert visitor.messages == []
        assert here.counted() == {("support", "2", "499"): 2, ("anonymous", "499"): 2}

    run(work)
