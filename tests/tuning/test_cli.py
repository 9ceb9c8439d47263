"""The commands `sweep --check`, `compare` and `publish`, as a user types them; whole sweeps are in test_sweep.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.schema import load_spec, to_yaml
from tests.tuning.make import sweep_document, write_checkpoint, write_rows, write_sweep, write_trial
from tests.tuning.watcher import Watcher
from tuning import keep
from tuning.lock import locked
from tuning.resume import resume_sweep
from tuning.spec import SweepSpec


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loraloom", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def config(tiny_base: Path, tmp_path: Path) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep_document(tiny_base, write_rows(tmp_path / "rows.jsonl"))))
    return path


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    path = write_sweep(tmp_path / "done", base=tiny_base)
    write_checkpoint(write_trial(path / "t000", [3.0, 2.0]), 0, 2.0)
    write_checkpoint(write_trial(path / "t001", [3.0, 1.0]), 0, 1.0)
    return path


def test_check_says_fine_and_starts_nothing(config: Path) -> None:
    done = run("sweep", config, "--check", "--set", "train.steps=50")
    # A machine that is slow at it is told how far the rows have come.
    assert (done.returncode, done.stderr.replace("48 rows checked and tokenised\n", "")) == (0, "")
    assert done.stdout.strip() == f"{config}: fine; 3 trials"


def test_all_faults_at_once_without_a_traceback(config: Path) -> None:
    done = run("sweep", config, "--set", "train.learning_rate=fast", "--set", "train.step=5", "--set", "nonsense")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"{config}: train.learning_rate: must be a valid number, got 'fast'" in done.stderr
    assert f"{config}: train.step: unknown key, got 5" in done.stderr
    assert "--set nonsense: must look like section.field=value" in done.stderr
    assert done.stdout == ""


def test_check_looks_into_the_rows(config: Path, tmp_path: Path) -> None:
    with (tmp_path / "rows.jsonl").open("a") as rows:
        rows.write('{"messages": [{"role": "user"}]}\n')
    done = run("sweep", config, "--check")
    assert done.returncode == 2
    assert "rows.jsonl: line 49: messages[0].content: must be a string" in done.stderr


def test_compare_as_table_json_and_name(folder: Path) -> None:
    table = run("compare", folder)
    assert table.returncode == 0, table.stderr
    lines = [line.split() for line in table.stdout.splitlines()]
    assert [line[1] for line in lines if len(line) > 1 and line[0].isdigit()] == ["t001", "t000"]
    assert f"winner t001: {folder}/t001/checkpoint_000000/adapter" in table.stdout

    document = json.loads(run("compare", folder, "--json").stdout.splitlines()[-1])
    assert document["winner"] == "t001"
    assert [row["eval_loss"] for row in document["leaderboard"]] == [1.0, 2.0]

    assert run("compare", folder, "--quiet").stdout.strip() == "t001"


def test_what_is_printed_is_no_markup(tiny_base: Path, tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "runs[bold]", base=tiny_base)
    write_checkpoint(write_trial(folder / "t000", [2.0, 1.0]), 0, 1.0)
    failed = write_trial(folder / "t001", [])
    (failed / "error.txt").write_text("Traceback\nRuntimeError: no kernel for [q_proj] [/root] on cuda:x:0\n")
    done = run("compare", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "t001 failed: RuntimeError: no kernel for [q_proj] [/root] on cuda:x:0" in done.stdout
    assert f"next: loraloom publish '{folder}' --name NAME" in done.stdout


def test_a_folder_that_cannot_be_written_is_told_before_the_rows_are_read(config: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("no row\n")
    for folder, check in (("/proc/x", ()), ("/sys/foo/bar", ("--check",)), (tmp_path / "sweep.yaml" / "sub", ())):
        done = run("sweep", config, "--dir", folder, *check)
        assert (done.returncode, done.stdout) == (5, "")
        assert done.stderr.startswith(f"error: the sweep's folder: cannot write {folder} (")
    assert "must be a folder of this machine" in run("sweep", config, "--dir", "s3://bucket/x", "--check").stderr
    assert "already holds something" in run("sweep", config, "--dir", tmp_path, "--check").stderr
    assert "rows.jsonl: line 1: must be JSON" in run("sweep", config, "--dir", tmp_path / "s", "--check").stderr
    assert not (tmp_path / "s").exists()


def test_missing_things_have_their_exit_code(folder: Path, tmp_path: Path) -> None:
    assert run("compare", tmp_path / "nothing").returncode == 3
    assert run("sweep", tmp_path / "nothing.yaml").returncode == 3
    done = run("publish", folder, "--name", "support", "--trial", "t9", "--registry", tmp_path / "r")
    assert done.returncode == 3
    assert "no trial 't9'; there are t000, t001" in done.stderr


def test_an_empty_adapter_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    done = run("publish", folder, "--name", "support", "--registry", tmp_path / "r")
    assert done.returncode == 2
    assert "adapter_config.json" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        (("--base", "org/base"), 2, "--base: has no effect on a sweep"),
        (("--trust-remote-code",), 2, "--trust-remote-code: has no effect on a sweep"),
        (("--max-rank", "0"), 2, "--max-rank"),
    ],
)
def test_options_that_say_nothing_of_a_sweep(folder: Path, options: tuple[str, ...], code: int, reason: str) -> None:
    done = run("publish", folder, "--name", "support", *options)
    assert (done.returncode, reason in done.stderr) == (code, True), done.stderr


def test_what_is_neither_a_sweep_nor_an_adapter(tmp_path: Path) -> None:
    done = run("publish", tmp_path, "--name", "support", "--registry", tmp_path / "r")
    assert done.returncode == 3
    assert "neither a sweep's folder (sweep.yaml) nor an adapter's (adapter_config.json)" in done.stderr
    done = run("adapters", "publish", tmp_path, "--name", "support", "--trial", "t000")
    assert done.returncode == 2
    assert "--trial: has no effect" in done.stderr
    assert not (tmp_path / "r").exists()


# --resume


def test_resume_takes_a_sweep_s_folder_and_the_same_sweep(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    assert run("sweep", "--resume", folder).returncode == 3
    nothing = run("sweep")
    assert (nothing.returncode, nothing.stderr) == (2, "error: CONFIG: is required, or --resume DIR\n")
    (folder / "sweep.yaml").write_text(to_yaml(load_spec(config, SweepSpec)))
    record = {
        "name": "tiny",
        "state": "running",
        "started_at": "2026-01-01T00:00:00+00:00",
        "trials": 3,
        "versions": {},
    }
    (folder / "sweep.json").write_text(json.dumps(record))

    both = run("sweep", "--resume", folder, "--dir", folder)
    assert both.returncode == 2
    assert "--dir: has no effect with --resume" in both.stderr
    changes = ("--set", "train.batch_size=3", "--set", "search.seed=1")
    for check in ((), ("--check",)):
        other = run("sweep", config, "--resume", folder, *changes, *check)
        assert (other.returncode, other.stdout) == (2, "")
        assert f"{config}: train.batch_size: must be 2, as in the sweep that is resumed, got 3" in other.stderr
        assert f"{config}: search.seed: must be 0, as in the sweep that is resumed, got 1" in other.stderr
    same = run("sweep", config, "--resume", folder, "--check", "--set", "search.time_budget_s=10")
    assert (same.returncode, same.stdout) == (0, f"{config}: fine; 3 trials\n")
    assert sorted(path.name for path in folder.iterdir()) == ["sweep.json", "sweep.yaml"]
    with locked(folder):
        running = run("sweep", "--resume", folder)
    assert running.returncode == 4
    assert "a sweep is running there (process " in running.stderr


def test_where_nothing_is_left_resume_shows_the_result(folder: Path) -> None:
    """As after a driver that was killed in its last moment, or whose time is used up."""
    record = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps({**record, "state": "running", "seconds": 12.0}))
    done = run("sweep", "--resume", folder, "--set", "search.time_budget_s=10", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert (document["state"], document["winner"], document["resumed_at"]) == ("finished", "t001", [])
    board = folder / "leaderboard.csv"
    whole = board.read_text()
    spec = load_spec(folder / "sweep.yaml", SweepSpec, ["search.time_budget_s=10"])
    assert len(whole.splitlines()) == 3
    for rest in ("", whole[:-1].rpartition("\n")[0] + "\n"):  # a full disk
        board.write_text(rest)
        resume_sweep(folder, spec)
        assert board.read_text() == whole


def test_what_a_killed_driver_left_in_a_trial_that_has_ended_goes(folder: Path) -> None:
    """It marks the end first, and then deletes."""
    keep.end(folder / "t001", "finished", "eval_loss")
    state = next((folder / "t001").glob("checkpoint_*")) / keep.STATE
    state.write_bytes(b"state")
    half_written = folder / "t001" / f"{keep.SCRATCH}checkpoint_000004"
    half_written.mkdir()
    record = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps({**record, "seconds": 12.0}))
    winner = resume_sweep(folder, load_spec(folder / "sweep.yaml", SweepSpec, ["search.time_budget_s=1"])).trials[0]
    assert (winner.name, winner.adapter is not None) == ("t001", True)
    assert not state.exists()
    assert not half_written.exists()


def test_a_finished_sweep_can_be_told_to_keep_fewer_adapters(folder: Path) -> None:
    for name in ("t000", "t001"):
        keep.end(folder / name, "finished", "eval_loss")
    spec = load_spec(folder / "sweep.yaml", SweepSpec, ["search.keep_adapters=1", "search.time_budget_s=1"])
    record = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps({**record, "seconds": 12.0}))
    notes = Watcher()
    done = resume_sweep(folder, spec, progress=notes)
    assert [(trial.name, trial.adapter is not None) for trial in done.trials] == [("t001", True), ("t000", False)]
    assert (done.spec.search.keep_adapters, done.spec.search.time_budget_s) == (1, None)
    assert notes.notes == []
    more = load_spec(folder / "sweep.yaml", SweepSpec, ["search.keep_adapters=null", "search.time_budget_s=1"])
    assert resume_sweep(folder, more, progress=notes).trials[1].adapter is None
    assert notes.notes == ["adapters that were not kept before do not come back"]
    assert (folder / "leaderboard.csv").read_text().splitlines()[2].endswith(",")
