"""The driver's side of a sweep's folder: what is written as soon as it is known, so that a driver may die at any time.

Ray Tune keeps its own files in a temporary folder and copies them now and then; a driver that is killed takes them
along. So the files that a resumed sweep needs are written here, in Tune's form.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuning.keep import best, drop_adapters, end, losers, saved, write_text
from tuning.past import Past


class Ledger:
    """Writes trials' files; may raise OSError anywhere."""

    def __init__(self, folder: Path, metric: str, keep_adapters: int | None, past: Past) -> None:
        self._folder, self._metric, self._keep = folder, metric, keep_adapters
        self._scores = {name: trial.score(metric) for name, trial in past.done.items() if trial.adapter is not None}
        """Of the trials that have ended and still have an adapter."""

    def begin(self, name: str, config: Mapping[str, Any]) -> None:
        """A trial starts, for the first time or again."""
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        write_text(folder / "params.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        results = folder / "result.json"
        if results.is_file() and not (told := results.read_bytes()).endswith(b"\n"):
            os.truncate(results, told.rfind(b"\n") + 1)  # half a line, of a driver that was killed

    def report(self, name: str, result: Mapping[str, Any]) -> None:
        """A trial reported."""
        with (self._folder / name / "result.json").open("a") as file:
            file.write(json.dumps(result, default=str) + "\n")

    def fail(self, name: str, errors: Path) -> Path:
        """A trial failed for good; ``errors`` is Tune's file of what happened. Returns the copy that stays."""
        copy = self._folder / name / "error.txt"
        write_text(copy, errors.read_text(errors="replace"))
        return copy

    def end(self, name: str, state: str) -> str | None:
        """A trial came to its end: nothing will go on from its checkpoints. Adapters beyond those to be kept go.

        Returns:
            None, or why something could not be deleted.
        """
        folder = self._folder / name
        trouble = end(folder, state, self._metric)
        champion = best(saved(folder), self._metric)
        self._scores[name] = math.inf if champion is None else champion.score(self._metric)
        return self.trim() or trouble

    def trim(self) -> str | None:
        """Delete the adapters beyond those to be kept. Returns None, or why something could not be deleted."""
        trouble = None
        if self._keep is not None:
            for loser in losers(self._scores, self._keep):
                trouble = drop_adapters(self._folder / loser) or trouble
                del self._scores[loser]
        return trouble
