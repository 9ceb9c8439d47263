"""Object stores by their URIs: as pyarrow takes them, with pyarrow's credentials."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import pytest
from moto.core.authorization import enable_iam_authentication
from pyarrow.fs import FileSelector, FileSystem

from cluster.errors import InputError, MachineError
from serving.registry.errors import RegistryUnreachableError
from serving.registry.object_store import ObjectStore
from serving.registry.store import LocalStore, open_store
from tests.serving.s3 import S3Server


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the environment's nor the user's; and no machine's, which would be asked for over the network."""
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


@pytest.mark.parametrize(
    ("uri", "rule"),
    [
        ("ftp://host/x", "must be a folder, or a URI that starts with one of s3://, gs://, abfs://"),
        ("hdfs://host/x", "must be a folder, or a URI that starts with"),
        ("s3:///prefix", "must look like s3://bucket/prefix"),
        ("s3://bucket/x#y", "must look like s3://bucket/prefix"),
        ("s3://bucket/x?colour=red&region=us-east-1", "option that is not known here (known: region, scheme,"),
        ("s3://bucket/x?scheme=gopher", "the option scheme must be http or https"),
        ("s3://bucket/x?region", "must have options of the form name=value"),
        ("gs://bucket/x?region=here", "option that is not known here (known: none)"),
        ("s3://[bucket/x", "must be a valid URI"),
    ],
)
def test_uris_that_are_none(uri: str, rule: str) -> None:
    with pytest.raises(InputError) as caught:
        open_store(uri)
    assert rule in str(caught.value)
    assert all(fault.where == "registry" for fault in caught.value.faults)


def test_secrets_are_not_shown() -> None:
    for uri in (
        "s3://key:hush@bucket/x?scheme=gopher",
        "s3://key:hush@/x",
        "s3://key:hush@[b/x",
        "s3://key:hush@b/x?y",
        "s3://key:hush/hush@b/x",
        "s3://key:hush?hush@b/x",
        "s3://key:hush#hush@b/x",
        "s3://key:hush",
        "s3a://key:hush@bucket/x",
        "s3a://key:hush/hush@bucket/x",
        "abfs://:hush@account.dfs.core.windows.net/y",
    ):
        with pytest.raises(InputError) as caught:
            open_store(uri)
        assert "hush" not in str(caught.value)
    assert open_store("s3://key:hu%2Fsh@bucket/x@y?region=eu-west-1").where == "s3://bucket/x@y"


def test_folders_and_their_uris(tmp_path: Path) -> None:
    for reference in (str(tmp_path / "a b"), f"file://{tmp_path}/a%20b", tmp_path / "a b"):
        store = open_store(reference)
        assert isinstance(store, LocalStore)
        assert store.folder == tmp_path / "a b"
    with pytest.raises(InputError, match="must be a folder of this machine"):
        open_store("s3:/bucket/x")  # what a Path makes of a URI


def test_other_clouds_are_opened() -> None:
    assert open_store("gs://bucket/prefix").where == "gs://bucket/prefix"
    place = "abfss://container@account.dfs.core.windows.net/prefix"
    assert open_store(place).where == place


def test_pyarrow_reads_what_was_written(s3: S3Server) -> None:
    uri = s3.uri("bucket/parity%20x")
    assert open_store(uri).create("_log/1.json", b"{}")
    system, prefix = FileSystem.from_uri(uri)
    found = system.get_file_info(FileSelector(prefix, recursive=True))
    assert [(info.path, info.size) for info in found if info.is_file] == [("bucket/parity x/_log/1.json", 2)]
    with system.open_output_stream(f"{prefix}/_log/2.json") as stream:
        stream.write(b"theirs")
    assert open_store(uri).read("_log/2.json") == b"theirs"


def test_only_the_first_creates(s3: S3Server) -> None:
    store = open_store(s3.uri("bucket/create"))
    assert [store.create("x", content) for content in (b"1", b"2", b"1")] == [True, False, False]
    assert store.read("x") == b"1"
    assert store.read("y") is None
    with pytest.raises(FileNotFoundError):
        list(store.chunks("y"))


def test_many_keys_are_listed_and_deleted(s3: S3Server) -> None:
    store = open_store(s3.uri("bucket/many"))
    for number in range(30):
        store.create(f"a/{number:02}", str(number).encode())
    store.create("ab", b"")
    keys = [stored.key for stored in store.keys("a")]
    assert keys == [f"a/{number:02}" for number in range(30)]
    assert store.read_many([*keys[:2], "none"]) == [b"0", b"1", None]
    store.delete([*keys, "none"])
    assert [stored.key for stored in store.keys("")] == ["ab"]


def make_user(server: S3Server) -> tuple[str, str]:
    """A user who may do everything with S3: access key and secret."""
    options = {"aws_access_key_id": "root", "aws_secret_access_key": "root", "region_name": "us-east-1"}
    iam: Any = boto3.client("iam", endpoint_url=server.endpoint, **options)
    iam.create_user(UserName="loom")
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
    iam.put_user_policy(UserName="loom", PolicyName="all", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName="loom")["AccessKey"]
    iam.close()
    return key["AccessKeyId"], key["SecretAccessKey"]


def test_credentials(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They come from the URI, else the environment, else the profile; wrong ones are told at once."""
    keys = make_user(s3)
    right, wrong, plain = (
        s3.uri("bucket/x", f"{keys[0]}:{quote(keys[1], safe='')}@"),
        s3.uri("bucket/x", "no:no@"),
        s3.uri("bucket/x", ""),
    )
    refused = r"s3://bucket/x refuses these credentials \("
    with enable_iam_authentication():
        began = time.monotonic()
        with pytest.raises(MachineError, match=refused):
            open_store(wrong).read("_log/1.json")
        assert time.monotonic() - began < 20
        assert open_store(right).create("_log/1.json", b"1")
        (tmp_path / "credentials").write_text(
            "[default]\naws_access_key_id = no\naws_secret_access_key = no\n"
            f"[team]\naws_access_key_id = {keys[0]}\naws_secret_access_key = {keys[1]}\n"
        )
        with pytest.raises(MachineError, match=refused):
            open_store(plain).read("_log/1.json")
        monkeypatch.setenv("AWS_PROFILE", "team")
        assert open_store(plain).read("_log/1.json") == b"1"
        monkeypatch.setenv("AWS_PROFILE", "default")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys[0])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys[1])
        assert open_store(plain).read("_log/1.json") == b"1"


def test_no_credentials_at_all_are_told_in_time(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises((RegistryUnreachableError, MachineError), match="s3://bucket/x"):
        open_store(s3.uri("bucket/x", "")).read("_log/1.json")
    assert time.monotonic() - began < 30


def test_a_client_is_made_anew_where_it_is_sent(s3: S3Server) -> None:
    import pickle

    store = open_store(s3.uri("bucket/pickled"))
    assert isinstance(store, ObjectStore)
    store.create("x", b"1")
    assert pickle.loads(pickle.dumps(store)).read("x") == b"1"
