"""The file of API keys: what stands in it, how it is read, and how it is changed.

    keys:
      alice:
        sha256: 5e88...            # of the whole key; the key itself is nowhere
        scopes: {adapters: [support, sales-*], base: true, admin: false}
        limits: {requests_per_minute: 600, tokens_per_minute: 100000, max_concurrent: 16, weight: 2}
        expires_at: 2027-01-01T00:00:00Z
        note: the support desk's bot

A key is ``ll-`` and 32 random bytes in base64url. Of secrets with so much entropy a plain SHA-256 is stored: NIST SP
800-63B, section 5.1.2.2, asks for a salted, slow hash only below 112 bits. Slowness stops the guessing of passwords
that people choose; nobody guesses 256 random bits, and a slow hash would cost each request its milliseconds.

**Contract.** ``change_keys`` locks the file against other writers (flock), writes its successor beside it with mode
0600 and renames it: a reader sees the old file or the new one, and a crash leaves the old one. Comments are not kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import tempfile
from base64 import urlsafe_b64encode
from collections.abc import Callable, Generator, Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, PositiveInt

from cluster.errors import ABSENT, Fault, InputError
from cluster.rules import Broken, StrictModel, rule
from cluster.schema import parse_spec, parse_yaml, to_yaml
from cluster.storage import disk_trouble

PREFIX = "ll-"
_RANDOM_BYTES = 32
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PATTERN = re.compile(r"[A-Za-z0-9._*-]{1,128}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def _check_id(name: str) -> str:
    if not _ID.fullmatch(name):
        raise ValueError("must start with a letter or digit and hold at most 64 letters, digits, '.', '_' and '-'")
    return name


def _check_digest(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise ValueError("must be the SHA-256 of a key, as 64 lower-case hexadecimal digits")
    return digest


def _check_pattern(pattern: str) -> str:
    if not _PATTERN.fullmatch(pattern):
        raise ValueError("must be an adapter's name without version, or a pattern of such names such as sales-*")
    return pattern


def _read_time(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("must be a time such as 2027-01-01T00:00:00Z") from None
    if moment.tzinfo is None:
        raise ValueError("must be a time with its zone, such as 2027-01-01T00:00:00Z")
    return moment


KeyId = Annotated[str, AfterValidator(_check_id)]
Digest = Annotated[str, AfterValidator(_check_digest)]
NamePattern = Annotated[str, AfterValidator(_check_pattern)]
Moment = Annotated[datetime, BeforeValidator(_read_time)]


class KeyScopes(StrictModel):
    """What a key may do."""

    adapters: list[NamePattern] = []
    """Adapters that it may ask, in every version, by name; ``*`` stands for any number of characters."""
    base: bool = True
    """It may ask the plain base."""
    admin: bool = False
    """It may load and unload adapters through the server, and read ``/metrics``."""


class KeyLimits(StrictModel):
    """How much a key may do, over all replicas; null means without limit."""

    requests_per_minute: PositiveInt | None = None
    """Requests a minute; as many may come at once after a quiet minute."""
    tokens_per_minute: PositiveInt | None = None
    """Tokens of prompts and answers a minute; as many may come at once after a quiet minute."""
    max_concurrent: PositiveInt | None = None
    """Requests at a time, waiting ones included."""
    weight: PositiveFloat = 1.0
    """Its share of a busy engine: a key of weight 2 is served twice the tokens of a key of weight 1."""


class KeyEntry(StrictModel):
    """One key."""

    sha256: Digest
    """SHA-256 of the key."""
    scopes: KeyScopes = KeyScopes()
    """What it may do."""
    limits: KeyLimits = KeyLimits()
    """How much."""
    created_at: Moment | None = None
    """When it was made."""
    expires_at: Moment | None = None
    """From when on it is refused; null means never."""
    revoked_at: Moment | None = None
    """Since when it is refused; null means that it is not."""
    note: Annotated[str, Field(max_length=500)] = ""
    """For people."""

    @rule
    def _may_do_something(self) -> Iterator[Broken]:
        if not (self.scopes.adapters or self.scopes.base or self.scopes.admin):
            yield "scopes", "must allow something: adapters, base or admin"


class KeyFile(StrictModel):
    """All keys."""

    keys: dict[KeyId, KeyEntry] = {}
    """Key ids, which appear in metrics and logs, and the keys."""

    @rule
    def _digests_are_different(self) -> Iterator[Broken]:
        seen: dict[str, str] = {}
        for name, entry in self.keys.items():
            digest = vars(entry).get("sha256")
            if digest in seen:
                yield f"keys.{name}.sha256", f"must not be that of another key ({seen[digest]})"
            elif digest is not None:
                seen[digest] = name


def new_key() -> str:
    """A new random key."""
    return PREFIX + urlsafe_b64encode(secrets.token_bytes(_RANDOM_BYTES)).rstrip(b"=").decode()


def key_digest(key: str) -> str:
    """What the file holds of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def parse_keys(content: bytes, where: str) -> KeyFile:
    """Read the content of a file of keys, YAML or JSON.

    Raises:
        InputError: all its faults.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise InputError([Fault(where, f"must be UTF-8 text ({error.reason} at byte {error.start})", ABSENT)]) from None
    return parse_spec(parse_yaml(text, where), KeyFile, where)


def change_keys(path: Path, change: Callable[[KeyFile], KeyFile], *, create: bool = False) -> KeyFile:
    """Replace the file by what ``change`` makes of it, and return that; see the head of this file.

    Args:
        path: The file; a symbolic link is followed.
        change: Called once, with the lock held. What it raises leaves the file as it is.
        create: Begin with no keys where there is no file; its folder is made too.

    Raises:
        InputError: the file, or what ``change`` makes of it, is at fault.
        MachineError: it cannot be read or written.
    """
    path = path.resolve()
    with disk_trouble("the file of keys", path), contextlib.ExitStack() as stack:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(_locked(path, create=create))
        is_new = os.fstat(file).st_size == 0
        try:
            after = change(KeyFile() if is_new and create else parse_keys(path.read_bytes(), str(path)))
            # Checked again as a whole: model_copy, with which a change is made, checks nothing.
            after = parse_spec(after.model_dump(mode="json"), KeyFile, str(path))
            _replace(path, _text(path, after))
        except BaseException:
            if is_new and create:
                path.unlink(missing_ok=True)
            raise
    return after


@contextlib.contextmanager
def _locked(path: Path, *, create: bool) -> Generator[int]:
    """The file's descriptor, locked; of the file that has the name once the lock is there."""
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    while True:
        file = os.open(path, flags, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                is_it = os.fstat(file).st_ino == path.stat().st_ino
            except FileNotFoundError:
                is_it = False
            if is_it:
                yield file
                return
        finally:
            os.close(file)


def _text(path: Path, keys: KeyFile) -> str:
    if path.suffix == ".json":
        return json.dumps(keys.model_dump(mode="json"), indent=2) + "\n"
    return to_yaml(keys)


def _replace(path: Path, text: str) -> None:
    """Write through to the disk under another name, which only this user can read, then rename."""
    file, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # mkstemp: mode 0600
    try:
        with os.fdopen(file, "w", encoding="utf-8") as writer:
            writer.write(text)
            writer.flush()
            os.fsync(file)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
