"""A whole sweep on a GPU, placed there by Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tuning.make import sweep_document, write_rows
from tuning.results import read_sweep

pytestmark = [pytest.mark.ray, pytest.mark.gpu, pytest.mark.slow]


def test_a_sweep_on_a_gpu_comes_to_the_losses_of_one_on_a_cpu(tiny_base: Path, tmp_path: Path) -> None:
    """In float32, whose products the two round differently: to 1e-3 after four steps."""
    data = write_rows(tmp_path / "rows.jsonl")
    boards: list[dict[str, float]] = []
    for gpus, place in ((0, "node"), (1, "GPU")):
        cluster: dict[str, Any] = {"dashboard": False, "num_cpus": 2, "num_gpus": gpus}
        config, folder = tmp_path / f"{place}.yaml", tmp_path / place
        config.write_text(yaml.safe_dump(sweep_document(tiny_base, data, cluster=cluster)))
        command = [sys.executable, "-m", "loraloom", "sweep", str(config), "--dir", str(folder), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["room"]["place"] == place
        boards.append({trial.name: trial.score("eval_loss") for trial in read_sweep(folder).trials})
    assert boards[1] == pytest.approx(boards[0], rel=1e-3)
