"""Where else a sweep's trials are told of: TensorBoard, MLflow, Weights & Biases, by Ray Tune's own callbacks."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from cluster.errors import Fault
from cluster.rules import StrictModel
from cluster.schema import Reference

if TYPE_CHECKING:
    from ray.tune import Callback

WANDB_WITHOUT_KEY = ("offline", "disabled", "dryrun")


class TrackSpec(StrictModel):
    """Trackers that hear of every trial's configuration and of all its reports, by optimizer steps."""

    tensorboard: bool = True
    """Write TensorBoard's event files into the trials' folders; it takes the sweep's folder as its log directory."""
    mlflow: Reference | None = None
    """MLflow's tracking URI: a folder (`./mlruns`), or a server (`http://host:5000`). The sweep's name is the
    experiment, each trial a run. Wants the package mlflow or mlflow-skinny."""
    wandb: Annotated[str, Field(min_length=1)] | None = None
    """A project of Weights & Biases; the sweep is a group, each trial a run. Wants the package wandb, and
    WANDB_API_KEY, `wandb login` or WANDB_MODE=offline."""


def tracking_faults(spec: TrackSpec) -> list[Fault]:
    """What this machine lacks for the trackers."""
    faults: list[Fault] = []
    if spec.mlflow is not None and not _is_there("mlflow"):
        faults.append(Fault("track.mlflow", "wants the package mlflow: pip install mlflow-skinny", spec.mlflow))
    if spec.wandb is None:
        return faults
    if not _is_there("wandb"):
        faults.append(Fault("track.wandb", "wants the package wandb: pip install wandb", spec.wandb))
    elif not _has_wandb_key():
        rule = "wants a key: set WANDB_API_KEY, run `wandb login`, or set WANDB_MODE=offline"
        faults.append(Fault("track.wandb", rule, spec.wandb))
    return faults


def trackers(spec: TrackSpec, sweep: str) -> list[Callback]:
    """Ray Tune's callbacks for a sweep of that name."""
    from ray.tune.logger import TBXLoggerCallback

    found: list[Callback] = []
    if spec.tensorboard:
        found.append(TBXLoggerCallback())
    if spec.mlflow is not None:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        if "://" not in spec.mlflow:
            # MLflow 3 wants a word of consent for what it calls its file store, and asks for a database instead.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        found.append(MLflowLoggerCallback(spec.mlflow, experiment_name=sweep, tags={"sweep": sweep}))
    if spec.wandb is not None:
        from ray.air.integrations.wandb import WandbLoggerCallback

        found.append(WandbLoggerCallback(project=spec.wandb, group=sweep))
    return found


def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _has_wandb_key() -> bool:
    """As Ray's callback looks for one, but before anything is started."""
    if os.environ.get("WANDB_MODE") in WANDB_WITHOUT_KEY or os.environ.get("WANDB_API_KEY"):
        return True
    if "WANDB_SETUP_API_KEY_HOOK" in os.environ:
        return True
    import wandb  # pyright: ignore[reportMissingImports]

    return bool(wandb.api.api_key)
