"""Whole sweeps on real Ray Tune, real hosts, a tiny base."""

from __future__ import annotations

import csv
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
import yaml
from safetensors.torch import save_file
from transformers import BloomConfig, BloomForCausalLM

from cluster.errors import ConflictError, InputError, MachineError
from cluster.schema import load_spec
from cluster.spec import ClusterSpec
from tests.tuning.limits import file_limit
from tests.tuning.make import sweep_document, sweep_spec, write_rows
from tests.tuning.test_estimate import llama
from tests.tuning.watcher import Watcher, processes_named
from tests.waiting import wait_until
from tuning.check import check_sweep
from tuning.compare.reader import Comparer
from tuning.compare.source import LocalShelf
from tuning.compare.tab import Tab
from tuning.engine.base_cache import cache_folder
from tuning.results import Sweep, read_sweep
from tuning.spec import SweepSpec
from tuning.sweep import dashboard_line, run_sweep

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.mark.usefixtures("local_ray")
def test_random_sweep_explains_itself(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    spec = sweep_spec(tiny_base, data)
    watcher = Watcher()
    done = run_sweep(spec, tmp_path / "s", progress=watcher)
    seen = watcher.seen

    assert watcher.counts[-1] == 48
    assert done.record.state == "finished"
    assert {trial.name for trial in done.trials} == {"t000", "t001", "t002"}
    assert all(trial.state == "finished" and trial.best["steps"] in (2, 4) for trial in done.trials)
    scores = [trial.score("eval_loss") for trial in done.trials]
    assert scores == sorted(scores)
    assert scores[-1] < math.inf
    assert ("t000", "running") in seen
    assert ("t002", "finished") in seen
    # 4 + 8/64 + 32/(64*256) bits, and a little for blocks that are not full.
    assert 4.12 < done.record.base["bits_per_parameter"] < 4.14
    assert done.record.data["train_rows"] == 43
    assert load_spec(done.folder / "sweep.yaml", SweepSpec) == spec

    planned = spec.planned()
    assert planned is not None
    for trial in done.trials:
        config = planned[int(trial.name[1:])]
        assert trial.knobs == {
            "rank": config.rank,
            "alpha": config.alpha,
            "target_modules": config.target_modules,
            "learning_rate": config.learning_rate,
        }
    with (done.folder / "leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == [trial.name for trial in done.trials]
    assert (done.folder / rows[0]["adapter"]) == done.trials[0].adapter


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of many lengths, so that who shares a pass also changes the padding."""
    rows = [{"prompt": "ab" * (n % 7 + 1), "completion": "xyz"[: n % 3 + 1] * (n * 5 % 12 + 1)} for n in range(48)]
    path = tmp_path_factory.mktemp("rows") / "ragged.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def alone(tiny_base: Path, ragged: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: str) -> Sweep:
    """A sweep with one slot: each trial by itself."""
    return run_sweep(various(tiny_base, ragged, {"slots": 1}), tmp_path_factory.mktemp("alone") / "s")


def various(base: Path, data: Path, resources: dict[str, Any]) -> SweepSpec:
    """Four trials that differ in all that changes a pack's shape, long enough to overlap."""
    space = {
        "rank": {"choice": [2, 8, 32]},
        "target_modules": {"choice": [["q_proj"], "all-linear", "mlp"]},
        "batch_size": {"choice": [1, 2, 3]},
        "accumulation": {"choice": [1, 2]},
        "dropout": {"choice": [0.0, 0.3]},
        "learning_rate": {"loguniform": [1e-3, 1e-2]},
        "seed": {"choice": [0, 1]},
    }
    train = {"steps": 60, "eval_every": 20}
    sections = {"data": {"train": str(data), "format": "prompt_completion", "max_length": 64}, "space": space}
    return sweep_spec(base, data, train=train, search={"trials": 4, "seed": 5}, resources=resources, **sections)


@pytest.mark.usefixtures("local_ray")
def test_the_command_on_a_trial_s_page_trains_it_again(alone: Sweep, tmp_path: Path) -> None:
    (shown,) = Comparer([LocalShelf(alone.folder)]).document().sweeps
    trials = shown.trials or []
    again = trials[-1]
    assert again.reproduce
    words = shlex.split(again.reproduce)
    assert words[:2] == ["loraloom", "sweep"]
    done = run_sweep(load_spec(words[2], SweepSpec, words[6::2]), tmp_path / "again")
    (trial,) = done.trials
    assert [report["steps"] for report in trial.reports] == again.curve.steps
    for name in ("train_loss", "eval_loss"):
        assert [report[name] for report in trial.reports] == pytest.approx(getattr(again.curve, name), rel=1e-5)
    others = [other.curve.eval_loss for other in trials[:-1]]
    assert again.curve.eval_loss not in others, "it is this trial, and no other"


@pytest.mark.parametrize(
    "resources",
    [
        pytest.param({"slots": 2}, id="2 slots", marks=pytest.mark.full),
        pytest.param({"slots": 4}, id="4 slots", marks=pytest.mark.full),
        pytest.param({"slots": 8, "max_concurrent": 3}, id="3 of 8 slots"),
    ],
)
@pytest.mark.usefixtures("local_ray")
def test_the_leaderboard_depends_on_neither_slots_nor_concurrency(
    tiny_base: Path, ragged: Path, tmp_path: Path, alone: Sweep, resources: dict[str, Any]
) -> None:
    """To float rounding, which 60 steps of training let grow: the losses to 1e-4 of their size (2e-6 was measured), and
    so the ranking, which is no matter of rounding here.
    """
    scores = [trial.score("eval_loss") for trial in alone.trials]
    assert all(worse / better - 1 > 1e-3 for better, worse in pairwise(scores))
    packed = run_sweep(various(tiny_base, ragged, resources), tmp_path / "s")
    assert [trial.name for trial in packed.trials] == [trial.name for trial in alone.trials]
    for one, other in zip(packed.trials, alone.trials, strict=True):
        assert one.knobs == other.knobs
        for metric in ("eval_loss", "train_loss"):
            assert one.score(metric) == pytest.approx(other.score(metric), rel=1e-4), (one.name, metric)


@pytest.mark.usefixtures("local_ray")
def test_the_winner_loads_in_peft(tiny_base: Path, alone: Sweep) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert alone.winner is not None
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(alone.winner.adapter))
    changed = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    assert changed
    assert all(torch.any(weight != 0) for weight in changed)


@pytest.mark.usefixtures("local_ray")
def test_grid_tries_every_combination(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    space = {"rank": {"choice": [1, 2]}, "learning_rate": {"choice": [1e-3, 5e-3]}}
    done = run_sweep(sweep_spec(tiny_base, data, space=space, search={"algorithm": "grid"}), tmp_path / "s")
    tried = {(trial.knobs["rank"], trial.knobs["learning_rate"]) for trial in done.trials}
    assert tried == {(1, 1e-3), (1, 5e-3), (2, 1e-3), (2, 5e-3)}


@pytest.mark.usefixtures("local_ray")
def test_tpe_with_asha_stops_trials_and_keeps_their_adapters(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    search = {"algorithm": "tpe", "trials": 6, "seed": 3, "asha": {"grace_steps": 2, "reduction_factor": 2}}
    train = {"steps": 8, "eval_every": 2, "batch_size": 2}
    spec = sweep_spec(tiny_base, data, search=search, train=train, resources={"slots": 2})
    done = run_sweep(spec, tmp_path / "s")
    states = [trial.state for trial in done.trials]
    assert len(states) == 6
    assert "stopped" in states
    assert "finished" in states
    assert all(
        trial.adapter is not None and (trial.adapter / "adapter_model.safetensors").is_file() for trial in done.trials
    )
    assert {tuple(trial.knobs["target_modules"]) for trial in done.trials} <= {("q_proj",), tuple("all-linear")}


@pytest.mark.usefixtures("local_ray")
def test_a_diverging_trial_ends_alone(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    space = {"learning_rate": {"choice": [1e-3, 1e30]}}
    train = {"steps": 4, "eval_every": 2, "batch_size": 2, "max_grad_norm": None}
    done = run_sweep(
        sweep_spec(tiny_base, data, space=space, search={"algorithm": "grid"}, train=train), tmp_path / "s"
    )
    assert {trial.name: trial.state for trial in done.trials} == {"t000": "finished", "t001": "diverged"}
    assert done.winner is not None
    assert done.winner.name == "t000"


@pytest.mark.usefixtures("local_ray")
def test_what_is_wrong_with_the_cache_is_told_once_a_sweep(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    """Each of two hosts meets it, and four trials are on them."""
    killed: list[psutil.Process] = []

    def kill_a_host(rows: list[dict[str, Any]]) -> None:
        if not killed and any(row["steps"] for row in rows):
            killed.append(processes_named("ray::Host")[0])
            killed[0].kill()

    cache = cache_folder()
    cache.parent.mkdir(exist_ok=True)
    away = cache.rename(tmp_path / "bases") if cache.exists() else None
    cache.write_text("no folder")
    watcher = Watcher(kill_a_host)
    try:
        done = run_sweep(sweep_spec(tiny_base, data, search={"trials": 4}), tmp_path / "s", progress=watcher)
    finally:
        cache.unlink()
        if away is not None:
            away.rename(cache)
    assert killed
    assert {trial.state for trial in done.trials} == {"finished"}
    (note,) = watcher.notes
    assert note.startswith(f"{cache}: no cache of quantised bases here: ")


# Tune does not close its own loggers' files when everything is stopped at once.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("local_ray")
def test_time_budget_keeps_what_is_there(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    train = {"steps": 100_000, "eval_every": 5, "batch_size": 2}
    spec = sweep_spec(tiny_base, data, train=train, search={"trials": 2, "time_budget_s": 40})
    began = time.monotonic()
    done = run_sweep(spec, tmp_path / "s")
    assert time.monotonic() - began < 150
    assert {trial.state for trial in done.trials} == {"stopped"}
    assert done.winner is not None


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_keeps_what_is_there_and_leaves_no_process(
    end: signal.Signals, tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    """As a user's Ctrl-C and `timeout` do it: a signal to the whole process group."""
    train = {"steps": 100_000, "eval_every": 5, "batch_size": 2}
    config = tmp_path / "sweep.yaml"
    config.write_text(yaml.safe_dump(sweep_document(tiny_base, data, train=train)))
    folder = tmp_path / "s"
    command = [sys.executable, "-m", "loraloom", "sweep", str(config), "--dir", str(folder), "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            wait_until(lambda: len(list(folder.glob("t*/checkpoint_*/state.pt"))) >= 1, process)
            os.killpg(process.pid, end)
            if end == signal.SIGTERM:
                os.kill(process.pid, end)  # `timeout` sends it to its child, too
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130, err
    document = json.loads(out.splitlines()[-1])
    assert document["state"] == "interrupted"
    assert document["winner"] is not None
    assert read_sweep(folder).record.state == "interrupted"
    assert "Traceback" not in err
    assert not [pid for pid in psutil.pids() if _session_of(pid) == process.pid]


def test_refuses_a_folder_in_use(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ConflictError, match="already holds something"):
        run_sweep(sweep_spec(tiny_base, data), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_folder_of_a_sweep_that_never_started_is_used_again(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    """As after a Ray that did not start: the next try must not be refused."""
    for name in ("sweep.yaml", "sweep.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="no such file"):  # so it went past the folder
        run_sweep(sweep_spec(tiny_base, data, data={"train": "/no/such.jsonl", "max_length": 64}), tmp_path)


def test_a_disk_that_is_full_before_the_start_is_told(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    was_running = ray.is_initialized()
    with file_limit(100), pytest.raises(MachineError, match=r"cannot write .*File too large"):
        run_sweep(sweep_spec(tiny_base, data), tmp_path / "s")
    assert not (tmp_path / "s" / "sweep.json").exists()
    assert ray.is_initialized() == was_running


@pytest.mark.parametrize(
    ("sections", "rule"),
    [
        (
            {"space": {"rank": {"choice": [2, 64]}}},
            r"spec: space\.rank: must be at most 32, the smaller side of .*k_proj, got 64",
        ),
        (
            {"space": {"target_modules": {"choice": ["attention", ["nope"]]}}},
            r"spec: space\.target_modules: 'nope' matches no",
        ),
        ({"space": {}, "train": {"target_modules": ["x_proj"]}}, r"spec: train\.target_modules: 'x_proj' matches no"),
        ({"data": {"train": "/no/such.jsonl", "max_length": 64}}, r"spec: data\.train: no such file or folder"),
        ({"base": {"model": "/no/such/base"}}, r"spec: base\.model: must be a model's folder, with a config"),
    ],
)
def test_bad_input_starts_and_writes_nothing(
    tiny_base: Path, data: Path, tmp_path: Path, sections: dict[str, Any], rule: str
) -> None:
    import ray

    was_running = ray.is_initialized()
    with pytest.raises(InputError, match=rule):
        run_sweep(sweep_spec(tiny_base, data, **sections), tmp_path / "s")
    assert not (tmp_path / "s").exists()
    assert ray.is_initialized() == was_running


def test_what_an_architecture_cannot_do_is_told_before(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    config = BloomConfig(vocab_size=261, hidden_size=64, n_layer=1, n_head=4)
    BloomForCausalLM(config).save_pretrained(tmp_path)
    for file in (*tiny_base.glob("*token*"), *tiny_base.glob("*.jinja")):
        shutil.copy(file, tmp_path)
    rows = {"train": str(data), "max_length": 64, "packing": True}
    with pytest.raises(InputError, match=r"x\.yaml: data\.packing: must be false for this base: bloom computes"):
        check_sweep(sweep_spec(tmp_path, data, data=rows), "x.yaml")


def test_all_faults_of_a_base_at_once(tiny_base: Path, data: Path) -> None:
    space = {"rank": {"choice": [2, 64]}, "target_modules": {"choice": [["nope"], "all-linear"]}}
    spec = sweep_spec(
        tiny_base, data, space=space, search={"algorithm": "grid"}, data={"train": str(data), "max_length": 4096}
    )
    with pytest.raises(InputError) as caught:
        check_sweep(spec, "x.yaml")
    places = [fault.where for fault in caught.value.faults]
    assert places == ["x.yaml: space.target_modules", "x.yaml: space.rank", "x.yaml: data.max_length"]


def test_rows_are_checked_even_without_a_base(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(InputError) as caught:
        check_sweep(sweep_spec(tmp_path / "no-base", tmp_path / "rows.jsonl"), "x.yaml")
    places = [fault.where for fault in caught.value.faults]
    assert places[0] == "x.yaml: base.model"
    assert places[-1] == f"{tmp_path}/rows.jsonl: line 1: messages"


def test_a_token_is_told_of_where_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    line, open_to_all = "dashboard  http://127.0.0.1:8265", {"RAY_AUTH_MODE": "disabled"}
    asked = f"{line}; the token it asks for: ray get-auth-token"
    assert dashboard_line("127.0.0.1:8265", Tab(), ClusterSpec()) == asked
    assert dashboard_line("127.0.0.1:8265", Tab(), ClusterSpec(env=open_to_all)) == line
    joined = ClusterSpec(address="127.0.0.1:6379", env=open_to_all)
    assert dashboard_line("127.0.0.1:8265", Tab(), joined) == asked, "the variables are for its workers"


@pytest.mark.usefixtures("local_ray")
def test_a_sweep_takes_the_slots_that_fit_and_refuses_what_does_not(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    done = run_sweep(sweep_spec(tiny_base, data, resources={"slots": "auto"}), tmp_path / "auto")
    room = done.record.room
    assert room is not None
    assert room.slots == 3  # as many as there are trials
    assert room.needed_gib is not None
    assert room.usable_gib is not None
    assert 0 < room.needed_gib < room.usable_gib
    assert "slots: auto" in (done.folder / "sweep.yaml").read_text()

    huge = llama(tmp_path / "base", 65536, 262144, 8)
    for file in (*tiny_base.glob("*token*"), *tiny_base.glob("*.jinja")):
        shutil.copy(file, huge)
    save_file({"some": torch.zeros(1)}, huge / "model.safetensors")  # it comes to no reading of them
    with pytest.raises(InputError, match=r"x\.yaml: base\.model: must fit a (node|GPU) of ") as caught:
        run_sweep(sweep_spec(huge, data), tmp_path / "huge", where="x.yaml")
    assert len(caught.value.faults) == 1
    assert not list((tmp_path / "huge").glob("t0*"))


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
