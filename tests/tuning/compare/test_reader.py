from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tuning.compare.reader as module
from tests.tuning.compare.make import add_report, make_sweep, write_record
from tests.tuning.make import write_checkpoint
from tests.tuning.test_lock import lock_holder
from tests.waiting import wait_until
from tuning.compare.document import Comparison, TrialView
from tuning.compare.reader import Comparer, sweep_names
from tuning.compare.source import LocalShelf, LocalSource, Source
from tuning.results import read_trial


def told(document: Comparison, sweep: int = 0) -> dict[str, TrialView] | None:
    trials = document.sweeps[sweep].trials
    return None if trials is None else {trial.name: trial for trial in trials}


def test_only_what_has_changed_is_told(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "made", 6, state="running")
    comparer = Comparer([LocalShelf(folder)])
    first = comparer.document()
    assert first.whole
    assert len(told(first) or {}) == 6
    same = comparer.document(first.revision)
    assert not same.whole
    assert told(same) is None
    add_report(folder / "t003", 120, 0.25)
    second = comparer.document(same.revision)
    assert list(told(second) or {}) == ["t003"]
    assert (told(second) or {})["t003"].eval_loss == 0.25
    assert told(comparer.document(second.revision)) is None
    assert list(told(comparer.document(first.revision)) or {}) == ["t003"]
    assert len(told(comparer.document()) or {}) == 6


def test_files_that_did_not_change_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_sweep(tmp_path / "made", 6, state="running")
    read: list[str] = []

    def counted(folder: Path, *arguments: object, **options: object) -> object:
        read.append(folder.name)
        return read_trial(folder, *arguments, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(module, "read_trial", counted)
    comparer = Comparer([LocalShelf(folder)])
    comparer.document()
    assert len(read) == 6
    add_report(folder / "t002", 120, 0.25)
    comparer.document()
    comparer.document()
    assert read[6:] == ["t002"]


def test_the_end_of_a_sweep_changes_the_states_of_its_trials(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "made", 6, state="running")
    comparer = Comparer([LocalShelf(folder)])
    first = comparer.document()
    write_record(folder, "interrupted", 6, {"t000": "stopped"})
    second = comparer.document(first.revision)
    assert second.sweeps[0].state == "interrupted"
    assert (told(second) or {})["t000"].state == "stopped"


def test_a_sweep_whose_driver_was_killed_is_interrupted(tmp_path: Path) -> None:
    """Which changes no file: the kernel has let go of its lock."""
    folder = make_sweep(tmp_path / "made one", 6, state="running", name="made")
    add_report(folder / "t004", 60, 0.25)
    comparer = Comparer([LocalShelf(folder)])
    with lock_holder(folder) as driver:
        first = comparer.document()
        shown = first.sweeps[0]
        assert (shown.state, shown.last_news_at, shown.resume) == ("running", None, None)
        assert (told(first) or {})["t004"].state == "running"
        assert told(comparer.document(first.revision)) is None
        driver.kill()
        driver.wait()
    second = comparer.document(first.revision)
    shown = second.sweeps[0]
    assert (shown.state, shown.last_news_at) == ("interrupted", None)
    assert shown.resume == f"loraloom sweep --resume '{folder}'"
    assert (told(second) or {})["t004"].state == "stopped"
    assert (told(second) or {})["t005"].state == "finished"
    third = comparer.document(second.revision)
    assert told(third) is None
    with lock_holder(folder):  # it is gone on with
        again = comparer.document(third.revision)
        assert (again.sweeps[0].state, again.sweeps[0].resume) == ("running", None)
        assert (told(again) or {})["t004"].state == "running"


def test_a_sweep_that_nobody_can_see_tells_its_last_news(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "made", 2, state="running")
    for path in folder.rglob("*"):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    os.utime(folder / "t001" / "result.json", (1_750_000_000, 1_750_000_000))
    comparer = Comparer([LocalShelf(folder)])
    shown = comparer.document().sweeps[0]
    assert (shown.state, shown.last_news_at) == ("running", "2025-06-15T15:06:40+00:00")
    os.utime(folder / "t000" / "result.json", (1_750_000_060, 1_750_000_060))
    assert comparer.document().sweeps[0].last_news_at == "2025-06-15T15:07:40+00:00"
    write_record(folder, "finished", 2, {})
    assert comparer.document().sweeps[0].last_news_at is None


def test_a_sweep_that_begins_later_and_one_that_goes(tmp_path: Path) -> None:
    make_sweep(tmp_path / "one", 2)
    comparer = Comparer([LocalShelf(tmp_path)])
    first = comparer.document()
    make_sweep(tmp_path / "two", 3)
    second = comparer.document(first.revision)
    assert [sweep.id for sweep in second.sweeps] == ["one", "two"]
    assert told(second, 0) is None
    assert len(told(second, 1) or {}) == 3
    shutil.rmtree(tmp_path / "one")
    third = comparer.document(second.revision)
    assert third.whole, "the page must forget what is gone"
    assert [sweep.id for sweep in third.sweeps] == ["two"]


def test_what_cannot_be_read_is_told_and_the_others_are_shown(tmp_path: Path) -> None:
    make_sweep(tmp_path / "good", 2)
    bad = make_sweep(tmp_path / "bad", 2)
    (bad / "sweep.json").write_text("{")
    comparer = Comparer([LocalShelf(tmp_path), LocalShelf(tmp_path / "nothing")])
    document = comparer.document()
    assert [sweep.id for sweep in document.sweeps] == ["good"]
    assert len(document.troubles) == 2
    assert "sweep.json" in document.troubles[1]
    write_record(bad, "finished", 2, {})
    assert [sweep.id for sweep in comparer.document(document.revision).sweeps] == ["bad", "good"]


@pytest.mark.parametrize(
    "revision", ["", "x", "-1", "1-2-3", "abc-0", "deadbeef-999999999999999999", "a" * 10_000, "٣-٣"]
)
def test_a_revision_that_is_none_gets_everything(tmp_path: Path, revision: str) -> None:
    document = Comparer([LocalShelf(make_sweep(tmp_path / "made", 2))]).document(revision)
    assert document.whole
    assert len(told(document) or {}) == 2


def test_importances_are_there_when_they_are_waited_for(tmp_path: Path) -> None:
    comparer = Comparer([LocalShelf(make_sweep(tmp_path / "made", 20))])
    weighed = comparer.document(wait=True).sweeps[0].importance
    assert weighed
    assert weighed.trials == 20
    assert comparer.document().sweeps[0].importance == weighed


def test_importances_follow_the_trials(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "made", 12, state="running")
    comparer = Comparer([LocalShelf(folder)])
    before = comparer.document(wait=True).sweeps[0].importance
    write_record(folder, "finished", 12, json.loads((folder / "sweep.json").read_text())["states"])
    after = comparer.document(wait=True).sweeps[0].importance
    assert after
    assert before is None or after.trials > before.trials


def test_importances_of_a_sweep_that_runs_are_not_computed_at_every_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_sweep(tmp_path / "made", 30, state="running")
    later = [path.rename(tmp_path / path.name) for path in sorted(folder.glob("t*"))[20:]]
    times: list[int] = []

    def counted(space: Any, found: list[Any], **options: Any) -> None:
        times.append(len(found))

    def end(trials: int) -> None:
        for path in [later.pop(0) for _ in range(trials)]:
            path.rename(folder / path.name)

    monkeypatch.setattr(module, "importance", counted)
    comparer = Comparer([LocalShelf(folder)])
    comparer.document(wait=True)
    end(1)
    comparer.document()
    time.sleep(0.1)
    assert len(times) == 1
    end(3)
    comparer.document()
    wait_until(lambda: len(times) == 2)
    assert times[1] >= 1.1 * times[0]
    end(2)
    monkeypatch.setattr(module, "WEIGH_EVERY_S", 0.0)
    wait_until(lambda: [comparer.document(), len(times) == 3][1])
    monkeypatch.setattr(module, "WEIGH_EVERY_S", 60.0)
    end(1)
    write_record(folder, "finished", 30, {})
    wait_until(lambda: [comparer.document(), len(times) == 4][1])


def test_a_comparer_that_is_closed_waits_for_no_importance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two", "three"):
        make_sweep(tmp_path / name, 20)
    begun: list[int] = []
    broken_off = threading.Event()

    def endless(space: Any, found: Any, *, is_wanted: Callable[[], bool]) -> None:
        begun.append(1)
        while is_wanted():
            time.sleep(0.01)
        broken_off.set()

    monkeypatch.setattr(module, "importance", endless)
    comparer = Comparer([LocalShelf(tmp_path)])
    comparer.document()
    wait_until(lambda: bool(begun))
    comparer.close()
    assert broken_off.wait(10)
    assert len(begun) == 1, "those that waited for their turn never begin"
    comparer.close()
    make_sweep(tmp_path / "four", 20)
    assert [sweep.importance for sweep in comparer.document(wait=True).sweeps] == [None] * 4


def test_sweeps_that_have_gone_are_forgotten(tmp_path: Path) -> None:
    make_sweep(tmp_path / "one", 9)
    make_sweep(tmp_path / "two", 9)
    comparer = Comparer([LocalShelf(tmp_path)])
    comparer.document(wait=True)
    shutil.rmtree(tmp_path / "one")
    comparer.document(wait=True)
    assert list(comparer._weigher._weighed) == [str(tmp_path / "two")]  # pyright: ignore[reportPrivateUsage]


def test_a_sweep_that_could_not_be_read_once_is_told_as_a_whole(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "made", 4, state="running")
    comparer = Comparer([LocalShelf(folder)])
    first = comparer.document()
    whole = (folder / "sweep.json").read_text()
    (folder / "sweep.json").write_text("{")
    second = comparer.document(first.revision)
    assert (second.sweeps, len(second.troubles)) == ([], 1)
    (folder / "sweep.json").write_text(whole)
    for known in (first.revision, second.revision):
        assert len(told(comparer.document(known)) or {}) == 4


def test_trials_that_vanish_and_another_sweep_in_the_same_folder(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "made", 4, state="running")
    comparer = Comparer([LocalShelf(folder)])
    first = comparer.document()
    shutil.rmtree(folder / "t002")
    second = comparer.document(first.revision)
    assert second.whole
    assert sorted(told(second) or {}) == ["t000", "t001", "t003"]
    shutil.rmtree(folder)
    make_sweep(folder, 2, seed=9)
    third = comparer.document(second.revision)
    assert third.whole
    assert sorted(told(third) or {}) == ["t000", "t001"]


def test_what_changes_deep_in_a_checkpoint_is_seen(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "made", 2)
    adapter = write_checkpoint(folder / "t000", 40, 0.001)
    comparer = Comparer([LocalShelf(folder)])
    first = comparer.document()
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(b"cut")
    cut = comparer.document(first.revision)
    assert (told(cut) or {})["t000"].adapter is None
    weights.write_bytes(whole)
    assert (told(comparer.document(cut.revision)) or {})["t000"].adapter == str(adapter)


def test_what_nobody_foresaw_costs_its_sweep_alone(tmp_path: Path) -> None:
    make_sweep(tmp_path / "good", 2)
    odd = make_sweep(tmp_path / "odd", 12)
    params = json.loads((odd / "t000" / "params.json").read_text())
    (odd / "t000" / "params.json").write_text(json.dumps({**params, "learning_rate": 0}))
    (odd / "t001" / "params.json").write_text(json.dumps({**params, "target_modules": ["\ud800"]}))
    document = Comparer([LocalShelf(tmp_path)]).document(wait=True)
    assert [sweep.id for sweep in document.sweeps] == ["good", "odd"]
    assert "importances cannot be computed" in document.troubles[0]
    assert "?" in document.model_dump_json()


def test_a_folder_whose_name_is_no_unicode(tmp_path: Path) -> None:
    make_sweep(tmp_path / "made", 2).rename(tmp_path / os.fsdecode(b"caf\xe9"))
    document = Comparer([LocalShelf(tmp_path)]).document()
    assert [sweep.id for sweep in document.sweeps] == ["caf?"]
    document.model_dump_json()


def test_what_was_read_lately_is_not_looked_at_again(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "made", 2, state="running")
    comparer = Comparer([LocalShelf(folder)], fresh_s=1000)
    first = comparer.document()
    add_report(folder / "t000", 120, 0.25)
    assert told(comparer.document(first.revision)) is None
    assert len(told(comparer.document()) or {}) == 2


def test_a_sweep_of_the_same_name_that_joins_takes_no_trials_away(tmp_path: Path) -> None:
    """A page keeps trials by their sweep's id, and forgets those whose sweep is not there."""
    shelf = Shelves([make_sweep(tmp_path / "b" / "demo", 3)])
    comparer = Comparer([shelf])
    first = comparer.document()
    shelf.folders.insert(0, make_sweep(tmp_path / "a" / "demo", 2))
    second = comparer.document(first.revision)
    assert {sweep.id: sweep.trials and len(sweep.trials) for sweep in second.sweeps} == {"demo": None, "a/demo": 2}
    assert [sweep.id for sweep in second.sweeps] == ["demo", "a/demo"]
    assert not second.whole
    del shelf.folders[0]
    third = comparer.document(second.revision)
    assert ([sweep.id for sweep in third.sweeps], third.whole) == (["demo"], True)


class Shelves:
    """A shelf of folders that come and go."""

    def __init__(self, folders: list[Path]) -> None:
        self.folders = folders

    def left_out(self) -> list[str]:
        return []

    def sources(self) -> list[Source]:
        return [LocalSource(folder) for folder in self.folders]

    def close(self) -> None: ...


def test_names_are_different_and_do_not_depend_on_order() -> None:
    assert sweep_names(["/x/a", "/y/b"]) == {"/x/a": "a", "/y/b": "b"}
    assert [*sweep_names(["/x/out", "/y/out", "/z"]).values()] == ["x/out", "y/out", "z"]
    assert [*sweep_names(["/y/out", "/x/out"]).values()] == ["y/out", "x/out"]
    assert [*sweep_names(["/1/x/out", "/2/x/out"]).values()] == ["x/out", "x/out-2"]


def test_names_that_were_given_stay() -> None:
    known = sweep_names(["/x/out"])
    assert sweep_names(["/y/out", "/x/out"], known) == {"/y/out": "y/out", "/x/out": "out"}
    assert sweep_names(["/y/out"], known) == {"/y/out": "out"}
    assert sweep_names(["/x/out", "/z/x/out"], {"/z/x/out": "x/out"}) == {"/x/out": "x/out-2", "/z/x/out": "x/out"}
