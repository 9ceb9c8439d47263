"""What the maps show of each pair of knobs, against what the sweeps' files say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tests.browser import visit
from tests.tuning.compare.make import SPACE, change_reports, make_sweep
from tests.tuning.compare.pages import Serve, becomes, document, keys_of, plot, ready
from tuning.compare.document import TrialView

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

KNOBS = tuple(SPACE)


def cell_of(name: str, trial: TrialView, trials: Sequence[TrialView]) -> int:
    """Which of a map's rows or columns a trial lies in: by its value's place, or that of eight even parts."""
    values = sorted({each.knobs[name] for each in trials}, key=lambda value: (str(type(value)), value))
    if len(values) <= 8:
        return values.index(trial.knobs[name])
    place = place_of(name, trial)
    low, high = (place_of(name, min(trials, key=lambda each: sign * place_of(name, each))) for sign in (1, -1))
    return min(7, int(8 * (place - low) / (high - low)))


def place_of(name: str, trial: TrialView) -> float:
    value = trial.knobs[name]
    assert isinstance(value, float)
    return math.log10(value) if name == "learning_rate" else value


def maps_of(page: Page) -> dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]]:
    """By the knobs across and up, as the axes name them: the cells and the points."""
    words: list[str] = page.evaluate("names => names.map(title)", KNOBS)
    names = dict(zip(words, KNOBS, strict=True))
    shape: dict[str, Any] = page.evaluate("""() => {
        const { layout } = document.getElementById('plot');
        const across = Object.entries(layout).filter(([key]) => key.startsWith('xaxis'));
        return {
          across: Object.fromEntries(across.map(([key, axis]) => [key.replace('axis', ''), axis.title.text])),
          up: layout.annotations.map(one => one.text),
        };
    }""")
    traces = plot(page)
    found: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]] = {}
    for (cells, dots), up in zip(zip(traces[::2], traces[1::2], strict=True), shape["up"], strict=True):
        assert (cells["type"], cells["xaxis"], cells["yaxis"]) == ("heatmap", dots["xaxis"], dots["yaxis"])
        found[names[shape["across"][cells["xaxis"]].removesuffix(" →")], names[up.removesuffix(" ↑")]] = (cells, dots)
    return found


@pytest.mark.parametrize("is_log", [False, True])
def test_maps_hold_the_best_of_each_cell(tmp_path: Path, browser: Browser, serve: Serve, is_log: bool) -> None:
    folder = make_sweep(tmp_path / "made", 60)
    if is_log:  # over more than a decade the colours are those of logarithms
        change_reports(folder / "t001", lambda report: {**report, "eval_loss": 40 * report["eval_loss"]})
    url = serve(folder)
    [told] = document(url).sweeps
    trials = told.trials or []
    passing = [trial for trial in trials if trial.knobs["rank"] != 4]
    assert 20 < len(passing) < 60

    def goal(trial: TrialView) -> float:
        assert trial.eval_loss is not None
        return math.log10(trial.eval_loss) if is_log else trial.eval_loss

    with visit(browser) as seen:
        page = seen.page
        ready(page, url, "maps")
        page.fill("#query", "rank!=4")
        keys = {f"made/{trial.name}": trial for trial in passing}
        becomes(lambda: [keys_of([dots]) for _, dots in maps_of(page).values()], [{*keys}] * 10)
        maps = maps_of(page)
        assert {frozenset(pair) for pair in maps} == {*map(frozenset, itertools.combinations(KNOBS, 2))}
        for (across, up), (cells, dots) in maps.items():
            best: dict[tuple[int, int], float] = {}
            for trial in passing:
                cell = cell_of(across, trial, trials), cell_of(up, trial, trials)
                best[cell] = min(best.get(cell, math.inf), goal(trial))
            filled = {(i, j): z for j, row in enumerate(cells["z"]) for i, z in enumerate(row) if z is not None}
            assert filled == pytest.approx(best), (across, up)
            assert len(dots["x"]) == len(dots["customdata"]) == len(passing)
            for key, x, y, colour in zip(
                dots["customdata"], dots["x"], dots["y"], dots["marker"]["color"], strict=True
            ):
                assert colour == pytest.approx(goal(keys[key]))
                for name, place in ((across, x), (up, y)):
                    if name in ("learning_rate", "dropout"):
                        assert place == pytest.approx(place_of(name, keys[key]))
                    else:
                        assert round(place) == cell_of(name, keys[key], trials)
