"""Several sweeps on one page that were not made to be compared: other knobs, another base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from tests.browser import visit
from tests.tuning.compare.make import make_sweep
from tests.tuning.compare.pages import Serve, becomes, plot, ready, rows
from tuning.results import read_sweep

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

FIXED: dict[str, Any] = {
    "space": {"rank": {"choice": [4, 8, 16]}, "max_grad_norm": {"choice": [None, 0.3]}},
    "train": {"steps": 100, "eval_every": 20, "alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "search": {"algorithm": "grid"},
}
"""Searches neither the ratio of alpha nor the targets, as the other does."""
PLACES = """Object.fromEntries([...document.querySelector('#plot .parcoords .axis').querySelectorAll('.tick')].map(
  tick => [tick.textContent, tick.getBoundingClientRect().top]))"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sweep over the ratio of alpha and the targets, among others; and one that fixes both, on another base."""
    make_sweep(tmp_path / "ratio", 24)
    make_sweep(tmp_path / "fixed", 6, base={"model": "org/other"}, **FIXED)
    return tmp_path


def test_what_one_sweep_searches_another_may_fix(folder: Path, browser: Browser, serve: Serve) -> None:
    """All trials with a result have their line and their points, at the values that they were trained with."""
    with visit(browser) as seen:
        page = seen.page
        ready(page, serve(folder), "knobs")
        fixed = read_sweep(folder / "fixed")
        becomes(lambda: len(plot(page)[0]["dimensions"][0]["values"]), 30)
        expect(page.locator("#remark")).not_to_contain_text("no line")
        ratios = {trial.name: 16 / trial.knobs["rank"] for trial in fixed.trials}
        for name, ratio in ratios.items():
            row = page.locator(f"tr[data-key='fixed/{name}']")
            expect(row.locator("td[data-column=alpha_over_rank]")).to_have_text(f"{ratio:g}")
            expect(row.locator("td[data-column=target_modules]")).to_have_text("q_proj+v_proj")
        axis = next(each for each in plot(page)[0]["dimensions"] if each["name"] == "target_modules")
        assert sorted(axis["ticktext"]) == ["all-linear", "attention", "q_proj+v_proj"]
        page.click("[data-view=maps]")
        becomes(lambda: {len(trace["x"]) for trace in plot(page) if trace.get("mode") == "markers"}, {30})


def test_losses_that_do_not_compare_are_told_of(folder: Path, browser: Browser, serve: Serve) -> None:
    with visit(browser) as seen:
        page = seen.page
        ready(page, serve(folder))
        expect(page.locator("#apart")).to_have_text("These sweeps differ in base.model: their losses may not compare.")
        page.click("[data-only=fixed]")
        expect(page.locator("#apart")).to_be_hidden()
        expect(page.locator("#count")).to_have_text("6 trials")
        expect(page.locator("[data-sweep=ratio]")).not_to_be_checked()
        page.go_back()
        expect(page.locator("#count")).to_have_text("30 trials")


def test_sweeps_of_one_base_and_data_compare(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    made: dict[str, Any] = {"data": {"train": "org/rows", "eval_fraction": 0.1, "packing": True}}
    make_sweep(tmp_path / "one", 12)
    make_sweep(tmp_path / "two", 12, **made)
    with visit(browser) as seen:
        ready(seen.page, serve(tmp_path))
        expect(seen.page.locator("#count")).to_have_text("24 trials")
        expect(seen.page.locator("#apart")).to_be_hidden()  # packing changes no loss


def test_a_word_that_names_no_column_is_told_of(folder: Path, browser: Browser, serve: Serve) -> None:
    with visit(browser) as seen:
        page = seen.page
        ready(page, serve(folder), choice="off=ratio")
        page.fill("#query", "rnk>=8")
        expect(page.locator("#chips .unknown")).to_have_text("no column rnk")
        page.fill("#query", "rank>=8 max_grad_norm=null")
        expect(page.locator("#chips .unknown")).to_have_count(0)
        wanted = [
            trial.name
            for trial in read_sweep(folder / "fixed").trials
            if trial.knobs["rank"] >= 8 and trial.knobs["max_grad_norm"] is None
        ]
        assert wanted
        becomes(lambda: rows(page), wanted)


def test_long_lists_of_targets_have_places_of_their_own(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    """Also where their names begin alike, and are cut."""
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lists = [attention, [*attention, "gate_proj"], [*attention, "gate_proj", "up_proj"], ["q_proj"]]
    make_sweep(tmp_path / "made", 4, space={"target_modules": {"choice": lists}}, search={"algorithm": "grid"})
    with visit(browser) as seen:
        page = seen.page
        ready(page, serve(tmp_path), "knobs")
        (axis,) = [each for each in plot(page)[0]["dimensions"] if each["name"] == "target_modules"]
        assert len({*axis["ticktext"]}) == 4
        drawn: dict[str, float] = page.evaluate(PLACES)
        order = sorted(axis["ticktext"], key=lambda text: axis["tickvals"][axis["ticktext"].index(text)])
        assert sorted(drawn, key=lambda text: -drawn[text]) == order, "from the bottom up"
