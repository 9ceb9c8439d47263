"""Votes over HTTP, into a real registry, behind the real door with real keys."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from serving.access.admission import Admission
from serving.access.key_file import KeyEntry, KeyFile, KeyLimits, KeyScopes, change_keys, key_digest, new_key
from serving.access.keys import KeyRing
from serving.access.limits import Limiter
from serving.adapters.cache import AdapterCache
from serving.adapters.catalogue import Catalogue, ServedBase
from serving.adapters.follower import Follower
from serving.adapters.holdings import Holdings
from serving.http.door import Door
from serving.http.pages import add_pages
from serving.metrics import Metrics
from serving.playground.routes import add_playground
from serving.playground.votes import Votes
from serving.registry import Registry
from tests.serving.engines import RecordingEngine
from tests.serving.make import identity, make_adapter

pytest.importorskip("vllm")


class Setting:
    """A server's app without vLLM's routes."""

    def __init__(self, folder: Path, base: Path, limits: KeyLimits | None, *, is_open: bool) -> None:
        self.folder = folder
        self.registry = Registry(folder / "registry")
        for seed, name in enumerate(("support", "support", "sales")):
            adapter = make_adapter(folder / f"adapter-{seed}", base, seed=seed)
            self.registry.publish(name, adapter, identity(base), metrics={}, lineage={})
        served = ServedBase("tiny", identity(base), 16, 128, datetime.now(UTC))
        seen = Registry(folder / "registry")
        seen.refresh()
        catalogue = Catalogue(served, seen)
        models = SimpleNamespace(lora_requests={})
        holdings = Holdings(RecordingEngine(), models, AdapterCache(seen, folder / "cache"), 2)
        follower = Follower(seen, catalogue, holdings, [])
        app = FastAPI()
        add_pages(app, catalogue, follower.find, self._nothing, self._nothing, self._nothing)
        add_playground(app, Votes(seen, "tiny", follower.catch_up).cast)
        self.key = new_key()
        self.door = Door(
            app,
            catalogue=catalogue,
            follower=follower,
            holdings=holdings,
            keys=None if limits is None else self._ring(limits),
            limiter=Limiter(),
            admission=Admission(running=1, waiting=1, timeout_s=1),
            metrics=Metrics(),
            max_body_bytes=10_000,
            is_open=is_open,
        )

    async def _nothing(self, *_: object) -> Any:
        raise AssertionError

    def _ring(self, limits: KeyLimits) -> KeyRing:
        entry = KeyEntry(sha256=key_digest(self.key), scopes=KeyScopes(adapters=["support"], base=False), limits=limits)
        change_keys(self.folder / "keys.yaml", lambda _: KeyFile(keys={"alice": entry}), create=True)
        return KeyRing(self.folder / "keys.yaml")


Work = Callable[[Setting, httpx.AsyncClient], Coroutine[Any, Any, None]]


@pytest.fixture
def run(tmp_path: Path, base: Path) -> Callable[..., None]:
    def run(work: Work, limits: KeyLimits | None = None, *, is_open: bool = True) -> None:
        async def all_of_it() -> None:
            here = Setting(tmp_path, base, limits, is_open=is_open)
            transport = httpx.ASGITransport(here.door, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
                await work(here, client)

        asyncio.run(asyncio.wait_for(all_of_it(), 60))

    return run


Run = Callable[..., None]


async def vote(client: httpx.AsyncClient, models: object, better: object, key: str = "") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return await client.post("/v1/votes", json={"models": models, "better": better}, headers=headers)


def test_a_vote_is_kept_and_shown(run: Run) -> None:
    async def work(here: Setting, client: httpx.AsyncClient) -> None:
        first = await vote(client, ["tiny", "support@2"], "support@2")
        assert first.status_code == 200, first.text
        second = (await vote(client, ["support@2", "sales@1", "tiny"], None)).json()
        assert second["models"] == ["support@2", "sales@1", "tiny"]
        score = second["scores"]["support@2"]
        assert (score["value"], score["count"], score["data"]) == (pytest.approx(2 / 3), 2, "votes")
        here.registry.refresh()
        assert set(here.registry.entry("support", 2).votes.against) == {"base", "sales@1"}
        assert here.registry.history("sales")[-1].by == "anonymous"
        cards = {card["id"]: card for card in (await client.get("/v1/models")).json()["data"]}
        assert cards["support"]["metadata"]["scores"]["preferred"]["count"] == 2

    run(work)


BAD: list[tuple[Any, Any, int, str]] = [
    (["tiny", "support@9"], None, 404, "`support@9` does not exist"),
    (["tiny", "support"], None, 400, "must be versions, such as support@7, or base, got ['support']"),
    (["tiny", "support@prod"], "tiny", 400, "must be versions"),
    (["tiny", "tiny"], "tiny", 400, "2 to 6 different models"),
    (["base", "support@1"], None, 404, "`base` does not exist"),
    (["support@1", "support@2"], "tiny", 400, "better: must be one of the models"),
    (["tiny"], None, 400, "models"),
    (["tiny", "x" * 300], None, 400, "models.1"),
    ([f"support@{number}" for number in range(1, 60)], None, 400, "models"),
    (["tiny", "a\x00@1"], None, 400, "must be versions"),
    ("tiny", None, 400, "models"),
    (["tiny", "support@1"], 7, 400, "better"),
]


@pytest.mark.parametrize(("models", "better", "status", "message"), BAD)
def test_what_is_no_vote(run: Run, models: Any, better: Any, status: int, message: str) -> None:
    async def work(here: Setting, client: httpx.AsyncClient) -> None:
        answer = await vote(client, models, better)
        assert answer.status_code == status, answer.text
        assert message in answer.json()["error"]["message"]
        here.registry.refresh()
        assert len(here.registry.history("support")) == 2

    run(work)


def test_votes_need_a_key_that_may_ask_all_that_is_voted_on(run: Run) -> None:
    async def work(here: Setting, client: httpx.AsyncClient) -> None:
        assert (await vote(client, ["support@1", "support@2"], None)).status_code == 401
        assert (await vote(client, ["support@1", "tiny"], None, here.key)).status_code == 403
        assert (await vote(client, ["support@1", "sales@1"], None, here.key)).status_code == 403
        assert (await vote(client, ["support@1", "base"], None, here.key)).status_code in (403, 404)
        assert (await vote(client, ["support@1", "support@2"], "support@1", here.key)).status_code == 200
        here.registry.refresh()
        assert [event.by for event in here.registry.history("support")][2:] == ["alice"]

    run(work, KeyLimits())


def test_votes_count_as_requests_of_their_key(run: Run) -> None:
    async def work(here: Setting, client: httpx.AsyncClient) -> None:
        first = await vote(client, ["support@1", "support@2"], "support@1", here.key)
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        await vote(client, ["support@1", "support@2"], "support@1", here.key)
        refused = await vote(client, ["support@1", "support@2"], "support@1", here.key)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "Retry-After" in refused.headers
        here.registry.refresh()
        assert here.registry.entry("support", 1).votes.count == 2

    run(work, KeyLimits(requests_per_minute=2))


def test_without_keys_only_this_machine_may_vote(run: Run) -> None:
    async def work(here: Setting, client: httpx.AsyncClient) -> None:
        refused = await vote(client, ["support@1", "support@2"], None)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
        here.registry.refresh()
        assert here.registry.entry("support", 1).votes.count == 0

    run(work, is_open=False)


def test_votes_at_once_are_all_kept_or_refused(run: Run) -> None:
    async def work(here: Setting, client: httpx.AsyncClient) -> None:
        answers = await asyncio.gather(*(vote(client, ["support@1", "support@2"], "support@1") for _ in range(60)))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) <= {200, 503}
        here.registry.refresh()
        assert here.registry.entry("support", 1).votes.count == statuses.count(200) >= 32

    run(work)


def test_a_registry_that_cannot_be_written(run: Run) -> None:
    async def work(here: Setting, client: httpx.AsyncClient) -> None:
        log = here.folder / "registry" / "_log"
        log.rename(log.with_name("_elsewhere"))
        log.write_text("no folder")
        answer = await vote(client, ["support@1", "support@2"], None)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "registry_unreachable")

    run(work)


def test_the_page_is_open_and_brings_all_that_it_needs(run: Run) -> None:
    async def work(_: Setting, client: httpx.AsyncClient) -> None:
        assert (await client.get("/")).headers["location"] == "playground"
        page = await client.get("/playground")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        for name in ("page.css", "page.js", "answer.js"):
            assert (await client.get(f"/playground/{name}")).status_code == 200
        for name in ("routes.py", "..%2froutes.py", "index.html", "%00"):
            assert (await client.get(f"/playground/{name}")).status_code == 404
        assert (await client.get("/v1/models")).status_code == 401

    run(work, KeyLimits())
