"""Show an evaluation: a table for people, a document for programs."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from serving.evaluate.intervals import Estimate
from serving.evaluate.metrics import SHARES, Metric
from serving.evaluate.run import Measured, Report


def report_table(report: Report) -> Table:
    """A line for each model and metric: rows, value with its interval, and the paired difference with its own."""
    several = len(report.models) > 1
    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    headings = ["n", "value", "95 % interval"]
    if several:
        headings += [f"less {report.against}", "95 % interval"]
    for heading in headings:
        table.add_column(escape(heading), justify="right", no_wrap=True)
    for measured in report.models:
        for metric, estimate in measured.estimates.items():
            cells = [escape(measured.model.id), metric, str(estimate.count), *_cells(metric, estimate, signed=False)]
            if several:
                difference = measured.differences.get(metric)
                cells += _cells(metric, difference, signed=True) if difference else ["", ""]
            table.add_row(*cells)
    return table


def report_document(report: Report) -> dict[str, Any]:
    """The report as JSON values; infinity, which JSON lacks, is null."""
    return {
        "data": str(report.data.path),
        "data_sha256": report.data.sha256,
        "rows": len(report.data.rows),
        "against": report.against,
        "models": [_model(measured) for measured in report.models],
        "requests": {"asked": report.asked, "kept": report.kept, "retried": report.retries},
        "seconds": round(report.seconds, 2),
    }


def _model(measured: Measured) -> dict[str, Any]:
    return {
        "model": measured.model.reference,
        "id": measured.model.id,
        "metrics": {metric: _plain(estimate) for metric, estimate in measured.estimates.items()},
        "differences": {metric: _plain(estimate) for metric, estimate in measured.differences.items()},
        "cut_answers": measured.cut,
    }


def _plain(estimate: Estimate) -> dict[str, float | int | None]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(estimate).items()
    }


def _cells(metric: Metric, estimate: Estimate, *, signed: bool) -> list[str]:
    """A value and its interval; shares in percent."""
    scale, digits, unit = (100.0, 1, " %") if metric in SHARES else (1.0, 4, "")
    sign = "+" if signed else ""

    def number(value: float) -> str:
        return f"{value * scale:{sign}.{digits}f}" if abs(value) < 1e6 else f"{value:{sign}.3g}"

    if estimate.low is None or estimate.high is None:
        return [number(estimate.value) + unit, "-"]
    return [number(estimate.value) + unit, f"{number(estimate.low)} to {number(estimate.high)}"]
