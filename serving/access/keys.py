"""Who asks: API keys, checked at each request against a file that may change while the server runs."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cluster.errors import LoraloomError, MachineError, NotFoundError
from serving.access.key_file import KeyEntry, KeyLimits, parse_keys
from serving.http.api_error import insufficient_scope, invalid_api_key

_log = logging.getLogger(__name__)

_MAX_HEADER = 512
# RFC 6750, section 2.1; the scheme's name in any case by RFC 9110, section 11.1.
_BEARER = re.compile(r"[Bb][Ee][Aa][Rr][Ee][Rr] +([A-Za-z0-9._~+/-]+=*) *")


@dataclass(frozen=True, slots=True)
class Key:
    """A key as requests meet it."""

    id: str
    limits: KeyLimits
    base: bool
    admin: bool
    adapters: re.Pattern[str]
    """Matches the whole name of each adapter that it may ask."""
    expires_at: float
    """Seconds since 1970; infinity where it does not expire."""
    is_revoked: bool = False
    is_anonymous: bool = False
    """Whoever asks a server that has no keys; such clients are told apart by their address."""

    def may_ask(self, model: str, base_name: str) -> bool:
        """Whether this key may ask ``model``: the base, or a reference to an adapter (``support``, ``support@2``).

        The name alone decides, whether there is such an adapter or not: the answer tells nobody what there is. It is
        also the filter of what ``/v1/models`` shows.
        """
        if model == base_name:
            return self.base
        return self.adapters.fullmatch(model.partition("@")[0]) is not None

    def authorise(self, model: str, base_name: str) -> None:
        """Let a request for ``model`` pass.

        Raises:
            ApiError: 403, ``insufficient_scope``.
        """
        if not self.may_ask(model, base_name):
            shown = model if len(model) <= 100 else f"{model[:100]}..."
            raise insufficient_scope(f"The API key `{self.id}` may not use the model `{shown}`")

    def require_admin(self) -> None:
        """Let a request pass that changes the server.

        Raises:
            ApiError: 403, ``insufficient_scope``.
        """
        if not self.admin:
            raise insufficient_scope(f"The API key `{self.id}` is not an admin key")

    def tenant(self, address: str) -> str:
        """Whose queue a request waits in: its key's, or its client address's where there are no keys.

        Not its ``user`` field's: a client that writes another user into each request would have a queue, and so a
        share, for each.
        """
        return f"address {address}" if self.is_anonymous else self.id


ANONYMOUS = Key("anonymous", KeyLimits(), True, False, re.compile(".*", re.DOTALL), float("inf"), is_anonymous=True)
"""The key of every request where keys are off: all models, no limits, and nothing of an admin's."""


class KeyRing:
    """The keys of one file. ``refresh`` may run in one other thread than ``authenticate``.

    ``refresh`` reads the file again when it has changed. A file that is broken or gone changes nothing: the keys that
    were read last stay valid, ``trouble`` says why, and the log says it once. A key that has expired, or is marked as
    revoked, is refused from the next request on.
    """

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.time) -> None:
        """Read ``path``.

        Raises:
            InputError: all faults of the file.
            NotFoundError: there is no such file.
            MachineError: it cannot be read.
        """
        self._path = Path(path)
        self._clock = clock
        self._seen: tuple[int, int, int] | None = None
        self.trouble: str | None = None
        """Why the file, as it is now, is not what counts; None while it is."""
        self._keys = self._read()

    def __len__(self) -> int:
        return len(self._keys)

    def refresh(self) -> bool:
        """Read the file again if it has changed; True if other keys count now. To be called every second or so."""
        try:
            if self._signature() == self._seen:
                return False
            keys = self._read()
        except LoraloomError as error:
            if self.trouble != str(error):
                _log.error("the API keys stay as they were: %s", error)
            self.trouble = str(error)
            return False
        self.trouble = None
        self._keys = keys
        _log.info("%d API keys read from %s", len(keys), self._path)
        return True

    def authenticate(self, authorization: str | None) -> Key:
        """The key of a request, by its ``Authorization`` header.

        Raises:
            ApiError: 401, ``invalid_api_key``: there is none, or it is unknown, revoked or expired.
        """
        if not authorization:
            message = "This server wants an API key, in the header: Authorization: Bearer KEY"
            raise invalid_api_key(message, is_given=False)
        match = _BEARER.fullmatch(authorization) if len(authorization) <= _MAX_HEADER else None
        if match is None:
            is_bearer = authorization[:7].lower() == "bearer "
            raise invalid_api_key("The Authorization header must be: Bearer KEY", is_given=is_bearer)
        # What a lookup's time tells is about the digest, which nobody can steer towards that of a key.
        key = self._keys.get(hashlib.sha256(match[1].encode()).digest())
        if key is None:
            raise invalid_api_key("The API key is not known here")
        if key.is_revoked:
            raise invalid_api_key(f"The API key `{key.id}` is revoked")
        if self._clock() >= key.expires_at:
            moment = datetime.fromtimestamp(key.expires_at, UTC)
            raise invalid_api_key(f"The API key `{key.id}` expired at {moment:%Y-%m-%dT%H:%M:%SZ}")
        return key

    def _read(self) -> dict[bytes, Key]:
        # The signature first: a file that changes while it is read is read again at the next refresh.
        signature = self._signature()
        try:
            content = self._path.read_bytes()
        except OSError as error:
            raise _unreadable(self._path, error) from None
        self._seen = signature
        entries = parse_keys(content, str(self._path)).keys
        return {bytes.fromhex(entry.sha256): _key(name, entry) for name, entry in entries.items()}

    def _signature(self) -> tuple[int, int, int]:
        try:
            stat = self._path.stat()
        except OSError as error:
            self._seen = None  # whatever comes to stand there is news
            raise _unreadable(self._path, error) from None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _unreadable(path: Path, error: OSError) -> LoraloomError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return NotFoundError(f"{path}: no such file of API keys; `loraloom keys add {path} ID` makes one")
    return MachineError(f"{path}: cannot be read ({error.strerror or error})")


def _key(name: str, entry: KeyEntry) -> Key:
    patterns = (re.escape(pattern).replace(r"\*", ".*") for pattern in entry.scopes.adapters)
    return Key(
        id=name,
        limits=entry.limits,
        base=entry.scopes.base,
        admin=entry.scopes.admin,
        adapters=re.compile("|".join(patterns) or r"(?!)"),
        expires_at=entry.expires_at.timestamp() if entry.expires_at else float("inf"),
        is_revoked=entry.revoked_at is not None,
    )
