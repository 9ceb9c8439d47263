"""Rows of a data file, a saved dataset or a hub id, each checked and with words for where it stands."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import ABSENT, Fault, InputError
from cluster.schema import is_local
from tuning.spec import FILE_SUFFIXES, DataSpec

MAX_FAULTS = 20
NO_TEXT = "must be text, but holds half of a surrogate pair (\\ud800 to \\udfff alone)"


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


COLUMNS = {"text": ("text",), "prompt_completion": ("prompt", "completion"), "messages": ("messages",)}
"""What each format reads of a row."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from."""

    place: str
    """The field that names it."""
    reference: str
    """A local file or folder, or a hub id."""
    split: str
    config: str | None = None
    revision: str | None = None
    columns: tuple[str, ...] = ()
    """The only ones that are wanted."""

    @classmethod
    def of(cls, spec: DataSpec) -> list[Self]:
        """The training rows, then the evaluation rows if they are not held out of those."""
        columns = COLUMNS[spec.format]
        sources = [cls("data.train", spec.train, spec.train_split, spec.train_config, spec.train_revision, columns)]
        if spec.eval is not None:
            sources.append(cls("data.eval", spec.eval, spec.eval_split, spec.eval_config, spec.eval_revision, columns))
        return sources


@dataclass(slots=True)
class Row:
    """A row as it was read, and where."""

    where: str
    fields: dict[str, Any] = field(default_factory=dict[str, Any])


def is_well_formed(row: Row, spec: DataSpec, faults: Faults) -> bool:
    """Check a row's fields against the format; False if a fault was found."""
    before = len(faults.faults) + faults.more
    for name in COLUMNS[spec.format]:
        if name not in row.fields:
            there = ", ".join(row.fields) or "no field"
            faults.add(f"{row.where}: {name}", f"is required by the format {spec.format}; the row has {there}")
        elif name == "messages":
            _check_messages(row, faults)
        elif not isinstance(row.fields[name], str):
            faults.add(f"{row.where}: {name}", "must be a string", row.fields[name])
        elif not is_text(row.fields[name]):
            faults.add(f"{row.where}: {name}", NO_TEXT, row.fields[name])
        elif name != "prompt" and not row.fields[name].strip():
            faults.add(f"{row.where}: {name}", "must not be empty", row.fields[name])
    return len(faults.faults) + faults.more == before


def is_text(value: str) -> bool:
    """Whether there is such a text: JSON can write half of a surrogate pair, which is no character."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


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
        elif not is_text(message["content"]):
            faults.add(f"{place}.content", NO_TEXT, message["content"])
            sound = False
    if sound and not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        faults.add(f"{row.where}: messages", "must have an assistant's turn to learn from, one that is not empty")


def read_rows(source: Source, faults: Faults) -> Iterator[Row]:
    """The rows of a file, a saved dataset or a hub id, each with words for where it stands."""
    place, reference = source.place, source.reference
    path = Path(reference)
    suffix = path.suffix.lower()
    readers = dict(zip(FILE_SUFFIXES, (_read_jsonl, _read_csv, _read_parquet), strict=True))
    if not is_local(reference):
        yield from _read_hub(source, faults)
    elif not path.exists():
        faults.add(place, "no such file or folder", reference)
    elif path.is_dir():
        yield from _read_saved(source, faults)
    elif suffix not in readers:
        faults.add(place, f"must be a folder, a hub id or a file ending in {', '.join(readers)}", reference)
    elif path.stat().st_size == 0:
        faults.add(place, "the file is empty", reference)
    else:
        try:
            yield from readers[suffix](path, faults)
        except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
            faults.add(place, f"cannot be read: {error}", reference)


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
        reader = csv.reader(lines)
        header = next(reader, [])
        end = reader.line_num
        for values in reader:
            first, end = end + 1, reader.line_num  # a quoted value may span lines
            where = f"{path}: line {first}"
            if len(values) > len(header):
                faults.add(where, f"has more values than the header's {len(header)} columns", values[len(header) :])
            elif values:
                yield Row(where, dict(zip_longest(header, values)))


def _read_parquet(path: Path, _faults: Faults) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches():
            for fields in batch.to_pylist():
                number += 1
                yield Row(f"{path}: row {number}", fields)


def _read_saved(source: Source, faults: Faults) -> Iterator[Row]:
    import datasets

    try:
        loaded: Any = datasets.load_from_disk(source.reference)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with the files, they are no data to be had
        faults.add(source.place, f"cannot be loaded: {_first_line(error)}", source.reference)
        return
    if isinstance(loaded, datasets.DatasetDict):
        if source.split not in loaded:
            faults.add(f"{source.place}_split", f"must be one of {', '.join(map(str, loaded))}", source.split)
            return
        loaded = loaded[source.split]
    yield from _number(source, loaded, faults)


def _read_hub(source: Source, faults: Faults) -> Iterator[Row]:
    import datasets

    reference, revision, config = source.reference, source.revision, source.config
    try:
        datasets.ReadInstruction.from_spec(source.split)
    except (AssertionError, ValueError):
        faults.add(f"{source.place}_split", "must be a split or a part of one, such as train[:90%]", source.split)
        return
    try:
        names = datasets.get_dataset_config_names(reference, revision=revision)
        config = config or datasets.get_dataset_default_config_name(reference, revision=revision)
        if config not in names:
            faults.add(f"{source.place}_config", f"must be one of {', '.join(names)}", source.config)
            return
        splits = datasets.get_dataset_split_names(reference, config, revision=revision)
        if any(part.partition("[")[0] not in splits for part in source.split.split("+")):
            faults.add(f"{source.place}_split", f"must be one of {', '.join(splits)}, or a part of it", source.split)
            return
        loaded: Any = datasets.load_dataset(reference, config, split=source.split, revision=revision)
    except Exception as error:  # noqa: BLE001 - the hub, the network, a builder: all are a data source that cannot be had
        faults.add(source.place, f"cannot be loaded: {_first_line(error)}", reference)
        return
    yield from _number(source, loaded, faults)


def _number(source: Source, dataset: Any, faults: Faults) -> Iterator[Row]:
    if set(source.columns) <= set(dataset.column_names):
        dataset = dataset.select_columns(list(source.columns))  # an image or a sound beside them is not decoded
    number = 0
    try:
        for number, fields in enumerate(dataset, 1):
            yield Row(f"{source.reference}: {source.split} row {number}", dict(fields))
    except Exception as error:  # noqa: BLE001 - whatever decodes a column, or fetches its files, may fail
        faults.add(f"{source.reference}: {source.split} row {number + 1}", f"cannot be read: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), repr(error))
