"""Sweeps' folders as real ones are, of any size, without training: losses come from a formula."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.schema import parse_spec, to_yaml
from tuning.results import SweepRecord
from tuning.search import searched
from tuning.spec import SweepSpec, TrialConfig

STEPS, EVERY = 100, 20
SPACE: dict[str, Any] = {
    "rank": {"choice": [4, 8, 16, 32]},
    "alpha_over_rank": {"choice": [1, 2]},
    "target_modules": {"choice": [["q_proj", "v_proj"], "attention", "all-linear"]},
    "learning_rate": {"loguniform": [1e-5, 1e-2]},
    "dropout": {"uniform": [0.0, 0.1]},
}


def spec(trials: int, name: str = "made", **sections: Any) -> SweepSpec:
    """The spec of such a sweep."""
    document: dict[str, Any] = {
        "name": name,
        "base": {"model": "org/base"},
        "data": {"train": "org/rows", "eval_fraction": 0.1},
        "train": {"steps": STEPS, "eval_every": EVERY},
        "space": SPACE,
        "search": {"trials": trials, "asha": {"grace_steps": 40}},
        **sections,
    }
    return parse_spec(document, SweepSpec, "made.yaml")


def make_sweep(folder: Path, trials: int, *, seed: int = 0, state: str = "finished", **sections: Any) -> Path:
    """Write a sweep's folder. Every fifth trial was stopped at its second report, every eleventh diverged after it."""
    folder.mkdir(parents=True)
    made = spec(trials, **{"name": folder.name, **sections})
    (folder / "sweep.yaml").write_text(to_yaml(made))
    rng = random.Random(seed)
    states: dict[str, str] = {}
    for index, config in enumerate(made.planned() or []):
        name = f"t{index:03d}"
        states[name] = "diverged" if index % 11 == 10 else "stopped" if index % 5 == 4 else "finished"
        every = made.train.report_every
        steps = made.train.steps if states[name] == "finished" else 2 * every
        losses = [loss(config, step * STEPS // made.train.steps, rng) for step in range(every, steps + 1, every)]
        make_trial(folder / name, made, config, losses)
        if states[name] == "diverged":
            add_report(folder / name, steps + every, math.inf, diverged=True)
    write_record(folder, state, trials, states if state != "running" else {})
    return folder


def loss(config: TrialConfig, step: int, rng: random.Random) -> float:
    """Lowest for a learning rate of 3e-4 and all linear layers; the dropout does not matter."""
    rate = (math.log10(config.learning_rate) + 3.5) ** 2
    targets = 0.3 * (config.target_modules != "all-linear")
    return 0.5 + 0.4 * rate + targets - 0.02 * math.log2(config.rank) + math.exp(-step / 30) + 0.01 * rng.random()


def make_trial(folder: Path, made: SweepSpec, config: TrialConfig, losses: list[float]) -> None:
    """Write a trial's folder, as the driver does."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps({**searched(made, config), "trial": folder.name}))
    for index, value in enumerate(losses, 1):
        add_report(folder, index * made.train.report_every, value, parameters=1000 * config.rank)


def add_report(folder: Path, steps: int, value: float, *, diverged: bool = False, parameters: int = 1000) -> None:
    """One more report of a trial."""
    report = {
        "steps": steps, "train_loss": value - 0.1, "eval_loss": value, "diverged": diverged, "tokens_per_second": 900.0,
        "adapter_parameters": parameters, "time_total_s": steps / 10,
    }  # fmt: skip
    with (folder / "result.json").open("a") as file:
        file.write(json.dumps(report) + "\n")


def change_reports(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]], most: int | None = None) -> None:
    """Change each report of a trial, and leave out those after the first ``most``."""
    path = folder / "result.json"
    reports = [change(json.loads(line)) for line in path.read_text().splitlines()[:most]]
    path.write_text("".join(json.dumps(report) + "\n" for report in reports))


def write_record(folder: Path, state: str, trials: int, states: dict[str, str]) -> None:
    """Write sweep.json."""
    record = {"name": folder.name, "state": state, "started_at": "2026-01-01T00:00:00+00:00", "seconds": 12.0}
    rest = {"trials": trials, "versions": {"ray": "2.60.0"}, "states": states}
    (folder / "sweep.json").write_text(SweepRecord.model_validate({**record, **rest}).model_dump_json())
