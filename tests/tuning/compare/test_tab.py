from __future__ import annotations

from pathlib import Path

from ray.dashboard.modules.metrics.metrics_head import GRAFANA_HOST_DISABLED_VALUE

from tuning.compare.tab import DISABLED, GRAFANA, metrics_tab


def test_a_grafana_that_is_there_stays_and_the_user_hears_why_nothing_is_compared(tmp_path: Path) -> None:
    with metrics_tab(tmp_path, variables={GRAFANA: "http://grafana:3000"}) as tab:
        assert (tab.variables, tab.port, tab.process) == ({}, None, None)
        assert "shows the Grafana of RAY_GRAFANA_HOST (loraloom dashboard DIR compares the trials)" in tab.told()


def test_a_tab_that_ray_hides_is_not_promised(tmp_path: Path) -> None:
    assert DISABLED == GRAFANA_HOST_DISABLED_VALUE
    with metrics_tab(tmp_path, variables={GRAFANA: DISABLED}) as tab:
        assert (tab.variables, tab.port, tab.process) == ({}, None, None)
        told = "; its tab Metrics is hidden by RAY_GRAFANA_HOST=DISABLED (loraloom dashboard DIR compares the trials)"
        assert tab.told() == told


def test_a_tab_that_lost_its_process_is_not_promised(tmp_path: Path) -> None:
    with metrics_tab(tmp_path, variables={}) as tab:
        assert f"tunnel port {tab.port} too" in tab.told()
        assert tab.process
        tab.process.kill()
        tab.process.wait(10)
        assert tab.told() == ""
