from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.tuning.compare.make import make_sweep
from tuning.compare.reader import Comparer
from tuning.compare.server import LOOPBACK, SCRIPTS, make_app, self_contained
from tuning.compare.source import LocalShelf
from tuning.compare.tab import new_secret

HOSTILE = "</script><script>alert(1)</script><!--"


@pytest.fixture
def comparer(tmp_path: Path) -> Comparer:
    return Comparer([LocalShelf(make_sweep(tmp_path / "made", 12))])


@pytest.fixture
def client(comparer: Comparer) -> TestClient:
    return TestClient(make_app(comparer.document, hosts=LOOPBACK), base_url="http://127.0.0.1")


def test_the_page_and_its_parts(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    named = re.findall(r'(?:src|href)="([^"#:]+)"', page.text)
    assert {*SCRIPTS, "plotly.min.js", "page.css"} == set(named)
    for name in named:
        answer = client.get(f"/{name}")
        assert answer.status_code == 200
        assert answer.content
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy, "nothing from outside"


def test_data_whole_and_what_has_changed(client: TestClient) -> None:
    answer = client.get("/data.json")
    document = answer.json()
    assert document["whole"]
    assert len(document["sweeps"][0]["trials"]) == 12
    assert answer.headers["cache-control"] == "no-store"
    again = client.get("/data.json", params={"after": document["revision"]}).json()
    assert not again["whole"]
    assert again["sweeps"][0]["trials"] is None


def test_what_ray_asks_of_a_grafana_and_of_a_prometheus(client: TestClient) -> None:
    assert client.get("/api/health").json()["database"] == "ok"
    answer = client.get("/api/v1/query", params={"query": "vector(1)"}).json()
    assert answer["status"] == "success"
    assert client.get("/api/v1/query", params={"query": "up"}).status_code == 404
    embedded = client.get("/d/rayDefaultDashboard/", params={"theme": "dark", "kiosk": "1"})
    assert embedded.text == client.get("/").text
    assert client.get("/d/rayDefaultDashboard").text == client.get("/").text
    assert client.get("/d/rayDefaultDashboard/page.js").status_code == 200
    assert client.get("/d/rayDefaultDashboard/data.json").json()["sweeps"]
    assert "no Grafana" in client.get("/d-solo/rayDefaultDashboard/default-dashboard").text


@pytest.mark.parametrize(
    "path", ["/../pyproject.toml", "/%2e%2e/server.py", "/server.py", "/page/", "/d/x/..%2fserver.py", "/x"]
)
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_a_stranger_s_name_for_this_machine_is_refused(client: TestClient) -> None:
    assert client.get("/data.json", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/data.json", headers={"host": "localhost:8270"}).status_code == 200


def test_all_lies_below_the_secret(comparer: Comparer) -> None:
    secret = new_secret()
    assert len(secret) >= 24
    client = TestClient(make_app(comparer.document, secret=secret), base_url="http://10.0.0.1")
    assert client.get("/").status_code == client.get("/data.json").status_code == 404
    assert client.get("/api/health").status_code == 404
    assert client.get(f"/{secret}/data.json").status_code == 200
    assert client.get(f"/{secret}/api/health").status_code == 200
    assert client.get(f"/{secret}/d/x/plotly.min.js").status_code == 200


def test_one_file_holds_everything_and_nothing_escapes(tmp_path: Path) -> None:
    space = {"target_modules": {"choice": [[HOSTILE], "attention"]}}
    folder = make_sweep(tmp_path / "made", 2, space=space, search={"trials": 2})
    document = Comparer([LocalShelf(folder)], live=False).document(wait=True)
    html = self_contained(document)
    assert HOSTILE not in html
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', html.partition("<script")[0])
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert data
    assert json.loads(data[1]) == json.loads(document.model_dump_json())
    parser = _Scripts()
    parser.feed(html)
    assert parser.scripts == 2 + len(SCRIPTS), "the data, plotly, and ours: no text of one ends it"


class _Scripts(HTMLParser):
    """Counts script elements as a browser does, whose text ends at the first end tag."""

    scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
