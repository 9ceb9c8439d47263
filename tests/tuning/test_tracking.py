from __future__ import annotations

import importlib.util
import os
import struct
import sys
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.air.integrations.wandb import WandbLoggerCallback
from ray.tune.experiment import Trial
from tensorboardX.proto import event_pb2  # pyright: ignore[reportMissingTypeStubs]

from cluster.errors import InputError
from tests.ports import free_port
from tests.tuning.make import sweep_spec, write_rows
from tests.tuning.mlflow_server import MlflowServer
from tuning import tracking
from tuning.check import check_sweep
from tuning.results import Sweep
from tuning.sweep import run_sweep
from tuning.tracking import MLFLOW_IMPATIENCE, TrackSpec, trackers, tracking_faults, tracking_variables
from tuning.wandb_steps import WandbBySteps


def test_trackers_that_cannot_work_here_are_told_with_the_other_faults(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    spec = sweep_spec(
        tiny_base, write_rows(tmp_path / "rows.jsonl"), track={"mlflow": "./runs", "wandb": "p"}, train={"rank": 4},
        space={"target_modules": {"choice": [["nothing_proj"]]}},
    )  # fmt: skip
    with pytest.raises(InputError) as error:
        check_sweep(spec, "tiny.yaml")
    text = str(error.value)
    assert "tiny.yaml: track.mlflow: wants the package mlflow: pip install mlflow-skinny" in text
    assert "tiny.yaml: track.wandb: wants the package wandb: pip install wandb" in text
    assert "nothing_proj" in text


def test_weights_and_biases_wants_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text("class api:\n    api_key = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SETUP_API_KEY_HOOK"):
        monkeypatch.delenv(name, raising=False)
    spec = TrackSpec(wandb="project")
    (fault,) = tracking_faults(spec)
    assert fault.where == "track.wandb"
    assert "WANDB_API_KEY" in fault.rule
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracking_faults(spec) == []
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert tracking_faults(spec) == []
    del sys.modules["wandb"]


def test_weights_and_biases_is_asked_for_its_key_as_ray_asks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`wandb login` counts; a module without what is asked for, as versions of it are, has no key and is no error."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SETUP_API_KEY_HOOK"):
        monkeypatch.delenv(name, raising=False)
    module = SimpleNamespace(ensure_configured=lambda: None, api=SimpleNamespace(api_key="key"))
    monkeypatch.setattr(tracking, "_is_there", lambda package: True)
    monkeypatch.setitem(sys.modules, "wandb", module)
    spec = TrackSpec(wandb="project")
    assert tracking_faults(spec) == []
    del module.ensure_configured
    assert len(tracking_faults(spec)) == 1
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert len(tracking_faults(spec)) == 1, "Ray does not take it for offline"


def test_weights_and_biases_hears_of_optimizer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[dict[str, Any]] = []
    monkeypatch.setattr(
        WandbLoggerCallback, "log_trial_result", lambda self, number, trial, result: heard.append(result)
    )
    callback = WandbBySteps.__new__(WandbBySteps)  # its constructor wants the package
    monkeypatch.setattr(WandbLoggerCallback, "__del__", lambda self: None)
    report = {"training_iteration": 3, "timesteps_total": 120, "eval_loss": 0.5}
    callback.log_trial_result(3, Trial("t", stub=True), report)
    assert heard == [{"training_iteration": 120, "timesteps_total": 120, "eval_loss": 0.5}]
    assert report["training_iteration"] == 3, "other callbacks get it too"


def test_nothing_is_asked_of_those_that_are_not_named() -> None:
    assert tracking_faults(TrackSpec()) == []
    assert tracking_variables(TrackSpec()) == {}
    assert trackers(TrackSpec(tensorboard=False), "s", pytest.fail) == []


def test_a_server_that_does_not_answer_is_told_in_seconds() -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    began = time.monotonic()
    (fault,) = tracking_faults(TrackSpec(mlflow=uri))
    assert time.monotonic() - began < 30, "with MLflow's own patience it is four minutes"
    assert (fault.where, fault.value) == ("track.mlflow", uri)
    assert fault.rule.startswith("must be an MLflow server that answers (")
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_a_server_that_answers_is_asked_for_no_more() -> None:
    with MlflowServer() as server:
        assert tracking_faults(TrackSpec(mlflow=server.uri)) == []
        assert server.runs == {}


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def test_a_server_that_is_none_of_mlflow_is_told() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (fault,) = tracking_faults(TrackSpec(mlflow=f"http://127.0.0.1:{server.server_address[1]}"))
        server.shutdown()
    assert "must be an MLflow server that answers" in fault.rule


@pytest.mark.parametrize("uri", ["http://me:hunter2@host:5000", "https://hunter2@host", "postgresql://u:hunter2@h/db"])
def test_passwords_are_not_for_the_sweep_s_file(uri: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        sweep_spec(tmp_path, tmp_path / "rows.jsonl", track={"mlflow": uri})
    assert "tiny.yaml: track.mlflow: must hold no user and no password" in str(error.value)
    assert "hunter2" not in str(error.value)


def test_mlflow_must_be_somewhere(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"track\.mlflow"):
        sweep_spec(tmp_path, tmp_path / "rows.jsonl", track={"mlflow": ""})


def test_what_the_user_has_set_for_mlflow_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.delenv(name, raising=False)
    for folder in ("/runs", "file:///runs", "FILE:/runs"):
        assert tracking_variables(TrackSpec(mlflow=folder)) == {"MLFLOW_ALLOW_FILE_STORE": "true"}
    server = TrackSpec(mlflow="https://host/mlflow")
    assert tracking_variables(server) == MLFLOW_IMPATIENCE
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    assert set(tracking_variables(server)) == {"MLFLOW_HTTP_REQUEST_MAX_RETRIES"}


@pytest.fixture(scope="module")
def tracked(local_ray: str, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    folder = tmp_path_factory.mktemp("tracked")
    spec = sweep_spec(tiny_base, write_rows(folder / "rows.jsonl"), track={"mlflow": (folder / "mlruns").as_uri()})
    return run_sweep(spec, folder / "s")


class Notes:
    """What a sweep's user is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def tokenised(self, rows: int) -> None: ...

    def trials(self, record: Any, rows: list[dict[str, Any]]) -> None: ...

    def note(self, text: str) -> None:
        self.told.append(text)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_server_that_dies_in_the_middle_is_left_out_and_the_sweep_ends_well(tiny_base: Path, tmp_path: Path) -> None:
    notes = Notes()
    with MlflowServer(dies_after=5) as server:
        spec = sweep_spec(tiny_base, write_rows(tmp_path / "rows.jsonl"), track={"mlflow": server.uri})
        sweep = run_sweep(spec, tmp_path / "s", progress=notes)
        assert len(server.numbers) == 5
    assert sweep.record.state == "finished"
    assert {trial.state for trial in sweep.trials} == {"finished"}
    assert all(len(list(trial.folder.glob("events.out.tfevents.*"))) == 1 for trial in sweep.trials)
    (told,) = [text for text in notes.told if "track." in text]
    assert told.startswith("track.mlflow is left out from here on, and the sweep goes on: MlflowException: ")
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


@pytest.mark.ray
def test_mlflow_has_a_run_of_every_trial(tracked: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(str(tracked.folder.parent / "mlruns"))
    experiment = client.get_experiment_by_name("tiny")
    assert experiment
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {trial.name for trial in tracked.trials}
    for trial in tracked.trials:
        run = runs[trial.name]
        assert run.info.status == "FINISHED"
        assert run.data.params["rank"] == str(trial.knobs["rank"])
        assert run.data.tags["sweep"] == "tiny"
        history = client.get_metric_history(run.info.run_id, "eval_loss")
        reported = [(report["steps"], pytest.approx(report["eval_loss"])) for report in trial.reports]
        assert [(point.step, point.value) for point in history] == reported


@pytest.mark.ray
def test_tensorboard_has_every_report_by_optimizer_steps(tracked: Sweep) -> None:
    for trial in tracked.trials:
        (path,) = trial.folder.glob("events.out.tfevents.*")
        points = [
            (event.step, value.simple_value)
            for event in events(path)
            for value in event.summary.value
            if value.tag == "ray/tune/eval_loss"
        ]
        reported = [(report["steps"], pytest.approx(report["eval_loss"])) for report in trial.reports]
        assert points == reported


def events(path: Path) -> Iterator[Any]:
    """TensorBoard's records: a length in 8 bytes, its checksum in 4, as many bytes, their checksum in 4
    (https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details).
    """
    made: Any = event_pb2  # its classes are made as it is imported
    data = path.read_bytes()
    place = 0
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        yield made.Event.FromString(data[place + 12 : place + 12 + length])
        place += 16 + length
