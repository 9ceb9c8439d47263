"""Rows of a data file, a saved dataset or a hub id, each checked and with words for where it stands."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import ABSENT, Fault, InputError
from cluster.schema import is_local
from tuning.spec import DataSpec

MAX_FAULTS = 20


class Faults:
    """Collects faults; from the twenty-first on they are only counted."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.more = 0

    def add(self, where: str, rule: str, value: object = ABSENT) -> None:
        """Note a fault; see ``cluster.errors.Fault``."""
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(Fault(where, rule, value))
        else:
            self.more += 1

    def check(self) -> None:
        """Raise what was found, if anything."""
        if self.more:
            self.faults.append(Fault("...", f"and {self.more} more", ABSENT))
        if self.faults:
            raise InputError(self.faults)


@dataclass(slots=True)
class Row:
    """A row as it was read, and where."""

    where: str
    fields: dict[str, Any] = field(default_factory=dict[str, Any])


def is_well_formed(row: Row, spec: DataSpec, faults: Faults) -> bool:
    """Check a row's fields against the format; False if a fault was found."""
    names = {"text": ("text",), "prompt_completion": ("prompt", "completion"), "messages": ("messages",)}[spec.format]
    before = len(faults.faults) + faults.more
    for name in names:
        if name not in row.fields:
            faults.add(
                f"{row.where}: {name}", f"is required by the format {spec.format}; the row has {', '.join(row.fields)}"
            )
        elif name == "messages":
            _check_messages(row, faults)
        elif not isinstance(row.fields[name], str):
            faults.add(f"{row.where}: {name}", "must be a string", row.fields[name])
        elif name != "prompt" and not row.fields[name].strip():
            faults.add(f"{row.where}: {name}", "must not be empty", row.fields[name])
    return len(faults.faults) + faults.more == before


def _check_messages(row: Row, faults: Faults) -> None:
    messages = row.fields["messages"]
    if not isinstance(messages, list) or not messages:
        faults.add(f"{row.where}: messages", "must be a list of {role, content}", messages)
        return
    sound = True
    for index, message in enumerate(messages):
        place = f"{row.where}: messages[{index}]"
        if not isinstance(message, dict):
            faults.add(place, "must be {role, content}", message)
            sound = False
            continue
        if message.get("role") not in ("system", "user", "assistant", "tool"):
            faults.add(f"{place}.role", "must be system, user, assistant or tool", message.get("role", ABSENT))
            sound = False
        if not isinstance(message.get("content"), str):
            faults.add(f"{place}.content", "must be a string", message.get("content", ABSENT))
            sound = False
    if sound and not any(message["role"] == "assistant" for message in messages):
        faults.add(f"{row.where}: messages", "must have an assistant's turn to learn from")


def read_rows(source: str, split: str, place: str, faults: Faults) -> Iterator[Row]:
    """The rows of a file, a saved dataset or a hub id, each with words for where it stands."""
    path = Path(source)
    suffix = path.suffix.lower()
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if not is_local(source):
        yield from _read_dataset(source, split, place, faults)
    elif not path.exists():
        faults.add(place, "no such file or folder", source)
    elif path.is_dir():
        yield from _read_dataset(source, split, place, faults)
    elif suffix not in readers:
        faults.add(place, f"must be a folder, a hub id or a file ending in {', '.join(readers)}", source)
    elif path.stat().st_size == 0:
        faults.add(place, "the file is empty", source)
    else:
        try:
            yield from readers[suffix](path, faults)
        except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
            faults.add(place, f"cannot be read: {error}", source)


def _read_jsonl(path: Path, faults: Faults) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                faults.add(where, f"must be JSON: {error.msg} at column {error.colno}")
                continue
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets a thousand deep
                faults.add(where, f"must be JSON that can be read: {error}")
                continue
            if isinstance(fields, dict):
                yield Row(where, fields)
            else:
                faults.add(where, "must be a JSON object", fields)


def _read_csv(path: Path, faults: Faults) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        for fields in reader:
            where = f"{path}: line {reader.line_num}"
            surplus = fields.pop(None, None)  # pyright: ignore[reportArgumentType, reportCallIssue]
            if surplus is not None:
                faults.add(where, f"has more values than the header's {len(reader.fieldnames or [])} columns", surplus)
            else:
                yield Row(where, dict(fields))


def _read_parquet(path: Path, _faults: Faults) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches():
            for fields in batch.to_pylist():
                number += 1
                yield Row(f"{path}: row {number}", fields)


def _read_dataset(source: str, split: str, place: str, faults: Faults) -> Iterator[Row]:
    import datasets

    try:
        loaded: Any = datasets.load_from_disk(source) if is_local(source) else datasets.load_dataset(source)
    except Exception as error:  # noqa: BLE001 - the hub, the network, a builder: all are a data source that cannot be had
        faults.add(place, f"cannot be loaded: {str(error).strip().splitlines()[0] if str(error) else error!r}", source)
        return
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            faults.add(f"{place}_split", f"must be one of {', '.join(map(str, loaded))}", split)
            return
        loaded = loaded[split]
    rows: Iterable[dict[str, Any]] = loaded
    for number, fields in enumerate(rows, 1):
        yield Row(f"{source}: {split} row {number}", dict(fields))
