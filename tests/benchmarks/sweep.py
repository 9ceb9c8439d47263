"""Makespan of a search: loraloom against Ray Tune with one process for each trial, as it is done today.

    python -m tests.benchmarks.sweep            # 24 random trials of 30 steps on the demo's base: some eight minutes
    python -m tests.benchmarks.sweep --asha     # also with early stopping

The other side is what Ray's and peft's documentation show: a Tune function that loads the base with transformers and
bitsandbytes, wraps it with peft, trains, evaluates and reports; one trial a CPU. Both sides get the same trials, rows
in the same order, first weights and evaluation rows; their final evaluation losses are compared. Both times are of the
whole search inside a Ray that is already running, from the call to the leaderboard, rows tokenised by either side.

The last line is one JSON object: {"speedup": x, "loraloom_s": t, "baseline_s": t, "median_loss_difference": d,
"largest_loss_difference": d}, with "asha": {...} beside it where that was asked for. In bfloat16 the losses differ by
what 8 bits leave open, in float32 by rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from rich.console import Console
from rich.table import Table

from cluster.connect import connect
from cluster.schema import load_spec
from cluster.spec import ClusterSpec
from tests.benchmarks.surroundings import ROOT, fresh_surroundings
from tuning.check import check_sweep
from tuning.spec import SweepSpec, TrialConfig
from tuning.sweep import run_sweep

CONFIG = ROOT / "configs" / "sweep" / "demo.yaml"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--slots", type=int, default=8, help="trials that share loraloom's base")
    parser.add_argument("--compute-dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--asha", action="store_true", help="also with early stopping")
    options = parser.parse_args(arguments)
    with fresh_surroundings():
        result = compare(make_spec(options, asha=False))
        if options.asha:
            result["asha"] = compare(make_spec(options, asha=True))
    show(result)
    print(json.dumps(result))


def make_spec(options: argparse.Namespace, *, asha: bool) -> SweepSpec:
    """The demo's sweep, with as many trials and steps as were asked for."""
    third = max(1, options.steps // 3)
    overrides = [
        f"train.steps={options.steps}",
        f"train.eval_every={third if asha else options.steps}",
        f"search.trials={options.trials}",
        f"resources.slots={options.slots}",
        "data.max_eval_rows=50",
        f"base.compute_dtype={options.compute_dtype}",
    ]
    if asha:
        overrides += [f"search.asha.grace_steps={third}", "search.asha.reduction_factor=3"]
    return load_spec(CONFIG, SweepSpec, overrides)


def compare(spec: SweepSpec) -> dict[str, Any]:
    """Both sides, each in a Ray of its own."""
    planned = spec.planned()
    assert planned is not None
    with tempfile.TemporaryDirectory() as folder, connect(ClusterSpec(dashboard=False), job_name="benchmark"):
        began = time.perf_counter()
        sweep = run_sweep(spec, Path(folder) / "ours", where=str(CONFIG))
        ours_s = time.perf_counter() - began
        ours = {trial.name: trial.reports[-1]["eval_loss"] for trial in sweep.trials if trial.reports}
    with tempfile.TemporaryDirectory() as folder, connect(ClusterSpec(dashboard=False), job_name="benchmark"):
        began = time.perf_counter()
        theirs = one_process_a_trial(spec, planned, Path(folder))
        theirs_s = time.perf_counter() - began
    result = {
        "speedup": round(theirs_s / ours_s, 3),
        "loraloom_s": round(ours_s, 1),
        "baseline_s": round(theirs_s, 1),
    }
    if spec.search.asha is None:  # else who is stopped depends on who arrives first
        assert ours.keys() == theirs.keys()
        apart = [abs(ours[name] - loss) / loss for name, loss in theirs.items()]
        result["median_loss_difference"] = round(statistics.median(apart), 6)
        result["largest_loss_difference"] = round(max(apart), 6)
    return result


def one_process_a_trial(spec: SweepSpec, planned: list[TrialConfig], folder: Path) -> dict[str, float]:
    """Ray Tune's way: every trial loads everything for itself. Returns the last evaluation loss of each."""
    data = check_sweep(spec, str(CONFIG))
    data.write(folder / "data")
    configs = [json.loads(trial.model_dump_json()) for trial in planned]

    def train(knobs: dict[str, Any]) -> None:
        from tests.benchmarks.alone import train_alone

        config = TrialConfig.model_validate(configs[knobs["index"]])
        train_alone(
            spec.base, config, folder / "data", lambda loss, steps: tune.report({"eval_loss": loss, "steps": steps})
        )

    results = tune.Tuner(
        tune.with_resources(train, {"cpu": 1}),
        param_space={"index": tune.grid_search(list(range(len(configs))))},
        tune_config=tune.TuneConfig(metric="eval_loss", mode="min", scheduler=plain_scheduler(spec)),
        run_config=tune.RunConfig(name="theirs", storage_path=str(folder), verbose=0),
    ).fit()
    assert not results.errors, results.errors
    return {
        f"t{result.config['index']:03d}": result.metrics["eval_loss"]
        for result in results
        if result.config and result.metrics
    }


def plain_scheduler(spec: SweepSpec) -> FIFOScheduler:
    """Ray Tune's own, with the sweep's settings."""
    asha = spec.search.asha
    if asha is None:
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="steps",
        max_t=spec.train.steps,
        grace_period=asha.grace_steps,
        reduction_factor=asha.reduction_factor,
    )


def show(result: dict[str, Any]) -> None:
    """Both runs as a table."""
    table = Table(title=f"a search, on {os.cpu_count()} CPU cores", title_justify="left")
    for heading in ("", "loraloom", "one process a trial", "speed-up"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in (("no early stopping", result), ("ASHA", result.get("asha"))):
        if row:
            table.add_row(name, f"{row['loraloom_s']:.0f} s", f"{row['baseline_s']:.0f} s", f"{row['speedup']:.2f}")
    Console(width=100, markup=False, highlight=False).print(table)


if __name__ == "__main__":
    main()
