"""Every configuration that is shipped loads, says how it is run, and fits its base where that is shipped too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster.schema import load_spec
from cluster.spec import ClusterSpec
from serving.spec import ServeSpec
from tuning.check import check_sweep
from tuning.spec import SweepSpec

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
MODELS = {"sweep": SweepSpec, "serve": ServeSpec, "cluster": ClusterSpec}
HARNESS = "evaluate"
"""Tasks of lm-evaluation-harness, which runs them in tests/serving/evaluate/test_live.py."""
LOCAL_SWEEPS = [path for path in CONFIGS if path.parent.name == "sweep" and "model: ../" in path.read_text()]


def test_configs_are_found() -> None:
    assert {path.parent.name for path in CONFIGS} == {*MODELS, HARNESS}
    assert len(LOCAL_SWEEPS) >= 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_it_loads_and_its_head_tells_how_to_run_it(path: Path) -> None:
    if path.parent.name != HARNESS:
        load_spec(path, MODELS[path.parent.name])
    head = re.match(r"(#.*\n)+", path.read_text())
    assert head is not None
    assert str(path.relative_to(ROOT)) in head[0]
    assert "loraloom " in head[0]
    assert "ardware" in head[0]
    assert "easured" in head[0]


@pytest.mark.parametrize("path", LOCAL_SWEEPS, ids=lambda path: path.name)
def test_a_sweep_on_the_shipped_base_fits_it(path: Path) -> None:
    data = check_sweep(load_spec(path, SweepSpec), path.name)
    assert data.report.cut_rows == 0
    assert data.report.eval_rows >= 50
