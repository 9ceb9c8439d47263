"""Where else a sweep's trials are told of: TensorBoard, MLflow, Weights & Biases, by Ray Tune's own callbacks.

They are guests: one that fails is told of and left out (guard.py), and the sweep goes on.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from cluster.errors import Fault, in_short
from cluster.rules import SecretValueError, StrictModel
from cluster.schema import Reference

if TYPE_CHECKING:
    from ray.tune import Callback

WANDB_WITHOUT_KEY = ("offline", "disabled")
"""Values of WANDB_MODE with which Ray's callback asks for no key."""
WANDB_UPLOAD_S = 120
"""So long the end of a sweep waits for what W&B has not taken yet; Ray would wait for half an hour."""
MLFLOW_IMPATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
"""Tune waits for its callbacks. MLflow would try for four minutes and more whether a server is back; so it is some ten
seconds where nothing listens, and twenty where nothing answers."""
_ASKED_ONCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def _check_mlflow(uri: str) -> str:
    try:
        parts = urlsplit(uri)
        holds_secret = parts.password is not None or (_is_server(uri) and parts.username is not None)
    except ValueError:
        raise SecretValueError("must be a folder or a URI") from None
    if holds_secret:
        raise SecretValueError(
            "must hold no user and no password, for the sweep's folder keeps it: MLflow takes them from "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return uri


class TrackSpec(StrictModel):
    """Trackers that hear of every trial's configuration and of all its reports, by optimizer steps.

    One that fails while the sweep runs is told of once and hears no more; the sweep goes on. A sweep that is resumed
    tells them of trials that go on as of new runs.
    """

    tensorboard: bool = True
    """Write TensorBoard's event files into the trials' folders; it takes the sweep's folder as its log directory."""
    mlflow: Annotated[Reference, Field(min_length=1), AfterValidator(_check_mlflow)] | None = None
    """MLflow's tracking URI: a folder (`./mlruns`), or a server (`http://host:5000`), which must answer when the sweep
    starts. The sweep's name is the experiment, each trial a run. Wants the package mlflow or mlflow-skinny."""
    wandb: Annotated[str, Field(min_length=1)] | None = None
    """A project of Weights & Biases; the sweep is a group, each trial a run, and two more Ray processes while it runs.
    Wants the package wandb, and WANDB_API_KEY, `wandb login` or WANDB_MODE=offline."""


def tracking_faults(spec: TrackSpec) -> list[Fault]:
    """What this machine lacks for the trackers; an MLflow server is asked whether it is there."""
    faults: list[Fault] = []
    if spec.mlflow is not None and not _is_there("mlflow"):
        faults.append(Fault("track.mlflow", "wants the package mlflow: pip install mlflow-skinny", spec.mlflow))
    elif spec.mlflow is not None and _is_server(spec.mlflow) and (trouble := _mlflow_trouble(spec.mlflow)):
        faults.append(Fault("track.mlflow", f"must be an MLflow server that answers ({trouble})", spec.mlflow))
    if spec.wandb is None:
        return faults
    if not _is_there("wandb"):
        faults.append(Fault("track.wandb", "wants the package wandb: pip install wandb", spec.wandb))
    elif not _has_wandb_key():
        rule = "wants a key: set WANDB_API_KEY, run `wandb login`, or set WANDB_MODE=offline"
        faults.append(Fault("track.wandb", rule, spec.wandb))
    return faults


def tracking_variables(spec: TrackSpec) -> dict[str, str]:
    """What the driver's environment must hold while the trackers work; what the user has set stays as it is."""
    if spec.mlflow is None:
        return {}
    # MLflow 3 wants a word of consent for what it calls its file store, and asks for a database instead.
    wanted = {"MLFLOW_ALLOW_FILE_STORE": "true"} if _is_folder(spec.mlflow) else MLFLOW_IMPATIENCE
    return {name: value for name, value in wanted.items() if name not in os.environ}


def trackers(spec: TrackSpec, sweep: str, tell: Callable[[str], None]) -> list[Callback]:
    """Ray Tune's callbacks for a sweep of that name; ``tell`` hears which of them has failed, and why."""
    from tuning.guard import Guarded

    makers: dict[str, Callable[[], Callback]] = {}
    if spec.tensorboard:
        makers["track.tensorboard"] = _tensorboard
    if spec.mlflow is not None:
        uri = spec.mlflow
        makers["track.mlflow"] = lambda: _mlflow(uri, sweep)
    if spec.wandb is not None:
        project = spec.wandb
        makers["track.wandb"] = lambda: _wandb(project, sweep)
    return [Guarded(name, make, tell) for name, make in makers.items()]


def _tensorboard() -> Callback:
    from ray.tune.logger import TBXLoggerCallback

    return TBXLoggerCallback()


def _mlflow(uri: str, sweep: str) -> Callback:
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    return MLflowLoggerCallback(uri, experiment_name=sweep, tags={"sweep": sweep})


def _wandb(project: str, sweep: str) -> Callback:
    from tuning.wandb_steps import WandbBySteps

    return WandbBySteps(project=project, group=sweep, upload_timeout=WANDB_UPLOAD_S)


def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _is_folder(uri: str) -> bool:
    scheme = _SCHEME.match(uri)
    return scheme is None or scheme[1].lower() == "file"


def _is_server(uri: str) -> bool:
    return uri.lower().startswith(("http://", "https://"))


def _mlflow_trouble(uri: str) -> str | None:
    """Why the server cannot be told of trials; None where it answers. Asked as it will be asked later, with whatever
    MLflow takes from its variables (a token, a certificate), but once, and not for long.
    """
    from cluster.connect import environment

    with environment({name: value for name, value in _ASKED_ONCE.items() if name not in os.environ}):
        try:
            from mlflow.tracking import MlflowClient

            MlflowClient(uri, uri).search_experiments(max_results=1)
        except Exception as error:  # noqa: BLE001 - requests', urllib3's, MLflow's own, a broken package's
            return in_short(error)
    return None


def _has_wandb_key() -> bool:
    """As Ray's callback looks for one, but before anything is started."""
    if os.environ.get("WANDB_MODE") in WANDB_WITHOUT_KEY or os.environ.get("WANDB_API_KEY"):
        return True
    if "WANDB_SETUP_API_KEY_HOOK" in os.environ:
        return True
    try:
        import wandb  # pyright: ignore[reportMissingImports]

        wandb.ensure_configured()
        return bool(wandb.api.api_key)
    except Exception:  # noqa: BLE001 - versions differ in both, and a broken package raises anything
        return False
