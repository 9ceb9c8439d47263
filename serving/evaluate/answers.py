"""What a model has answered so far, in a file: nothing is asked twice.

**Contract.** One JSONL file for each model, data and settings, named after their hash. Its first line says whose
answers they are, each further line holds one answer, appended and flushed as it comes: whatever ends the program, what
was answered is there. A line that a crash cut in half is cut off when the file is opened again. One program at a time
holds a file (flock, which ends with the program).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from cluster.errors import ABSENT, ConflictError, Fault, InputError
from cluster.storage import disk_trouble

Kind = Literal["answer", "likelihood"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model wrote for a row."""

    text: str
    cut: bool
    """True if it ended for its length, not by itself."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely a model finds a row's reference."""

    nats: float
    """Negative log-likelihood, summed over the tokens."""
    tokens: int
    """Tokens of the reference, at least 1."""


class AnswerFile:
    """The answers of one model, by row and kind; a context manager that holds the file."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Open or make the file of ``identity``: the model, the data and the settings, as JSON values.

        Raises:
            ConflictError: another program is filling it.
            InputError: the file holds what is no answer.
            MachineError: it cannot be made or written.
        """
        header = json.dumps(identity, sort_keys=True)
        key = hashlib.sha256(header.encode()).hexdigest()[:16]
        name = re.sub(r"[^A-Za-z0-9@._-]", "-", str(identity["model"]))[:80]
        self.path = folder / f"{name}-{key}.jsonl"
        self.answers: dict[int, Answer] = {}
        self.likelihoods: dict[int, Likelihood] = {}
        with disk_trouble("--out", self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+", encoding="utf-8", newline="\n")
        try:
            self._take(header)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, line: int, found: Answer | Likelihood) -> None:
        """Keep what a model said of the row at ``line``.

        Raises:
            MachineError: it cannot be written.
        """
        self._keep(line, found)
        kind: Kind = "answer" if isinstance(found, Answer) else "likelihood"
        self._write(json.dumps({"line": line, "kind": kind, **asdict(found)}))

    def has(self, line: int, kind: Kind) -> bool:
        """True if the row has been answered."""
        return line in (self.answers if kind == "answer" else self.likelihoods)

    def _take(self, header: str) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConflictError(
                f"{self.path}: another evaluation is filling it; wait for it, or choose another --out"
            ) from None
        with disk_trouble("--out", self.path):
            content = self.path.read_bytes()
            whole = content.rfind(b"\n") + 1
            self._file.truncate(whole)
        lines = content[:whole].decode("utf-8", errors="replace").split("\n")[:-1]
        if not lines:
            self._write(header)
        elif lines[0] != header:
            raise InputError(
                [Fault(f"{self.path}: line 1", "must be what this program wrote; remove the file", ABSENT)]
            )
        for number, line in enumerate(lines[1:], 2):
            try:
                self._read(json.loads(line))
            except (ValueError, KeyError, TypeError):
                rule = "must be an answer that this program wrote; remove the line"
                raise InputError([Fault(f"{self.path}: line {number}", rule, line)]) from None

    def _read(self, record: dict[str, Any]) -> None:
        line, kind = int(record.pop("line")), record.pop("kind")
        self._keep(line, Answer(**record) if kind == "answer" else Likelihood(**record))

    def _keep(self, line: int, found: Answer | Likelihood) -> None:
        if isinstance(found, Answer):
            self.answers[line] = found
        else:
            self.likelihoods[line] = found

    def _write(self, text: str) -> None:
        with disk_trouble("--out", self.path):
            self._file.write(text + "\n")
            self._file.flush()
