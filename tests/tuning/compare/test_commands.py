from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from cluster.schema import load_spec, to_yaml
from tests.tuning.compare.make import spec
from tuning.compare.commands import reproduce_command
from tuning.spec import SweepSpec


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"search": {"trials": 6}},
        {"search": {"trials": 2}, "track": {"mlflow": "http://host:5000", "wandb": "project"}},
        {"search": {"algorithm": "tpe", "trials": 6, "time_budget_s": 60.0}},
        {"space": {"rank": {"choice": [2, 4]}}, "search": {"algorithm": "grid"}},
        {
            "space": {"alpha": {"uniform": [1.0, 64.0]}},
            "train": {"steps": 80, "eval_every": 20, "optimizer": "paged_adamw_8bit"},
        },
        {"space": {"rank": {"choice": [2, 4]}}, "train": {"alpha_over_rank": 4}, "search": {"trials": 2}},
        {
            "space": {"max_grad_norm": {"choice": [None, 0.3]}, "target_modules": {"choice": [["a'b", "<i>"]]}},
            "search": {"trials": 2},
        },
        {"space": {"learning_rate": {"loguniform": [1e-9, 1e-7]}, "rslora": {"choice": [True]}}},
    ],
)  # fmt: skip
def test_the_command_is_a_sweep_of_that_one_trial(tmp_path: Path, sections: dict[str, Any]) -> None:
    made = spec(6, **sections)
    (tmp_path / "sweep.yaml").write_text(to_yaml(made))
    drawn = made.planned() or [made.trial({"rank": 8, "learning_rate": 1.25e-5})]
    for index, trial in enumerate(drawn):
        config = trial.model_dump(mode="json", exclude={"alpha_over_rank"})
        words = shlex.split(reproduce_command(str(tmp_path), made, f"t{index:03d}", config))
        assert words[:5] == [
            "loraloom",
            "sweep",
            f"{tmp_path}/sweep.yaml",
            "--dir",
            f"runs/reproduced/made-t{index:03d}",
        ]
        assert words[5::2] == ["--set"] * len(words[6::2])
        alone = load_spec(words[2], SweepSpec, words[6::2])
        assert alone.planned() == [trial]
        assert (alone.track.mlflow, alone.track.wandb) == (None, None), "it is none of the sweep's own"
