"""Ray's callback for Weights & Biases, by optimizer steps."""

from __future__ import annotations

from typing import Any

from ray.air.constants import TRAINING_ITERATION
from ray.air.integrations.wandb import WandbLoggerCallback
from ray.tune.experiment import Trial
from ray.tune.result import TIMESTEPS_TOTAL


class WandbBySteps(WandbLoggerCallback):
    """Numbers of a report lie at its optimizer step: Ray's own would lay them at the report's number."""

    def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None:
        """Ray's process for the trial takes W&B's step from ``training_iteration``."""
        steps = result.get(TIMESTEPS_TOTAL, result[TRAINING_ITERATION])
        super().log_trial_result(iteration, trial, {**result, TRAINING_ITERATION: steps})
