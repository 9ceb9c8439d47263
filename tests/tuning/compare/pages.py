"""How tests open the comparison page, use it and read what it shows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar
from urllib.request import urlopen

from playwright.sync_api import Page

from tests.waiting import wait_until
from tuning.compare.document import Comparison

Serve = Callable[[Path], str]
T = TypeVar("T")


def ready(page: Page, url: str, view: str = "curves", choice: str = "") -> None:
    """Open the page, or another view of it where it is open, and wait for its table and its plot."""
    page.goto(f"{url}#view={view}{choice and '&'}{choice}")
    page.wait_for_selector("tr[data-key]")
    plot = "#trial-curve .main-svg" if "trial=" in choice else "#plot .main-svg"
    page.wait_for_selector("#sides" if view == "sweeps" else plot)
    if "trial=" not in choice:
        becomes(lambda: page.evaluate("drawn.view"), view)  # where the page was open, a plot was there before


def rows(page: Page) -> list[str]:
    """The names of the trials in sight, in the table's order."""
    return page.locator("tr[data-key] td[data-column=trial]").all_text_contents()


def plot(page: Page) -> list[dict[str, Any]]:
    """The traces that the plot is drawn of, now."""
    return page.evaluate("document.getElementById('plot').data ?? []")


def keys_of(traces: Iterable[dict[str, Any]]) -> set[str]:
    """The trials that traces show."""
    return {key for trace in traces for key in trace.get("customdata") or [] if key is not None}


def becomes(read: Callable[[], T], wanted: T) -> None:
    """Wait until what is read is what is wanted; says what it is instead."""
    found: list[T] = []

    def is_wanted() -> bool:
        found[:] = [read()]
        return found == [wanted]

    with contextlib.suppress(AssertionError):
        wait_until(is_wanted, timeout_s=30)
    assert found == [wanted]


def drag(page: Page, axis: str, start: float, end: float) -> None:
    """Brush an axis of the parallel coordinates, from one part of its height to another: 0 is its top."""
    names: list[str] = [dimension["name"] for dimension in plot(page)[0]["dimensions"]]
    box = page.locator("#plot .parcoords .axis-brush").nth(names.index(axis)).bounding_box()
    assert box
    x, top, height = box["x"] + box["width"] / 2, box["y"], box["height"]
    page.mouse.move(x, top + height * start)
    page.mouse.down()
    page.mouse.move(x, top + height * (start + end) / 2, steps=5)
    page.mouse.move(x, top + height * end, steps=5)
    page.mouse.up()


def document(url: str) -> Comparison:
    """What the page at ``url`` is told."""
    with urlopen(f"{url}data.json") as answer:
        return Comparison.model_validate_json(answer.read())
