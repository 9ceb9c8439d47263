from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base; heads of 64, which vLLM's CPU attention wants."""
    return make_base(tmp_path_factory.mktemp("base") / "tiny", hidden=256)
