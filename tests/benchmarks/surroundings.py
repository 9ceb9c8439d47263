"""What the benchmarks have in common: random bases of a given shape, and surroundings that no earlier run has left."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from cluster.connect import environment

ROOT = Path(__file__).resolve().parents[2]


def llama(
    vocab: int, hidden: int, intermediate: int, *, layers: int, heads: int, key_value_heads: int, **more: Any
) -> LlamaConfig:
    """A Llama of that shape."""
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        **more,
    )


@contextmanager
def fresh_surroundings() -> Generator[Path]:
    """In the block, no base has been quantised before, and Ray's workers find these files. Yields a folder for it."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with (
        tempfile.TemporaryDirectory() as folder,
        environment({"XDG_CACHE_HOME": f"{folder}/cache", "PYTHONPATH": path}),
    ):
        yield Path(folder)
