"""A host without Ray: what its trials may rely on when something around them fails."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tuning.limits import file_limit
from tests.tuning.make import make_best_and_stuck, sweep_spec, write_rows
from tuning import keep
from tuning.engine.data import prepare
from tuning.host import Broker, Host, HostPlan, Place
from tuning.inspect import load_tokenizer
from tuning.spec import TrialConfig

CONFIG = TrialConfig(rank=4, alpha=8.0, learning_rate=1e-2, batch_size=2, steps=8, dropout=0.1)


@pytest.fixture(scope="module")
def host(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("host")
    spec = sweep_spec(tiny_base, write_rows(folder / "rows.jsonl"))
    prepare(spec.data, load_tokenizer(spec.base), folder / "data", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        host = Host(HostPlan("tests", spec.base, folder / "data", 1, "eval_loss", 60.0), Place("here", None))
        yield host
        host._loop.stop()


def report(host: Host, slot: int, folder: Path) -> dict[str, Any]:
    """Train for two steps and save."""
    told = host.advance(slot, 2)
    assert host.save(slot, str(folder), told) == {}
    return told


def numbers(told: dict[str, Any]) -> list[Any]:
    return [told[key] for key in ("steps", "train_loss", "eval_loss")]


def test_a_host_is_called_after_its_gpu(monkeypatch: pytest.MonkeyPatch, tiny_base: Path) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    base = sweep_spec(tiny_base, tiny_base).base
    for gpu, name in ((None, "cpu"), ("0", "gpu=0 (NVIDIA H100 80GB HBM3)"), ("3", "gpu=3 (NVIDIA H100 80GB HBM3)")):
        host = object.__new__(Host)  # what it does first is to load the base
        host._plan = HostPlan("demo", base, tiny_base, 1, "eval_loss", 60.0, slots=8)
        host._place = Place("here", gpu)
        assert repr(host) == f"host {name} slots=8 sweep=demo"


def test_a_trial_goes_on_from_its_folder(host: Host, tmp_path: Path) -> None:
    slot, found, passed_over = host.attach("a", CONFIG, str(tmp_path))
    assert (found, passed_over) == (None, [])
    told = [report(host, slot, tmp_path) for _ in range(3)]
    assert host.detach(slot) == 0
    assert [one.steps for one in keep.saved(tmp_path) if one.has_state] == [4, 6]

    again, found, passed_over = host.attach("a", CONFIG, str(tmp_path))
    assert found is not None
    assert (numbers(found), passed_over) == (numbers(told[2]), [])
    last = host.advance(again, 2)

    (tmp_path / "checkpoint_000006" / "state.pt").write_bytes(b"")
    older, found, passed_over = host.attach("a", CONFIG, str(tmp_path))
    assert found is not None
    assert numbers(found) == numbers(told[1])
    assert passed_over == [f"{tmp_path}/checkpoint_000006/state.pt is damaged: cut short"]
    assert numbers(report(host, older, tmp_path)) == numbers(told[2])
    assert numbers(report(host, older, tmp_path)) == numbers(last)
    host.detach(older)


def test_a_trial_that_comes_again_gives_up_its_old_slot(host: Host, tmp_path: Path) -> None:
    """Its process was killed, and could not free it."""
    stale, _, _ = host.attach("b", CONFIG, str(tmp_path))
    slot, _, _ = host.attach("b", CONFIG, str(tmp_path))
    with pytest.raises(KeyError):
        host.advance(stale, 1)
    assert host.advance(slot, 1)["steps"] == 1
    assert host.detach(slot) == 0


def test_the_slot_of_a_trial_that_was_given_up_is_freed_by_name(host: Host, tmp_path: Path) -> None:
    slot, _, _ = host.attach("d", CONFIG, str(tmp_path))
    other, _, _ = host.attach("e", CONFIG, str(tmp_path / "e"))
    host.detach_trial("unknown")
    host.detach_trial("d")
    host.detach_trial("d")
    with pytest.raises(KeyError):
        host.advance(slot, 1)
    assert host.detach(other) == 0


def test_a_full_disk_is_told_and_training_goes_on(host: Host, tmp_path: Path) -> None:
    slot, _, _ = host.attach("c", CONFIG, str(tmp_path))
    first = report(host, slot, tmp_path)
    told = host.advance(slot, 2)
    with file_limit(20_000):
        trouble = host.save(slot, str(tmp_path), told)
    assert trouble == {"unsaved": f"cannot write {tmp_path}/checkpoint_000004: File too large"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_000002"]
    assert report(host, slot, tmp_path)["steps"] == 6
    assert [one.steps for one in keep.saved(tmp_path)] == [2, 6]
    assert numbers(keep.saved(tmp_path)[0].report) == numbers(first)
    host.detach(slot)


def test_what_cannot_be_deleted_is_told_as_that(host: Host, tmp_path: Path) -> None:
    slot, _, _ = host.attach("f", CONFIG, str(tmp_path))
    for _ in range(2):
        report(host, slot, tmp_path)
    stuck = make_best_and_stuck(tmp_path / "checkpoint_000002", files={})
    trouble = host.save(slot, str(tmp_path), host.advance(slot, 2))
    assert trouble == {"undeleted": f"cannot delete {stuck}, which is not needed any more: Is a directory"}
    assert [one.steps for one in keep.saved(tmp_path) if one.has_state] == [4, 6]
    host.detach(slot)


def test_turns_go_round_and_a_dead_trial_does_not_keep_its(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    broker, here, there = Broker(host._plan), Place("here", None), Place("there", "0")
    assert broker.take_turn(here, "a")
    assert broker.take_turn(here, "a")
    assert not broker.take_turn(here, "b")
    assert broker.take_turn(there, "b")
    broker.end_turn(here, "b")  # not its own
    assert not broker.take_turn(here, "b")
    broker.end_turn(here, "a")
    assert broker.take_turn(here, "b")
    monkeypatch.setattr("tuning.host.TURN_S", 0.01)
    assert broker.take_turn(here, "b")
    time.sleep(0.02)
    assert broker.take_turn(here, "a")


def test_a_host_is_idle_between_calls_only(host: Host, tmp_path: Path) -> None:
    with host._at_work():
        assert host.idle_for() == 0.0
    time.sleep(0.01)
    assert host.idle_for() >= 0.01


def test_a_host_whose_gpu_is_lost_ends_at_once() -> None:
    """Without what runs at the end of a process, which would want the GPU."""
    program = (
        "import atexit\n"
        "from tuning.host import end_process\n"
        "atexit.register(print, 'cleaned up')\n"
        "end_process(None, RuntimeError('CUDA error: an illegal memory access was encountered\\nCompile with'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("its GPU is lost to it: CUDA error: an illegal memory access was encountered\n")
