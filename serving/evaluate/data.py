"""The rows that models are evaluated on: a JSONL file in one of the formats that adapters are trained on.

    {"messages": [{"role": "user", "content": "..."}, ..., {"role": "assistant", "content": "the reference"}]}
    {"prompt": "...", "completion": "the reference"}
    {"text": "..."}                                      what perplexity alone is for

All rows of a file have the format of its first one. Other keys of a row are left alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from cluster.errors import ABSENT, Fault, InputError
from cluster.storage import read_file

Format = Literal["messages", "prompt_completion", "text"]
Messages = Sequence[dict[str, str]]

COLUMNS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
ROLES = ("system", "user", "assistant", "tool")
MAX_FAULTS = 20


@dataclass(frozen=True, slots=True)
class Row:
    """One row: what is asked, and what should be answered."""

    line: int
    """Line of the file, counted from 1; with the file's hash it is the row's identity."""
    prompt: str | Messages
    """A conversation for the format ``messages``, else text; empty for the format ``text``."""
    reference: str
    """The answer wanted, or the whole text of the format ``text``."""


@dataclass(frozen=True, slots=True)
class Data:
    """All rows of a file."""

    path: Path
    sha256: str
    """Of the file's bytes."""
    format: Format
    rows: tuple[Row, ...]


def read_data(path: Path) -> Data:
    """Read and check ``path``.

    Raises:
        NotFoundError: there is no such file.
        InputError: every row that cannot be asked, by its line (from the twenty-first on they are counted).
        MachineError: the system does not let us read it.
    """
    content = read_file(path)
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        rule = f"must be UTF-8 text ({error.reason} at byte {error.start})"
        raise InputError([Fault(str(path), rule, ABSENT)]) from None
    faults: list[Fault] = []
    rows: list[Row] = []
    kind: Format | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        fields = _parse(line, where, faults)
        if fields is None:
            continue
        kind = kind or _format(fields)
        if kind is None:
            rule = "must have messages, prompt and completion, or text"
            faults.append(Fault(where, rule, ", ".join(fields) or "no field"))
            continue
        found = list(_row_faults(fields, kind, where))
        faults += found
        if not found:
            rows.append(_row(fields, kind, number))
    if not rows and not faults:
        faults.append(Fault(str(path), "must hold at least one row", ABSENT))
    if len(faults) > MAX_FAULTS:
        faults[MAX_FAULTS:] = [Fault("...", f"and {len(faults) - MAX_FAULTS} more", ABSENT)]
    if faults or kind is None:
        raise InputError(faults)
    return Data(path, hashlib.sha256(content).hexdigest(), kind, tuple(rows))


def _parse(line: str, where: str, faults: list[Fault]) -> dict[str, Any] | None:
    try:
        fields: object = json.loads(line)
    except json.JSONDecodeError as error:
        faults.append(Fault(where, f"must be JSON: {error.msg} at column {error.colno}", ABSENT))
        return None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets a thousand deep
        faults.append(Fault(where, f"must be JSON that can be read: {error}", ABSENT))
        return None
    if not isinstance(fields, dict):
        faults.append(Fault(where, "must be a JSON object", fields))
        return None
    return cast("dict[str, Any]", fields)


def _format(fields: dict[str, Any]) -> Format | None:
    return next((kind for kind, columns in COLUMNS.items() if all(name in fields for name in columns)), None)


def _row(fields: dict[str, Any], kind: Format, line: int) -> Row:
    if kind == "messages":
        *context, last = fields["messages"]
        kept = [{"role": message["role"], "content": message["content"]} for message in context]
        return Row(line, kept, last["content"])
    if kind == "prompt_completion":
        return Row(line, fields["prompt"], fields["completion"])
    return Row(line, "", fields["text"])


def _row_faults(fields: dict[str, Any], kind: Format, where: str) -> Iterator[Fault]:
    for name in COLUMNS[kind]:
        place = f"{where}: {name}"
        if name not in fields:
            there = ", ".join(fields) or "no field"
            yield Fault(place, f"is required, as the file's first row has the format {kind}; the row has", there)
        elif name == "messages":
            yield from _message_faults(fields[name], place)
        else:
            yield from _text_faults(fields[name], place)


def _message_faults(messages: object, where: str) -> Iterator[Fault]:
    if not isinstance(messages, list) or not messages:
        yield Fault(where, "must be a list of {role, content}", messages)
        return
    sound = True
    turns = cast("list[Any]", messages)
    for index, message in enumerate(turns):
        place = f"{where}[{index}]"
        if not isinstance(message, dict):
            yield Fault(place, "must be {role, content}", message)
            sound = False
            continue
        turn = cast("dict[str, Any]", message)
        if turn.get("role") not in ROLES:
            yield Fault(f"{place}.role", f"must be one of {', '.join(ROLES)}", turn.get("role", ABSENT))
            sound = False
        faults = list(_text_faults(turn.get("content", ABSENT), f"{place}.content", may_be_empty=True))
        yield from faults
        sound = sound and not faults
    if not sound:
        return
    if turns[-1]["role"] != "assistant" or not turns[-1]["content"].strip():
        yield Fault(where, "must end with an assistant's turn that is not empty: the reference", turns[-1])
    elif len(turns) == 1:
        yield Fault(where, "must have a turn before the assistant's last one: what it answers", turns[-1])


def _text_faults(value: object, where: str, *, may_be_empty: bool = False) -> Iterator[Fault]:
    if not isinstance(value, str):
        yield Fault(where, "must be a string", value)
        return
    try:
        value.encode()
    except UnicodeEncodeError:
        yield Fault(where, "must be text, but holds half of a surrogate pair (\\ud800 to \\udfff alone)", value)
        return
    if not may_be_empty and not value.strip():
        yield Fault(where, "must not be empty", value)
