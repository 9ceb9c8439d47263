"""A registry in an object store: S3 and what speaks its language, Google's and Azure's.

The URIs are those of pyarrow's filesystems: ``s3://[key:secret@]bucket/prefix?region=…&scheme=…&endpoint_override=…``,
``gs://bucket/prefix`` and ``abfs://container@account.dfs.core.windows.net/prefix``. Credentials are looked for in
pyarrow's order: the URI, the environment, the profile in ``~/.aws``, the machine's role. pyarrow itself is not asked,
because it has no write that fails where an object is (https://github.com/apache/arrow/issues/44281), and the log is
made of nothing else; obstore, the object store of Rust's Arrow, has it (on S3 ``If-None-Match: *``,
https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html).
"""

from __future__ import annotations

import configparser
import contextlib
import os
import tempfile
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from cluster.errors import Fault, InputError, MachineError
from serving.registry.errors import RegistryUnreachableError
from serving.registry.store import Stored
from serving.spec import REGISTRY_SCHEMES

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig
    from obstore.store import ObjectStore as Client

# A store that is gone must be told within seconds; a request that moves much data may take long as long as it moves.
_CONNECT_TIMEOUT_S = 2
_READ_TIMEOUT_S = 5
_REQUEST_TIMEOUT_S = 600
_RETRIES: RetryConfig = {"max_retries": 2, "retry_timeout": timedelta(seconds=5)}
_CHUNK = 1 << 20
_AT_ONCE = 32

_S3_OPTIONS = ("region", "scheme", "endpoint_override", "force_virtual_addressing")
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")
_SHOWN = 300


class ObjectStore:
    """See ``serving.registry.store.Store`` for the contract. Made anew from its URI where it is pickled."""

    def __init__(self, uri: str, where: str, what: str = "the registry") -> None:
        """``where`` is the field that holds the URI, ``what`` is kept there: both stand in messages."""
        self.uri = uri
        self._field, self._what = where, what
        self._where, self._client = _connect(uri, where)

    def __reduce__(self) -> tuple[type[ObjectStore], tuple[str, str, str]]:
        return ObjectStore, (self.uri, self._field, self._what)

    @property
    def where(self) -> str:
        """The URI without credentials and options."""
        return self._where

    def exists(self) -> bool:
        """As ``Store.exists``."""
        self.keys("_log")
        return True

    def read(self, key: str) -> bytes | None:
        """As ``Store.read``."""
        import obstore

        with self._told():
            try:
                return bytes(obstore.get(self._client, key).bytes())
            except FileNotFoundError as error:
                if _is_bucket_missing(error):
                    raise
                return None

    def read_many(self, keys: list[str]) -> list[bytes | None]:
        """As ``Store.read_many``, many at once."""
        with ThreadPoolExecutor(min(_AT_ONCE, len(keys) or 1)) as pool:
            return list(pool.map(self.read, keys))

    def chunks(self, key: str) -> Iterator[bytes]:
        """As ``Store.chunks``."""
        import obstore

        with self._told():
            try:
                stream = obstore.get(self._client, key).stream(_CHUNK)
            except FileNotFoundError as error:
                if _is_bucket_missing(error):
                    raise
                raise FileNotFoundError(key) from None
            yield from map(bytes, stream)

    def create(self, key: str, content: bytes) -> bool:
        """As ``Store.create``."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        with self._told():
            try:
                obstore.put(self._client, key, content, mode="create")
            except AlreadyExistsError:
                return False
            return True

    def upload(self, source: Path, key: str) -> None:
        """As ``Store.upload``."""
        import obstore

        with self._told():
            obstore.put(self._client, key, source)

    def keys(self, prefix: str) -> list[Stored]:
        """As ``Store.keys``."""
        import obstore

        with self._told():
            found = obstore.list(self._client, f"{prefix}/" if prefix else None, chunk_size=1000).collect()
        return sorted(
            Stored(entry["path"], entry["last_modified"], entry["size"], entry["e_tag"] or "") for entry in found
        )

    def delete(self, keys: Iterable[str]) -> None:
        """As ``Store.delete``."""
        import obstore

        with self._told():
            for key in keys:
                with contextlib.suppress(FileNotFoundError):
                    obstore.delete(self._client, key)

    @contextlib.contextmanager
    def scratch(self) -> Generator[Path]:
        """As ``Store.scratch``."""
        with tempfile.TemporaryDirectory(prefix="loraloom-publish-") as folder:
            yield Path(folder)

    @contextlib.contextmanager
    def _told(self) -> Generator[None]:
        """What the store answers, as what a user can do about it."""
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        try:
            yield
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise MachineError(
                f"{self.where} refuses these credentials ({_reason(error)}); give others, or mend what the "
                "bucket allows"
            ) from None
        except (FileNotFoundError, BaseError) as error:
            if _is_bucket_missing(error):
                raise InputError([Fault(self._field, "its bucket must exist", self.where)]) from None
            if isinstance(error, FileNotFoundError):
                raise
            raise RegistryUnreachableError(f"{self._what} {self.where} does not answer ({_reason(error)})") from None


def _connect(uri: str, where: str) -> tuple[str, Client]:
    """The URI without secrets, and a client for it; nothing is sent."""
    shown = f"{uri.partition('://')[0]}://…"  # of what is no URI, any part may be a secret
    try:
        parts = urlsplit(uri)
    except ValueError:
        raise InputError([Fault(where, "must be a valid URI", shown)]) from None
    if parts.scheme not in REGISTRY_SCHEMES:
        kinds = ", ".join(f"{scheme}://" for scheme in REGISTRY_SCHEMES)
        raise InputError([Fault(where, f"must be a folder, or a URI that starts with one of {kinds}", shown)])
    user, _, bucket = parts.netloc.rpartition("@")
    if ":" in bucket:  # no bucket's name has one: this is a key, and a secret cut in two
        rule = "must have the signs / ? # of a secret as %2F %3F %23, and an @ after it"
        raise InputError([Fault(where, rule, shown)])
    try:
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:
        raise InputError([Fault(where, "must have options of the form name=value&name=value", shown)]) from None
    if parts.scheme != "s3" and ":" in user:
        raise InputError([Fault(where, "must hold no key: it is looked for in the environment", shown)])
    container = f"{user}@" if user and parts.scheme != "s3" else ""
    plain = f"{parts.scheme}://{container}{bucket}{parts.path}"
    faults: list[Fault] = []
    if not bucket or parts.fragment:
        faults.append(Fault(where, f"must look like {parts.scheme}://bucket/prefix", plain))
    known = _S3_OPTIONS if parts.scheme == "s3" else ()
    faults += [
        Fault(where, f"has an option that is not known here (known: {', '.join(known) or 'none'})", option)
        for option in options
        if option not in known
    ]
    if options.get("scheme", "https") not in ("http", "https"):
        faults.append(Fault(where, "the option scheme must be http or https", options["scheme"]))
    if faults:
        raise InputError(faults)
    from obstore.exceptions import BaseError

    try:
        return plain.rstrip("/"), _s3_client(parts, bucket, options) if parts.scheme == "s3" else _other_client(plain)
    except (BaseError, ValueError) as error:
        raise InputError([Fault(where, f"cannot be opened ({_reason(error)})", plain)]) from None


def _s3_client(parts: SplitResult, bucket: str, options: dict[str, str]) -> Client:
    from obstore.store import S3Store

    profile = _aws_profile()
    config: dict[str, Any] = {}
    if parts.username:
        config |= {"access_key_id": unquote(parts.username), "secret_access_key": unquote(parts.password or "")}
    elif "AWS_ACCESS_KEY_ID" not in os.environ:
        config |= {key: profile[f"aws_{key}"] for key in _KEYS if f"aws_{key}" in profile}
    scheme = options.get("scheme", "https")
    endpoint = options.get("endpoint_override")
    if endpoint:
        config["endpoint"] = endpoint if "://" in endpoint else f"{scheme}://{endpoint}"
    endpoint = (
        config.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    )
    region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    region = region or profile.get("region") or ("us-east-1" if endpoint else _bucket_region(bucket))
    if region:
        config["region"] = region
    if options.get("force_virtual_addressing", "false").lower() == "true":
        config["virtual_hosted_style_request"] = True
    client = _client_options(plain_http=endpoint.startswith("http://"))
    prefix = unquote(parts.path).strip("/") or None
    return S3Store(bucket, prefix=prefix, client_options=client, retry_config=_RETRIES, **config)


def _other_client(uri: str) -> Client:
    from obstore.store import from_url

    # pyarrow's abfs and abfss differ in whether they encrypt; every request of obstore is encrypted.
    return from_url(uri, client_options=_client_options(plain_http=False), retry_config=_RETRIES)


def _client_options(*, plain_http: bool) -> ClientConfig:
    options: ClientConfig = {
        "connect_timeout": timedelta(seconds=_CONNECT_TIMEOUT_S),
        "read_timeout": timedelta(seconds=_READ_TIMEOUT_S),
        "timeout": timedelta(seconds=_REQUEST_TIMEOUT_S),
        "allow_http": plain_http,
    }
    return options


_KEYS = ("access_key_id", "secret_access_key", "session_token")


def _aws_profile() -> dict[str, str]:
    """The keys and the region that ``~/.aws`` holds for the chosen profile. Profiles that name a role or a single
    sign-on are left to ``aws configure export-credentials``.
    """
    profile = os.environ.get("AWS_PROFILE", "default")
    home = Path("~/.aws").expanduser()
    found: dict[str, str] = {}
    for variable, file, section in (
        ("AWS_CONFIG_FILE", "config", profile if profile == "default" else f"profile {profile}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", profile),
    ):
        parser = configparser.ConfigParser(interpolation=None, strict=False)
        with contextlib.suppress(OSError, configparser.Error, UnicodeDecodeError):
            parser.read(os.environ.get(variable, home / file), encoding="utf-8")
        if parser.has_section(section):
            found |= dict(parser.items(section))
    return found


def _bucket_region(bucket: str) -> str | None:
    from pyarrow.fs import resolve_s3_region

    try:
        return resolve_s3_region(bucket)
    except OSError:  # the first request tells why
        return None


def _is_bucket_missing(error: Exception) -> bool:
    return any(sign in str(error) for sign in _NO_BUCKET)


def _reason(error: Exception) -> str:
    """The first line of a message of obstore: the rest is its own source code."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
