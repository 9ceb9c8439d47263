"""A real server, started and stopped by the command line: Ray Serve, vLLM on CPUs, asked by the real openai client."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import openai
import psutil
import pytest
import torch
import yaml
from playwright.sync_api import Page, expect

from serving.client import ask, ask_all, models, wait_ready
from serving.manifest import Manifest
from serving.registry import Registry
from serving.registry.votes import Tally
from tests.browser import chromium, visit
from tests.serving.gate import Gate, Stream, gate
from tests.serving.make import identity, make_adapter
from tests.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow]

ROOT = Path(__file__).parent.parent.parent
PROMPT = "The loom is"
TOKENS = 24
RESIDENT = 3


@dataclass
class Running:
    """The server, and what it serves."""

    url: str
    announced: dict[str, Any]
    registry: Registry
    base: Path
    folder: Path
    stderr: Path
    published: int = 100

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def metric(self, name: str) -> float:
        """One of vLLM's figures, added up over its labels."""
        lines = httpx.get(f"{self.root}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.partition("{")[0] == name)

    def publish(self, name: str, **options: Any) -> Manifest:
        """Publish a new random adapter; each one answers otherwise."""
        self.published += 1
        adapter = make_adapter(self.folder / f"adapter-{self.published}", self.base, seed=self.published, **options)
        manifest = self.registry.publish(name, adapter, identity(self.base), metrics={"eval_loss": 1.0}, lineage={})
        if self.url:
            httpx.get(f"{self.url}/models/{manifest.id}")  # what is not known is looked for; the rest within a second
        return manifest


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Generator[Running]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "roots").mkdir()
    running = Running("", {}, Registry(folder / "registry"), base, folder, folder / "stderr")
    for name in ("support", "support", "sales"):
        running.publish(name, rank=4 if name == "support" else 8)
    running.publish("big", rank=32)
    config = {
        "base": {"model": str(base), "name": "tiny"},
        "registry": str(folder / "registry"),
        "engine": {
            "max_loras": 2, "max_cpu_loras": RESIDENT, "max_lora_rank": 16, "max_model_len": 256, "dtype": "float32",
            "tool_call_parser": "hermes",
        },
        "http": {"port": 0, "adapter_roots": [str(folder / "roots")]},
        "cache": {"folder": str(folder / "cache")},
        "cluster": {"num_cpus": 2, "dashboard": False},
    }  # fmt: skip
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, str(ROOT / "loraloom.py"), "serve", str(folder / "serve.yaml"), "--json"]
    before = temporary_files()
    with (
        running.stderr.open("w") as stderr,
        subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            assert process.stdout
            line = next((line for line in process.stdout if line.startswith("{")), None)
            assert line, running.stderr.read_text()
            running.announced = json.loads(line)
            running.url = running.announced["url"]
            yield running
            _stop_and_check(process, running, before)
        finally:
            process.kill()


def temporary_files() -> set[Path]:
    """What a server may leave among them: folders of ours and of Ray, sockets and files of vLLM."""
    names = ("loraloom-front-", "loraloom-engine-", "loom-", "vllm")
    every = Path(tempfile.gettempdir()).iterdir()
    return {path for path in every if path.is_socket() or path.name.startswith(names)}


def _stop_and_check(process: subprocess.Popen[str], running: Running, before: set[Path]) -> None:
    """Ctrl-C ends it well, and leaves no process, no port and no folder."""
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) > 5
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0, running.stderr.read_text()
    assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    port = httpx.URL(running.url).port
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port or 0)) != 0
    assert temporary_files() <= before
    assert "Traceback" not in running.stderr.read_text()


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def complete(client: openai.OpenAI) -> Callable[..., tuple[list[int], str]]:
    """Greedy completion of a prompt: the tokens, and the model that answered."""

    def call(model: str, prompt: str = PROMPT, tokens: int = TOKENS) -> tuple[list[int], str]:
        answer = client.completions.create(
            model=model, prompt=prompt, max_tokens=tokens, temperature=0, extra_body={"return_token_ids": True}
        )
        return answer.choices[0].token_ids, answer.model  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]

    return call


Complete = Callable[..., tuple[list[int], str]]


@pytest.fixture
def post(server: Running) -> Iterator[Callable[..., httpx.Response]]:
    with httpx.Client(base_url=server.root, timeout=60) as client:
        yield client.post


def error_of(caught: openai.APIStatusError | httpx.Response) -> dict[str, Any]:
    """The error's four fields, which must be all that there is."""
    body = (caught if isinstance(caught, httpx.Response) else caught.response).json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def test_the_announcement(server: Running) -> None:
    assert server.announced["base"] == "tiny"
    assert server.announced["adapters"] == ["sales@1", "support@1", "support@2"]
    assert "rank 32" in server.announced["unfit"]["big@1"]
    assert wait_ready(server.url) < 10
    assert httpx.get(f"{server.root}/health").json() == {"status": "ok"}


def test_the_first_request_that_samples_compiles_nothing(client: openai.OpenAI) -> None:
    """vLLM compiles its sampler at the first request that is not greedy, unless told not to: 13 s on two fast cores.

    No test before this one samples.
    """
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4, temperature=1, logprobs=2, timeout=5)
    assert answer.choices[0].logprobs


def test_models_are_listed_and_retrieved(server: Running, client: openai.OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert {"tiny", "support", "support@1", "support@2", "sales", "sales@1"} <= set(listed)
    assert "big" not in listed
    assert list(listed) == models(server.url)
    assert client.models.retrieve("tiny").object == "model"
    for reference in ("support@1", "support@latest"):
        assert client.models.retrieve(reference).id == reference
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody")
    assert error_of(caught.value)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("model", "answers"),
    [
        ("tiny", "tiny"),
        ("support", "support@2"),
        ("support@1", "support@1"),
        ("support@latest", "support@2"),
        ("sales", "sales@1"),
    ],
)
def test_chat_and_completion_streamed_and_whole(client: openai.OpenAI, model: str, answers: str) -> None:
    options: dict[str, Any] = {"model": model, "max_tokens": 12, "temperature": 0}
    messages: Any = [{"role": "user", "content": "What is a loom?"}]
    chat = client.chat.completions.create(messages=messages, **options)
    assert chat.model == answers
    assert chat.usage and chat.usage.completion_tokens <= 12  # noqa: PT018
    chunks = list(client.chat.completions.create(messages=messages, stream=True, **options))
    assert {chunk.model for chunk in chunks} == {answers}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == chat.choices[0].message.content
    whole = client.completions.create(prompt=PROMPT, **options)
    assert whole.model == answers
    parts = list(client.completions.create(prompt=PROMPT, stream=True, **options))
    assert {part.model for part in parts} == {answers}
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads a name that transformers renamed
def test_answers_are_those_of_peft(server: Running, complete: Complete) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(server.base)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    seen: set[tuple[int, ...]] = set()
    for model in ("tiny", "support@1", "support@2", "sales@1"):
        reference: Any = AutoModelForCausalLM.from_pretrained(server.base, dtype=torch.float32)
        if model != "tiny":
            folder = server.registry.path(server.registry.resolve(model))
            reference = PeftModel.from_pretrained(reference, str(folder))
        with torch.no_grad():
            expected = reference.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)[
                0, prompt["input_ids"].shape[1] :
            ]
        tokens, _ = complete(model)
        assert tokens == expected.tolist(), model
        seen.add(tuple(tokens))
    assert len(seen) == 4


def test_a_publication_answers_at_once_and_moves_latest(server: Running, complete: Complete) -> None:
    with pytest.raises(openai.NotFoundError):
        complete("fresh")
    for version in (1, 2):
        server.publish("fresh")
        tokens, answered = complete("fresh")
        assert answered == f"fresh@{version}"
        assert (tokens, answered) == complete(f"fresh@{version}") == complete("fresh@latest")
    assert complete("fresh@1")[0] != complete("fresh@2")[0]
    assert complete("fresh@1")[1] == "fresh@1"


@pytest.mark.parametrize(
    "model",
    ["nobody", "support@9", "support@prod", "../../etc/passwd", "..", "/etc", "tiny:support@1", "support@1:x", "a\0b"],
)
def test_unknown_models(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "?"}])
    error = error_of(caught.value)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "model", "model_not_found")
    assert model in error["message"]


@pytest.mark.parametrize(
    "path", ["/v1/models/..%2f..%2fetc", "/v1/models/%2e%2e", "/v1/models/support%2f1", "/v1/none", "/etc"]
)
def test_unknown_paths(server: Running, path: str) -> None:
    response = httpx.get(server.root + path)
    assert response.status_code == 404
    assert error_of(response)["type"] == "invalid_request_error"


def test_an_adapter_above_the_rank(complete: Complete) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="big@1 has rank 32") as caught:
        complete("big")
    assert error_of(caught.value)["code"] == "adapter_unfit"


@pytest.mark.parametrize("damage", ["byte", "missing"])
def test_a_corrupt_adapter_is_named_and_the_server_goes_on(server: Running, complete: Complete, damage: str) -> None:
    warm = [complete(model) for model in ("support", "sales")]
    manifest = server.publish(f"corrupt-{damage}")
    path = server.registry.path(manifest)
    weights = path / "adapter_model.safetensors"
    content = weights.read_bytes()
    if damage == "byte":
        weights.write_bytes(content[:-1] + b"\x01")
    else:
        weights.unlink()
    for _ in range(2):
        with pytest.raises(openai.InternalServerError) as caught:
            complete(manifest.id)
        error = error_of(caught.value)
        assert caught.value.status_code == 503
        assert (error["type"], error["param"], error["code"]) == ("server_error", "model", "adapter_corrupt")
        assert manifest.id in error["message"]
        assert str(server.folder) not in error["message"]
    assert [complete(model) for model in ("support", "sales")] == warm
    weights.write_bytes(content)
    assert complete(manifest.id)[1] == manifest.id  # mended, it is served


def test_streaming_from_a_corrupt_adapter(server: Running, client: openai.OpenAI) -> None:
    manifest = server.publish("corrupt-stream")
    (server.registry.path(manifest) / "adapter_config.json").unlink()
    with pytest.raises(openai.InternalServerError, match="corrupt-stream@1"):
        client.chat.completions.create(model="corrupt-stream", messages=[{"role": "user", "content": "?"}], stream=True)


def test_a_loaded_adapter_survives_its_files_and_its_eviction(server: Running, complete: Complete) -> None:
    """vLLM re-reads an adapter that it dropped from host memory, in the middle of a batch: a missing file kills it."""
    manifest = server.publish("evicted")
    before = complete("evicted")
    for file in manifest.files:
        (server.registry.path(manifest) / file).unlink()
    for number in range(RESIDENT + 1):
        server.publish(f"crowd-{number}")
        complete(f"crowd-{number}")
    assert complete("evicted") == before
    server.registry.remove(manifest.id, force=True)
    wait_until(lambda: httpx.get(f"{server.url}/models/evicted@1").status_code == 404, timeout_s=5)
    with pytest.raises(openai.NotFoundError):
        complete("evicted@1")
    assert complete("support")[1] == "support@2"


def test_a_version_that_is_replaced_on_disk_is_not_mixed_up(server: Running, complete: Complete) -> None:
    manifest, other = server.publish("replaced"), server.publish("another")
    before = complete("replaced")
    shutil.copytree(server.registry.path(other), server.registry.path(manifest), dirs_exist_ok=True)
    assert complete("replaced") == before
    server.publish("replaced")
    assert complete("replaced")[1] == "replaced@2"


CHAT, MESSAGES = "/v1/chat/completions", [{"role": "user", "content": "?"}]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ("{", None, "must be JSON"),
        ("", None, "must be a JSON object"),
        ("[]", None, "must be a JSON object"),
        ('"text"', None, "must be a JSON object"),
        ({"model": "tiny"}, "messages", "messages: Field required"),
        ({"model": "tiny", "messages": "hello"}, "messages", "messages"),
        ({"model": "tiny", "messages": [{"role": "user", "content": 5}]}, "messages.0.content", "content"),
        ({"model": "tiny", "messages": [{"role": "user", "content": [{"type": "x"}]}]}, None, "Invalid request"),
        ({"model": "tiny", "messages": MESSAGES, "max_tokens": "many"}, "max_tokens", "max_tokens"),
        ({"model": "tiny", "messages": MESSAGES, "max_tokens": -1}, None, "max_tokens"),
        ({"model": "tiny", "messages": MESSAGES, "max_tokens": 10_000}, None, "max_tokens"),
        ({"model": "support", "messages": [{"role": "user", "content": "long " * 300}]}, None, "context length"),
        ({"model": "tiny", "messages": MESSAGES, "temperature": -1}, None, "temperature"),
        ({"model": "", "messages": MESSAGES}, "model", "which model"),
        ({"messages": MESSAGES}, "model", "which model"),
        ({"model": 5, "messages": MESSAGES}, "model", "model"),
    ],
)
def test_bad_bodies(post: Callable[..., httpx.Response], body: Any, param: str | None, message: str) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    response = post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]
    if param:
        assert error["param"] == param


def test_a_body_of_another_type(post: Callable[..., httpx.Response]) -> None:
    response = post(CHAT, data={"model": "tiny"})
    assert response.status_code == 400
    assert "Content-Type: application/json" in error_of(response)["message"]


def test_what_vllm_has_is_passed_through(client: openai.OpenAI) -> None:
    """Several answers, stops, log-probabilities, echo, JSON by schema, a given seed."""
    options: dict[str, Any] = {"model": "support", "prompt": PROMPT, "max_tokens": 8}
    answers = client.completions.create(n=3, temperature=1, seed=1, logprobs=2, **options).choices
    assert [answer.index for answer in answers] == [0, 1, 2]
    assert all(answer.logprobs and len(answer.logprobs.tokens or ()) == 8 for answer in answers)
    assert client.completions.create(n=3, temperature=1, seed=1, **options).choices[2].text == answers[2].text
    whole = client.completions.create(temperature=0, **options).choices[0]
    echoed = client.completions.create(temperature=0, echo=True, logprobs=1, **options).choices[0]
    assert echoed.text == PROMPT + whole.text
    stop = whole.text[3:6]
    stopped = client.completions.create(temperature=0, stop=stop, **options).choices[0]
    assert (stopped.text, stopped.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(
        model="support",
        messages=[{"role": "user", "content": "?"}],
        max_tokens=60,
        response_format=wanted,
    )
    assert isinstance(json.loads(answer.choices[0].message.content or "")["a"], bool)
    tool: Any = {"type": "function", "function": {"name": "look_up", "parameters": schema}}
    called = client.chat.completions.create(
        model="support",
        messages=[{"role": "user", "content": "?"}],
        max_tokens=80,
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "look_up"}},
    )
    assert called.choices[0].message.tool_calls
    assert called.choices[0].message.tool_calls[0].function.name == "look_up"  # pyright: ignore[reportAttributeAccessIssue]


def test_the_other_routes(server: Running) -> None:
    with httpx.Client(base_url=server.root, timeout=30) as client:
        assert client.get("/version").json()["version"]
        assert "vllm:num_requests_running" in client.get("/metrics").text
        page = client.get("/docs").text
        assert "loraloom" in page
        assert "//cdn" not in page
        assert client.get("/static/swagger-ui-bundle.js").status_code == 200
        paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{model}", "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter", "/v1/votes", "/tokenize", "/detokenize", "/health", "/version", "/metrics",
    }  # fmt: skip


def test_tokens_of_an_adapter(server: Running, post: Callable[..., httpx.Response]) -> None:
    tokens = post("/tokenize", json={"model": "support", "prompt": PROMPT}).json()["tokens"]
    assert post("/detokenize", json={"model": "support@1", "tokens": tokens}).json()["prompt"].endswith(PROMPT)


def test_adapters_are_loaded_and_unloaded_as_with_vllm(server: Running, post: Callable[..., httpx.Response]) -> None:
    make_adapter(server.folder / "roots" / "mine", server.base, seed=77)
    make_adapter(server.folder / "elsewhere", server.base, seed=78)
    (server.folder / "roots" / "link").symlink_to(server.folder / "elsewhere")
    body = {"lora_name": "mine", "lora_path": str(server.folder / "roots" / "mine")}
    loaded = post("/v1/load_lora_adapter", json=body)
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'mine' added successfully.")
    asked = {"model": "mine", "prompt": PROMPT, "max_tokens": 2}
    assert post("/v1/completions", json=asked).json()["model"] == "mine@1"
    assert post("/v1/load_lora_adapter", json=body).status_code == 400
    assert post("/v1/load_lora_adapter", json=body | {"load_inplace": True}).status_code == 200
    assert post("/v1/completions", json=asked).json()["model"] == "mine@2"
    for path in ("elsewhere", "roots/link", "roots/../elsewhere", "none"):
        refused = post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": str(server.folder / path)})
        assert (refused.status_code, error_of(refused)["param"]) == (403, "lora_path")
    for name in ("../x", "tiny", "", "a" * 100):
        refused = post("/v1/load_lora_adapter", json=body | {"lora_name": name})
        assert refused.status_code == 400, name
        error_of(refused)
    (server.folder / "roots" / "empty").mkdir()
    refused = post("/v1/load_lora_adapter", json=body | {"lora_name": "y", "lora_path": f"{server.folder}/roots/empty"})
    assert refused.status_code == 400
    assert "adapter_config.json" in error_of(refused)["message"]
    assert post("/v1/unload_lora_adapter", json={"lora_name": "support"}).status_code == 400
    assert post("/v1/unload_lora_adapter", json={"lora_name": "nobody"}).status_code == 404
    assert post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 200
    assert post("/v1/completions", json=asked).status_code == 404


def test_a_hundred_megabytes(server: Running) -> None:
    """Refused by its announced length, or where there is none, once it is too long; the connection may then be shut."""
    megabyte = b"x" * 2**20
    port = httpx.URL(server.url).port
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port or 0), timeout=30) as connection:
        connection.sendall(head + b"Content-Length: 104857600\r\n\r\n" + megabyte[:1024])
        assert b" 413 " in connection.recv(65536).partition(b"\r\n")[0]
    with socket.create_connection(("127.0.0.1", port or 0), timeout=30) as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        sent = 0
        with contextlib.suppress(OSError):
            for sent in range(1, 101):  # noqa: B007
                connection.sendall(b"100000\r\n" + megabyte + b"\r\n")
        answer = b""
        with contextlib.suppress(OSError):
            while piece := connection.recv(65536):
                answer += piece
    assert sent < 100 or b" 413 " in answer.partition(b"\r\n")[0]  # cut off on the way, or told at the end
    assert b" 200 " not in answer
    assert httpx.get(f"{server.root}/health").status_code == 200


def test_a_client_that_leaves_ends_its_generation(server: Running) -> None:
    body = {"model": "support", "prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "stream": True}
    complete = httpx.post(f"{server.url}/completions", json=body | {"stream": False}, timeout=120).json()
    assert complete["usage"]["completion_tokens"] == 200
    before = server.metric("vllm:generation_tokens_total")
    for stream in (True, False):
        with (
            contextlib.suppress(httpx.ReadTimeout),
            httpx.stream("POST", f"{server.url}/completions", json=body | {"stream": stream}, timeout=0.3) as response,
        ):
            for _ in response.iter_bytes():
                break
        wait_until(lambda: server.metric("vllm:num_requests_running") == 0, timeout_s=60)
    assert server.metric("vllm:generation_tokens_total") - before < 2 * 200


def test_the_prefix_cache_never_answers_one_version_from_another(server: Running, complete: Complete) -> None:
    prompt = "The loom is " * 17  # of more than one block of vLLM's cache, which is 128 tokens on CPUs
    before = server.metric("vllm:prefix_cache_hits_total")
    asked = ["support@1", "support@2", "tiny"] * 2
    answers = [complete(model, prompt)[0] for model in asked]
    assert answers[:3] == answers[3:]
    assert len({tuple(answer) for answer in answers}) == 3
    assert server.metric("vllm:prefix_cache_hits_total") - before >= 3 * 128  # the cache was asked, and knew each


@pytest.mark.timeout(600)
def test_schemathesis_finds_no_server_error(server: Running, complete: Complete) -> None:
    """Requests made of the server's own OpenAPI document, as it is written and as it is not."""
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{server.root}/openapi.json"]
    command += ["--checks", "not_a_server_error", "--phases", "examples,coverage,fuzzing", "--max-examples", "10"]
    command += ["--request-timeout", "120", "--generation-deterministic", "--workers", "2", "--no-color"]
    done = subprocess.run(command, cwd=server.folder, capture_output=True, text=True, timeout=560, check=False)
    told = done.stdout[-5000:] + done.stderr[-1000:]
    # Not the exit code: CPython 3.11 now and then fails while hypothesis reads its own source
    # (https://github.com/python/cpython/issues/106905), and that operation then has fewer cases.
    assert "Server error" not in done.stdout, told
    cases = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert cases, told
    assert cases[1] == cases[2], told
    assert int(cases[1]) > 100, told
    assert complete("support")[1] == "support@2"


def test_many_requests_at_once_are_kept_apart(server: Running, complete: Complete) -> None:
    """The base and adapters in one batch; more adapters than the engine has slots for, and than a replica keeps."""
    others = [server.publish("parallel", rank=rank).id for rank in (1, 16)]
    wanted = ["tiny", "support@1", "support@2", "sales", *others]
    alone = {model: complete(model) for model in wanted}
    with ThreadPoolExecutor(12) as threads:
        together = list(threads.map(complete, wanted * 6))
    assert together == [alone[model] for model in wanted] * 6


def test_a_cold_adapter_that_many_ask_for_at_once(server: Running, complete: Complete) -> None:
    """It is loaded once; upstream loads it for each, and answers all but one with an error."""
    server.publish("rush")
    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(complete, ["rush"] * 16))
    assert together == [complete("rush@1")] * 16


@pytest.mark.browser
def test_the_playground(server: Running) -> None:
    """In a real browser: answers side by side; who gave them; a vote, which the registry keeps."""
    with chromium() as browser, visit(browser) as seen:
        page = seen.page
        page.goto(server.root)
        expect(page.locator("#served")).to_contain_text("tiny, ")
        page.goto(f"{server.root}/playground#m=tiny&m=support&m=support%401&prompt=The+loom+is&max=96&mode=completion")
        expect(page.locator("#chips span")).to_have_count(3)
        page.click("#ask")
        expect(page.locator("#verdict")).to_be_visible()
        titles = page.locator("article h2")
        expect(titles).to_have_text(["A · tiny", "B · support → support@2", "C · support@1"])
        facts = page.locator("article footer").all_text_contents()
        pattern = re.compile(r"first token \d+ ms( · [\d.]+ tokens/s)? · 96 tokens · cut at the limit")
        assert all(map(pattern.fullmatch, facts)), facts
        body = {"model": "support@2", "prompt": PROMPT, "max_tokens": 96, "temperature": 0}
        whole = httpx.post(f"{server.url}/completions", json=body, timeout=60).json()["choices"][0]["text"]
        assert whole
        assert page.locator("pre").nth(1).text_content() == whole
        page.click("#choices button:text-is('B')")
        expect(page.locator("#tally")).to_contain_text("support@2 is preferred in 100 % of its comparisons")
        expect(page.locator("article.best h2")).to_have_text("B · support → support@2")
        expect(page.locator("#verdict")).to_be_hidden()
    shelf = Registry(server.registry.root)
    assert shelf.entry("support", 2).votes.against == {"base": Tally(won=1), "support@1": Tally(won=1)}
    assert shelf.scores("support", 1)["preferred"].value == 0


@contextlib.contextmanager
def questions(server: Running) -> Generator[tuple[Page, Gate]]:
    """The playground, ready to ask the base and an adapter for 64 tokens, behind a gate."""
    # Sampled: greedily, this base says one half of a character for ever.
    asks = "m=tiny&m=sales&prompt=The+loom+is&max=64&mode=completion&temperature=1&seed=1"
    with gate(server.root) as before_it, chromium() as browser, visit(browser) as seen:
        seen.page.goto(f"{before_it.url}/playground#{asks}")
        expect(seen.page.locator("#served")).to_contain_text("tiny, ")
        yield seen.page, before_it


def part(stream: Stream, page: Page, panel: int) -> str:
    """Send the first text of a stream and see it on the page; returns it."""
    count, text = stream.steps()[0]
    assert text
    stream.send(count)
    wait_until(lambda: page.locator("pre").nth(panel).text_content() == text)
    return text


@pytest.mark.browser
def test_answers_in_the_playground_as_they_arrive(server: Running) -> None:
    """Text grows as it comes, and times are the page's own."""
    with questions(server) as (page, before_it):
        facts = page.locator("article footer")

        def clock() -> float:
            return page.evaluate("performance.now()")

        asked = [clock()]
        page.click("#ask")
        expect(facts).to_have_text(["asked", "asked"])
        asked.append(clock())
        expect(page.locator("#ask")).to_be_disabled()
        streams = before_it.streams(2)
        steps = streams["tiny"].steps()
        assert len(steps) > 2, steps
        whole = ""
        arrived: list[tuple[float, float]] = []
        for number, (count, text) in enumerate(steps):
            if number == 1:
                page.wait_for_timeout(1000)  # long beside the time that a piece takes: it makes the bounds below narrow
            whole += text
            sent = clock()
            streams["tiny"].send(count)
            wait_until(lambda whole=whole: page.locator("pre").nth(0).text_content() == whole)
            arrived.append((sent, clock()))
        expect(facts).to_have_text(["asked", "asked"])  # the server has not said that this is all
        streams["tiny"].send_all()
        expect(facts.nth(0)).to_contain_text("first token")
        pattern = r"first token (\d+) ms · ([\d.]+) tokens/s · 64 tokens · cut at the limit"
        told = re.fullmatch(pattern, facts.nth(0).inner_text())
        assert told, facts.nth(0).inner_text()
        (first_sent, first_seen), (last_sent, last_seen) = arrived[0], arrived[-1]
        assert first_sent - asked[1] - 1 <= float(told[1]) <= first_seen - asked[0] + 1
        assert 63_000 / (last_seen - first_sent) - 0.1 <= float(told[2]) <= 63_000 / (last_sent - first_seen) + 0.1
        streams["sales"].send_all()
        # All at once is no speed.
        expect(facts.nth(1)).to_have_text(re.compile(r"first token \d+ ms · 64 tokens · cut at the limit"))
        expect(page.locator("#verdict")).to_be_visible()


@pytest.mark.browser
def test_an_answer_in_the_playground_is_stopped(server: Running) -> None:
    """What has come stays, an answer that is whole too; what was not yet asked is not asked."""
    with questions(server) as (page, before_it):
        texts, facts = page.locator("pre"), page.locator("article footer")
        page.click("#ask")
        streams = before_it.streams(2)
        streams["tiny"].send_all()
        expect(facts.nth(0)).to_contain_text("64 tokens")
        whole = texts.nth(0).text_content()
        begun = part(streams["sales"], page, 1)
        assert not streams["sales"].has_left.is_set()
        page.click("#stop")
        expect(facts.nth(1)).to_have_text("stopped")
        assert streams["sales"].has_left.wait(60)
        assert texts.all_text_contents() == [whole, begun]
        expect(facts.nth(0)).to_contain_text("64 tokens")
        expect(page.locator("#stop")).to_be_hidden()
        expect(page.locator("#verdict")).to_be_hidden()  # there is one answer

        page.check("#turns")
        page.click("#ask")
        only = before_it.streams(1)
        expect(facts).to_have_text(["asked", "waiting"])
        page.click("#stop")
        expect(facts).to_have_text(["stopped", "stopped"])
        assert only["tiny"].has_left.wait(60)
        assert sorted(before_it.asked[:2]) == ["sales", "tiny"]
        assert before_it.asked[2:] == ["tiny"]


@pytest.mark.browser
def test_an_answer_in_the_playground_is_cut_off(server: Running) -> None:
    """It is told under what has come; the other one goes on."""
    with questions(server) as (page, before_it):
        texts, facts = page.locator("pre"), page.locator("article footer")
        page.click("#ask")
        streams = before_it.streams(2)
        begun = part(streams["sales"], page, 1)
        streams["sales"].end()
        expect(texts.nth(1)).to_have_class("bad")
        assert texts.nth(1).text_content() == f"{begun}\nthe answer was cut off by the server"
        expect(facts).to_have_text(["asked", "failed"])
        streams["tiny"].send_all()
        expect(facts.nth(0)).to_contain_text("64 tokens")
        expect(page.locator("#verdict")).to_be_hidden()


@pytest.mark.browser
def test_the_playground_blind(server: Running) -> None:
    """Neither names nor speeds before the vote, and no order that gives them away."""
    with chromium() as browser, visit(browser, scheme="dark", width=380) as seen:
        page = seen.page
        orders: set[str] = set()
        for _ in range(20):  # of two orders, one alone: once in half a million
            page.goto("about:blank")
            page.goto(f"{server.root}/playground#m=tiny&m=sales&prompt=x&max=2&mode=completion&blind=1&turns=1")
            page.click("#ask")
            expect(page.locator("#verdict")).to_be_visible()
            shown = page.locator("#answers").inner_text()
            assert "tiny" not in shown
            assert "sales" not in shown
            assert "ms" not in shown
            page.click("#reveal")
            orders.add("".join(page.locator("article h2").all_text_contents()))
            if len(orders) == 2:
                break
        assert orders == {"A · tinyB · sales → sales@1", "A · sales → sales@1B · tiny"}
        assert page.evaluate("document.documentElement.scrollWidth") == 380
    assert "preferred" not in Registry(server.registry.root).scores("sales", 1)


@pytest.mark.browser
def test_what_a_person_does_wrong_in_the_playground(server: Running) -> None:
    hostile = '<img src=x onerror="window.stung=1"><script>window.stung=1</script>'
    with chromium() as browser, visit(browser, refused=[404]) as seen:
        page = seen.page
        page.goto(f"{server.root}/playground#m={quote(hostile)}&mode=nonsense&max=x&prompt={quote(hostile)}")
        expect(page.locator("#mode")).to_have_value("chat")
        expect(page.locator("#prompt")).to_have_value(hostile)
        page.click("#ask")
        expect(page.locator("pre.bad")).to_contain_text("does not exist")
        expect(page.locator("article h2")).to_have_text(f"A · {hostile}")
        assert page.evaluate("window.stung") is None
        assert page.locator("main img, main script").count() == 0
        # The same version twice is nothing to compare; nor is one answer.
        page.goto("about:blank")
        page.goto(f"{server.root}/playground#m=support&m=support%402&prompt=x&max=2&mode=completion")
        page.click("#ask")
        expect(page.locator("#note")).to_contain_text("the same version")
        expect(page.locator("#verdict")).to_be_hidden()
        # What is edited while one after another is asked counts for the next question.
        page.goto("about:blank")
        page.goto(f"{server.root}/playground#m=tiny&m=sales&prompt=first&max=64&mode=completion&turns=1")
        asked: list[str] = []
        page.on("request", lambda sent: asked.append(str(sent.post_data)) if sent.method == "POST" else None)
        # In one turn of the page's own loop: how fast the first answers makes no difference.
        page.evaluate(
            "() => { document.getElementById('ask').click(); document.getElementById('prompt').value = 'second'; }"
        )
        expect(page.locator("#verdict")).to_be_visible()
        assert [json.loads(sent)["prompt"] for sent in asked] == ["first", "first"]
        page.goto("about:blank")
        page.goto(f"{server.root}/playground#m=support&m=support%402")
        for number in range(4):
            page.fill("#add", f"name-{number}")
            page.press("#add", "Enter")
        expect(page.locator("#chips span")).to_have_count(6)
        expect(page.locator("#add")).to_be_disabled()  # a browser opens no more connections to one server


def test_our_own_client(server: Running) -> None:
    conversations = [[{"role": "user", "content": str(number)}] for number in range(8)]
    answers = ask_all(server.url, "support", conversations, max_tokens=8)
    assert {answer.model for answer in answers} == {"support@2"}
    alone = [ask(server.url, "support", conversation, max_tokens=8) for conversation in conversations]
    assert [answer.text for answer in answers] == [answer.text for answer in alone]
