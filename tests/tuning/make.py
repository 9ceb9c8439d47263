"""Small sweeps for tests: a random base, rows that can be learnt, a spec over them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from cluster.schema import parse_spec, to_yaml
from tuning.results import SweepRecord
from tuning.spec import SweepSpec

TRIALS = 3
"""Of a sweep that does not say, where its space holds as many."""


def write_rows(path: Path, count: int = 48) -> Path:
    """Write ``count`` conversations as JSONL."""
    rows = [
        {"messages": [{"role": "user", "content": f"what is {n}?"}, {"role": "assistant", "content": f"it is {n * 7}"}]}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sweep_document(base: Path, data: Path, /, **sections: Any) -> dict[str, Any]:
    """A sweep that takes seconds, as parsed YAML, with ``sections`` laid over it.

    Its hosts are on the CPU wherever the tests run: there the same steps give the same bits.
    """
    document: dict[str, Any] = {
        "name": "tiny",
        "base": {"model": str(base), "compute_dtype": "float32"},
        "data": {"train": str(data), "max_length": 64},
        "train": {"steps": 4, "eval_every": 2, "batch_size": 2},
        "space": {
            "rank": {"choice": [2, 8]},
            "target_modules": {"choice": [["q_proj"], "all-linear"]},
            "learning_rate": {"loguniform": [1e-3, 1e-2]},
        },
        "resources": {"slots": 4},
        "cluster": {"dashboard": False, "num_cpus": 2, "num_gpus": 0},
        **sections,
    }
    choices = [domain.get("choice") for domain in document["space"].values()]
    many = math.prod(TRIALS if choice is None else len(choice) for choice in choices)
    return {"search": {"trials": min(TRIALS, many)}, **document}


def sweep_spec(base: Path, data: Path, /, **sections: Any) -> SweepSpec:
    """``sweep_document`` as a spec."""
    return parse_spec(sweep_document(base, data, **sections), SweepSpec, "tiny.yaml")


def write_sweep(
    folder: Path,
    state: str = "finished",
    steps: int = 4,
    base: Path = Path("/base"),
    states: dict[str, Any] | None = None,
) -> Path:
    """A sweep's folder without trials."""
    folder.mkdir()
    spec = sweep_spec(base, Path("/rows.jsonl"), train={"steps": steps, "eval_every": 2, "batch_size": 2})
    (folder / "sweep.yaml").write_text(to_yaml(spec))
    record = {"name": "tiny", "state": state, "started_at": "2026-01-01T00:00:00+00:00", "trials": 3, "versions": {}}
    record = SweepRecord.model_validate({**record, "states": states or {}})
    (folder / "sweep.json").write_text(record.model_dump_json())
    return folder


def write_trial(folder: Path, losses: list[float], *, step: int = 2, **last: Any) -> Path:
    """A trial that reported these evaluation losses, every ``step`` steps; ``last`` is laid over the last report."""
    folder.mkdir()
    knobs = {"learning_rate": 0.1, "alpha": 4.0, "rank": 2, "target_modules": ["q_proj"], "trial": folder.name}
    (folder / "params.json").write_text(json.dumps(knobs))
    reports = [report(loss, step * (index + 1)) for index, loss in enumerate(losses)]
    if reports:
        reports[-1].update(last)
    (folder / "result.json").write_text("".join(json.dumps(one) + "\n" for one in reports))
    return folder


def report(loss: float, steps: int) -> dict[str, Any]:
    """What a trial reports."""
    numbers = {"train_loss": loss + 1, "tokens_per_second": 10.0, "adapter_parameters": 8}
    return {"steps": steps, "eval_loss": loss, "diverged": False, **numbers}


def write_checkpoint(trial: Path, index: int, loss: float, *, complete: bool = True) -> Path:
    """A checkpoint's folder, after ``index`` steps, with an adapter of two words; returns the adapter's folder."""
    folder = trial / f"checkpoint_{index:06d}"
    (folder / "adapter").mkdir(parents=True)
    (folder / "state.pt").write_text("state")
    (folder / "adapter" / "adapter_model.safetensors").write_text("weights")
    finish_checkpoint(folder, report(loss, index))
    if not complete:
        (folder / "adapter" / "adapter_model.safetensors").write_text("weig")
    return folder / "adapter"


def make_best_and_stuck(checkpoint: Path, **metrics: Any) -> Path:
    """Make a checkpoint the best of its trial, and its state something that cannot be deleted as a file; returns it."""
    state = checkpoint / "state.pt"
    state.unlink()
    state.mkdir()
    document = json.loads((checkpoint / "metrics.json").read_text())
    (checkpoint / "metrics.json").write_text(json.dumps({**document, "eval_loss": 0.0, **metrics}))
    return state


def finish_checkpoint(folder: Path, metrics: dict[str, Any]) -> None:
    """Write metrics.json, with the sizes of all files, as a trial does after its host wrote the rest."""
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    (folder / "metrics.json").write_text(json.dumps({**metrics, "files": sizes}))
