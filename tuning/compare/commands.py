"""Commands that a person copies from the comparison: to go on with a sweep, to train a trial again, to publish it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from tuning.results import SPEC_FILE
from tuning.spec import SweepSpec, TrainSpec

_FOLDER_OF_COPIES = "runs/reproduced"


def reproduce_command(folder: str, spec: SweepSpec, trial: str, config: Mapping[str, Any]) -> str:
    """A command that trains ``trial`` of the sweep in ``folder`` alone, as a sweep of one trial.

    A trial's result does not depend on who shares its pack, so that its numbers come out again (on the same kind of
    hardware, to the rounding of floating point).
    """
    defaults = TrainSpec().model_dump(mode="json")
    in_file = spec.train.model_dump(mode="json")
    settings = ["space={}", "search.algorithm=grid", "search.trials=null"]
    settings += [f"search.{name}=null" for name in ("asha", "time_budget_s") if getattr(spec.search, name) is not None]
    # They would get it as one more run of the sweep's own trial.
    settings += [f"track.{name}=null" for name in ("mlflow", "wandb") if getattr(spec.track, name) is not None]
    if spec.train.alpha_over_rank is not None:
        settings.append("train.alpha_over_rank=null")
    for name, value in config.items():
        stands_there = defaults if name in spec.space else in_file
        if name in TrainSpec.model_fields and value != stands_there[name]:
            settings.append(f"train.{name}={json.dumps(value)}")
    words = ["loraloom", "sweep", f"{folder}/{SPEC_FILE}", "--dir", f"{_FOLDER_OF_COPIES}/{spec.name}-{trial}"]
    return shlex.join([*words, *(word for setting in settings for word in ("--set", setting))])


def resume_command(folder: str) -> str:
    """A command that goes on with the sweep in ``folder``."""
    return shlex.join(["loraloom", "sweep", "--resume", folder])


def publish_command(folder: str, spec: SweepSpec, trial: str) -> str:
    """A command that publishes ``trial`` of the sweep in ``folder`` under the sweep's name."""
    return shlex.join(["loraloom", "publish", folder, "--trial", trial, "--name", spec.name])
