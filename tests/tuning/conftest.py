from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser import chromium


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    with chromium() as opened:
        yield opened
