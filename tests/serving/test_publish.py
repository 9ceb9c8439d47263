"""Any adapter in PEFT's format becomes a version: folders, and a hub that a small real server stands in for."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.errors import InputError, MachineError, NotFoundError
from loraloom import app
from serving.publish import HubId, parse_hub_id, publish_adapter
from serving.registry import Registry
from tests.serving.make import edit_config, make_adapter
from tests.serving.s3 import S3Server
from tests.tiny import make_base

ROOT = Path(__file__).parent.parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return make_adapter(tmp_path / "adapter", base)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId("org/name", None)),
        ("org/na-me.v1_2@refs/pr/3", HubId("org/na-me.v1_2", "refs/pr/3")),
        ("org/name@v1", HubId("org/name", "v1")),
        ("name", None),
        ("../x", None),
        ("/a/b", None),
        ("a/b/c", None),
        ("a/b@", None),
        ("a/b\n", None),
        ("a/b\0", None),
        ("./a", None),
    ],
)
def test_hub_ids(text: str, expected: HubId | None) -> None:
    assert parse_hub_id(text) == expected


def test_a_folder_becomes_a_version_on_the_base_that_it_names(adapter: Path, base: Path, registry: Registry) -> None:
    manifest = publish_adapter(str(adapter), registry, "support")
    assert (manifest.id, manifest.rank, manifest.base.model) == ("support@1", 4, str(base))
    assert manifest.lineage == {"source": "folder", "folder": str(adapter)}
    assert registry.resolve("support").files == manifest.files


def test_a_stated_base_counts_where_the_named_one_cannot_be_read(
    adapter: Path, base: Path, registry: Registry, tmp_path: Path
) -> None:
    edit_config(adapter, base_model_name_or_path="/of/another/machine", revision="v1")
    with pytest.raises(InputError, match=f"{adapter}/adapter_config.json: base_model_name_or_path: must be"):
        publish_adapter(str(adapter), registry, "support")
    manifest = publish_adapter(str(adapter), registry, "support", base=str(base))
    assert manifest.lineage["trained_on"] == "/of/another/machine"
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    registry.fetch(manifest, fetched)
    config = json.loads((fetched / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(base), None)
    assert (fetched / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    assert json.loads((adapter / "adapter_config.json").read_text())["revision"] == "v1"


def test_a_stated_base_does_not_make_another_s_adapter_fit(
    adapter: Path, base: Path, registry: Registry, tmp_path: Path
) -> None:
    other = make_base(tmp_path / "other", hidden=128)
    with pytest.raises(InputError, match="must have the architecture of the base"):
        publish_adapter(str(adapter), registry, "support", base=str(other))
    edit_config(adapter, base_model_name_or_path="/of/another/machine")
    with pytest.raises(InputError, match="the shapes must fit the base's layers") as caught:
        publish_adapter(str(adapter), registry, "support", base=str(other))
    assert f"{adapter}/{WEIGHTS}" in str(caught.value)
    assert registry.names() == []


def test_everything_at_once(adapter: Path, registry: Registry) -> None:
    edit_config(adapter, base_model_name_or_path="/nowhere", use_dora=True, r=9)
    with pytest.raises(InputError) as caught:
        publish_adapter(str(adapter), registry, "../x", max_rank=2, by=" ", note="two\nlines")
    told = str(caught.value)
    for part in (
        "--name",
        "by: must be one line",
        "note: must be one line",
        "base_model_name_or_path",
        "use_dora",
        "at most 2",
        "with rank 9",
    ):
        assert part in told
    edit_config(adapter, use_dora=False, r=4)
    with pytest.raises(InputError) as caught:
        publish_adapter(str(adapter), registry, "support", base="/nowhere")
    assert [fault.where for fault in caught.value.faults] == ["--base"]


def test_no_base_at_all(adapter: Path, registry: Registry) -> None:
    edit_config(adapter, base_model_name_or_path=None)
    with pytest.raises(InputError, match="must name the base, or --base must"):
        publish_adapter(str(adapter), registry, "support")


def test_no_server_could_hold_the_rank(tmp_path: Path, base: Path, registry: Registry) -> None:
    adapter = make_adapter(tmp_path / "wide", base, rank=513)
    with pytest.raises(InputError, match="the rank must be at most 512, got 513"):
        publish_adapter(str(adapter), registry, "support")


@pytest.mark.parametrize("command", [("publish",), ("adapters", "publish")])
def test_the_command_says_who_why_and_where_to_without_credentials(
    command: tuple[str, ...], adapter: Path, s3: S3Server
) -> None:
    uri = s3.uri(f"bucket/publish-{len(command)}", credentials="key:s3cret@")
    arguments = [*command, str(adapter), "--name", "support", "--registry", uri, "--by", "ann", "--note", "new words"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert f"published support@1 (from {adapter}, rank 4) to s3://bucket/publish-{len(command)}\n" in done.stdout
    assert "s3cret" not in done.output
    entry = Registry(uri).entry("support", 1)
    assert (entry.by, entry.note) == ("ann", "new words")


@pytest.mark.parametrize("source", ["none", "./none", "/no/such/folder", "x" * 10_000, "a\0b", "../../x"])
def test_a_source_that_is_nowhere(source: str, registry: Registry) -> None:
    with pytest.raises(NotFoundError, match="no such folder, and no hub id"):
        publish_adapter(source, registry, "support")


def test_without_the_hub_an_id_is_told_of(registry: Registry) -> None:
    with pytest.raises(MachineError, match="org/name: no folder is here, it is not in the hub's cache"):
        publish_adapter("org/name", registry, "support")


class Hub(ThreadingHTTPServer):
    """The routes of the hub that a snapshot needs: a revision's files, and each file with its hash and commit."""

    daemon_threads = True

    def __init__(self, repos: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repos = repos
        self.fetched: list[str] = []


class HubHandler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride] - it is made by no other

    def log_message(self, *arguments: Any, **_: Any) -> None:
        """Not on standard error."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        for repo, folder in self.server.repos.items():
            names = [path.name for path in sorted(folder.iterdir())]
            for revision in ("main", COMMIT):
                if path == f"/api/models/{repo}/revision/{revision}":
                    about = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                    return self.answer(200, json.dumps(about).encode())
                if path == f"/api/models/{repo}/tree/{revision}":
                    files = [self.entry(folder / name) for name in names]
                    return self.answer(200, json.dumps(files).encode())
                for name in names:
                    if path == f"/{repo}/resolve/{revision}/{name}":
                        return self.send_file(folder / name)
            if path.startswith((f"/api/models/{repo}/", f"/{repo}/")):
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def entry(self, path: Path) -> dict[str, Any]:
        return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": self.etag(path)}

    def etag(self, path: Path) -> str:
        return hashlib.sha1(path.read_bytes()).hexdigest()

    def send_file(self, path: Path) -> None:
        if self.command == "GET":
            self.server.fetched.append(path.name)
        self.answer(200, path.read_bytes(), {"ETag": f'"{self.etag(path)}"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(adapter: Path) -> Generator[Hub]:
    (adapter / "README.md").write_text("how it was made")
    (adapter / "adapter_model.bin").write_bytes(b"a pickle, perhaps")
    pickled = adapter.with_name("pickled")
    pickled.mkdir()
    (pickled / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    (pickled / "adapter_model.bin").write_bytes(b"a pickle, perhaps")
    with Hub({"org/good": adapter, "org/pickled": pickled}) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_hub_ids_are_published_and_nothing_else_of_them_is_fetched(
    hub: Hub, registry: Registry, base: Path, tmp_path: Path
) -> None:
    """In processes of their own: huggingface_hub reads its settings when it is imported."""
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }

    def publish(source: str, command: tuple[str, ...] = ("publish",)) -> subprocess.CompletedProcess[str]:
        arguments = [*command, source, "--name", "support", "--registry", str(registry.root), "--json"]
        return subprocess.run(
            [sys.executable, str(ROOT / "loraloom.py"), *arguments],
            env=os.environ | settings, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    done = publish("org/good@main", ("adapters", "publish"))
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout.splitlines()[-1])
    assert manifest["lineage"] == {"source": "hub", "hub_id": "org/good", "hub_commit": COMMIT}
    assert sorted(hub.fetched) == ["adapter_config.json", WEIGHTS]
    assert sorted(manifest["files"]) == ["adapter_config.json", WEIGHTS]
    assert manifest["base"]["model"] == str(base)
    for source, code, reason in (
        ("org/none", 3, "no such repository"),
        ("org/good@v9", 3, "no revision v9"),
        ("org/pickled", 2, f"it lacks {WEIGHTS}"),
    ):
        done = publish(source)
        assert (done.returncode, reason in done.stderr) == (code, True), done.stderr
        assert "Traceback" not in done.stderr
    assert "adapter_model.bin" not in hub.fetched
    hub.repos.clear()
    settings["HF_HUB_OFFLINE"] = "1"
    assert json.loads(publish("org/good").stdout.splitlines()[-1])["version"] == 2
