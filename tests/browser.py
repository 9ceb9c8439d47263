"""A real Chromium without a window, steered by Playwright, which is told to bring none of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
# WebGL is computed by the CPU: no machine of the tests needs a graphics card.
FLAGS = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


def find_chromium() -> str | None:
    """Where a Chromium is: as CHROMIUM says, or where a shell would find one."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def chromium() -> Generator[Browser]:
    """A browser; ended with the block."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=30_000)  # a machine of two cores may be busy with other tests
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    """A page, and what went wrong on it."""

    page: Page
    complaints: list[str] = field(default_factory=list[str])
    """Errors and warnings on the console, exceptions, requests to other hosts."""


@contextlib.contextmanager
def visit(
    browser: Browser,
    *,
    width: int = 1280,
    height: int = 900,
    scheme: Literal["light", "dark"] = "light",
    touch: bool = False,
    refused: Collection[int] = (),
) -> Generator[Visit]:
    """An empty page that writes down every complaint; there must be none at the end, but for requests that the server
    answers with a status of ``refused``, which Chromium tells on the console as well.
    """
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=touch)
    seen = Visit(page)
    allowed = tuple(f"Failed to load resource: the server responded with a status of {status} " for status in refused)
    page.on(
        "console",
        lambda said: (
            seen.complaints.append(said.text)
            if said.type in ("error", "warning") and not said.text.startswith(allowed)
            else None
        ),
    )
    page.on("pageerror", lambda error: seen.complaints.append(str(error)))

    def note(url: str) -> None:
        if not url.startswith(("http://127.0.0.1:", "data:", "blob:", "file:", "about:")):
            seen.complaints.append(f"asks {url}")

    page.on("request", lambda request: note(request.url))
    try:
        yield seen
        assert not seen.complaints, seen.complaints
    finally:
        page.close()
