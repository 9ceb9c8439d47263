"""Sweeps on this machine's disk and on a real S3 server on loopback."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from cluster.errors import InputError, LoraloomError, NotFoundError
from tests.ports import free_port
from tests.serving.s3 import S3Server
from tests.tuning.compare.bucket import Bucket
from tests.tuning.compare.make import add_report, make_sweep
from tests.tuning.make import write_checkpoint
from tuning.compare import source
from tuning.compare.reader import Comparer
from tuning.compare.source import LocalShelf, RemoteShelf, open_shelf


@pytest.fixture
def bucket(s3: S3Server, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.setattr(source, "LIST_EVERY_S", 0.0)
    return Bucket(s3, request.node.name)


@pytest.fixture
def shelf(bucket: Bucket) -> Iterator[RemoteShelf]:
    opened = RemoteShelf(bucket.uri)
    yield opened
    opened.close()


def test_a_bucket_shows_what_a_folder_shows(tmp_path: Path, bucket: Bucket, shelf: RemoteShelf) -> None:
    folder = make_sweep(tmp_path / "made", 6)
    write_checkpoint(folder / "t001", 40, 0.001)
    bucket.copy(folder)
    here, there = Comparer([LocalShelf(folder)]).document().sweeps[0], Comparer([shelf]).document().sweeps[0]
    place = bucket.uri.partition("?")[0].replace("key:secret@", "")
    assert there.folder == place
    assert here.trials
    assert there.trials
    for one, other in zip(here.trials, there.trials, strict=True):
        apart = {"adapter", "reproduce", "publish"}
        assert one.model_dump(exclude=apart) == other.model_dump(exclude=apart)
    best = there.trials[0]
    assert best.adapter == f"{place}/t001/checkpoint_000040/adapter"
    assert (best.publish, best.reproduce) == (None, None), "those commands want a folder of this machine"


def test_a_bucket_is_followed(tmp_path: Path, bucket: Bucket, shelf: RemoteShelf) -> None:
    folder = make_sweep(tmp_path / "made", 3, state="running")
    bucket.copy(folder)
    comparer = Comparer([shelf])
    first = comparer.document()
    add_report(folder / "t001", 120, 0.125)
    bucket.put("t001/result.json", (folder / "t001" / "result.json").read_bytes())
    second = comparer.document(first.revision)
    shown, trials = second.sweeps[0], second.sweeps[0].trials
    assert trials
    assert [(trial.name, trial.eval_loss) for trial in trials] == [("t001", 0.125)]
    assert (shown.state, shown.resume) == ("running", None), "nobody can tell whether its driver lives"
    assert shown.last_news_at
    assert abs(time.time() - datetime.fromisoformat(shown.last_news_at).timestamp()) < 60
    bucket.delete("t002/params.json")
    third = comparer.document(second.revision)
    assert third.whole
    assert len(third.sweeps[0].trials or ()) == 2


def test_a_bucket_of_sweeps(tmp_path: Path, bucket: Bucket, shelf: RemoteShelf) -> None:
    for name in ("one", "two"):
        bucket.copy(make_sweep(tmp_path / name, 2), f"{name}/")
    assert [sweep.id for sweep in Comparer([shelf]).document().sweeps] == ["one", "two"]


def test_large_files_are_not_fetched_and_their_sizes_count(tmp_path: Path, bucket: Bucket, shelf: RemoteShelf) -> None:
    folder = make_sweep(tmp_path / "made", 1)
    adapter = write_checkpoint(folder / "t000", 40, 0.001)
    weights = adapter / "adapter_model.safetensors"
    bucket.copy(folder)
    (copied,) = shelf.sources()
    copy = copied.folder / weights.relative_to(folder)
    assert copy.read_bytes() == b"\0" * weights.stat().st_size
    bucket.put(weights.relative_to(folder).as_posix(), b"cut")
    trials = Comparer([shelf]).document().sweeps[0].trials
    assert trials
    assert trials[0].adapter is None, "one that is damaged counts for nothing"


def test_an_adapter_that_was_dropped_leaves_the_numbers(tmp_path: Path, bucket: Bucket, shelf: RemoteShelf) -> None:
    """As `search.keep_adapters` drops it: its numbers stay, and no empty folder may say that it is damaged."""
    folder = make_sweep(tmp_path / "made", 1)
    adapter = write_checkpoint(folder / "t000", 40, 0.001)
    bucket.copy(folder)
    comparer = Comparer([shelf])
    first = comparer.document()
    bucket.delete((adapter / "adapter_model.safetensors").relative_to(folder).as_posix())
    second = comparer.document(first.revision)
    trials = second.sweeps[0].trials
    assert trials
    assert (trials[0].adapter, trials[0].eval_loss) == (None, 0.001)


def test_keys_that_no_folder_can_hold(tmp_path: Path, bucket: Bucket, shelf: RemoteShelf) -> None:
    bucket.copy(make_sweep(tmp_path / "made", 1))
    for key in ("t000/checkpoint_000001/x", "t000/checkpoint_000001/x/y", f"t000/checkpoint_000001/{'n' * 300}"):
        bucket.put(key, b"x")
    with pytest.raises(LoraloomError, match="the copy of the sweep's small files"):
        shelf.sources()


def test_names_that_lead_elsewhere_are_left_alone(tmp_path: Path, bucket: Bucket, shelf: RemoteShelf) -> None:
    bucket.copy(make_sweep(tmp_path / "made", 1))
    for key in ("data/rows.arrow", "t000/other.bin", "t1/checkpoint_1/..x", "t000/checkpoint_000001/a/b/c"):
        bucket.put(key, b"x")
    (copied,) = shelf.sources()
    names = {path.relative_to(copied.folder).as_posix() for path in copied.folder.rglob("*") if path.is_file()}
    assert "t000/checkpoint_000001/a/b/c" in names
    assert not names & {"data/rows.arrow", "t000/other.bin"}
    for key in ("../sweep.json", "t000/checkpoint_000001/../../../x", "x/../sweep.yaml", "t000/checkpoint_000001/\0"):
        assert not source._part_of_sweep(key)


def test_copies_go_when_the_shelf_is_closed(tmp_path: Path, bucket: Bucket) -> None:
    bucket.copy(make_sweep(tmp_path / "made", 1))
    shelf = RemoteShelf(bucket.uri)
    (copied,) = shelf.sources()
    shelf.close()
    assert not copied.folder.exists()


def test_a_store_that_is_gone_is_told_of(bucket: Bucket, shelf: RemoteShelf) -> None:
    with pytest.raises(NotFoundError, match="no sweep's folder"):
        shelf.sources()
    missing = RemoteShelf(bucket.uri.replace("//key:secret@bucket", "//key:secret@nobody"))
    try:
        with pytest.raises(InputError, match="bucket must exist") as error:
            missing.sources()
        assert "secret" not in str(error.value)
    finally:
        missing.close()
    with pytest.raises(LoraloomError, match="must be a folder, or a URI"):
        open_shelf("ftp://nowhere/x")


def test_a_store_that_does_not_answer_is_no_registry(bucket: Bucket) -> None:
    before, _, _ = bucket.uri.partition("endpoint_override=")
    silent = RemoteShelf(f"{before}endpoint_override=127.0.0.1:{free_port()}&region=us-east-1")
    try:
        with pytest.raises(LoraloomError, match=r"the sweep's folder s3://.* does not answer"):
            silent.sources()
    finally:
        silent.close()


def test_what_is_named_here(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "a" / "made", 1)
    assert [found.place for found in open_shelf(str(folder)).sources()] == [str(folder)]
    assert [found.place for found in open_shelf(str(tmp_path / "a")).sources()] == [str(folder)]
    with pytest.raises(NotFoundError, match="no such folder"):
        open_shelf(str(tmp_path / "b"))
    with pytest.raises(NotFoundError, match="none in it"):
        open_shelf(str(tmp_path)).sources()
