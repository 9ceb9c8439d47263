from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto import event_pb2  # pyright: ignore[reportMissingTypeStubs]

from cluster.connect import connect
from cluster.errors import InputError
from cluster.spec import ClusterSpec
from tests.tuning.make import sweep_spec, write_rows
from tuning.check import check_sweep
from tuning.results import Sweep
from tuning.sweep import run_sweep
from tuning.tracking import TrackSpec, trackers, tracking_faults


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


def test_nothing_is_asked_of_those_that_are_not_named() -> None:
    assert tracking_faults(TrackSpec()) == []
    assert trackers(TrackSpec(tensorboard=False), "s") == []


@pytest.fixture(scope="module")
def tracked(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    folder = tmp_path_factory.mktemp("tracked")
    spec = sweep_spec(tiny_base, write_rows(folder / "rows.jsonl"), track={"mlflow": str(folder / "mlruns")})
    with connect(ClusterSpec(dashboard=False, num_cpus=2, num_gpus=0), job_name="tests"):
        yield run_sweep(spec, folder / "s")


@pytest.mark.ray
def test_mlflow_has_a_run_of_every_trial(tracked: Sweep) -> None:
    from mlflow.tracking import MlflowClient

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
