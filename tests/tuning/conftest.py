from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser import chromium


# Not for the session: while Playwright is open, its event loop runs in the thread of the tests, and no other may begin.
@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with chromium() as opened:
        yield opened
