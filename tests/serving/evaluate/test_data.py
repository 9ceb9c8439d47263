from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import InputError, NotFoundError
from serving.evaluate.data import MAX_FAULTS, read_data

ROOT = Path(__file__).parents[3]
QUESTION = {"role": "user", "content": "?"}
ANSWER = {"role": "assistant", "content": "!"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def faults(path: Path) -> list[str]:
    with pytest.raises(InputError) as caught:
        read_data(path)
    return [str(fault).removeprefix(f"{path}: ") for fault in caught.value.faults]


def test_the_shipped_questions() -> None:
    path = ROOT / "configs/demo/eval.jsonl"
    data = read_data(path)
    assert (data.format, len(data.rows)) == ("messages", 100)
    assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [row.line for row in data.rows] == list(range(1, 101))
    assert data.rows[0].reference == "exchange/sport/normal"
    assert [message["role"] for message in data.rows[0].prompt if isinstance(message, dict)] == ["user"]


def test_the_last_turn_is_the_reference(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": ""}, QUESTION, {**ANSWER, "content": "first"}, QUESTION, ANSWER]
    data = read_data(write(tmp_path / "data.jsonl", {"messages": turns, "id": 7}))
    assert data.rows[0].prompt == turns[:-1]
    assert data.rows[0].reference == "!"


def test_prompts_and_texts(tmp_path: Path) -> None:
    data = read_data(
        write(tmp_path / "a.jsonl", {"prompt": "a", "completion": " b"}, "", {"prompt": "b", "completion": "c"})
    )
    assert [(row.line, row.prompt, row.reference) for row in data.rows] == [(1, "a", " b"), (3, "b", "c")]
    data = read_data(write(tmp_path / "b.jsonl", {"text": "a b"}))
    assert (data.format, data.rows[0].prompt, data.rows[0].reference) == ("text", "", "a b")


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path / "data.jsonl",
        {"messages": [QUESTION, ANSWER]},
        "{",
        "[1]",
        {"prompt": "a", "completion": "b"},
        {"messages": []},
        {"messages": [QUESTION]},
        {"messages": [ANSWER]},
        {"messages": [{"role": "robot", "content": 5}, "x", {"role": "user", "content": "\ud800"}]},
    )
    told = faults(path)
    expected = [
        ("line 2", "must be JSON"),
        ("line 3", "must be a JSON object"),
        ("line 4: messages", "is required, as the file's first row has the format messages"),
        ("line 5: messages", "must be a list"),
        ("line 6: messages", "must end with an assistant's turn"),
        ("line 7: messages", "must have a turn before"),
        ("line 8: messages[0].role", "must be one of system, user"),
        ("line 8: messages[0].content", "must be a string"),
        ("line 8: messages[1]", "must be {role, content}"),
        ("line 8: messages[2].content", "surrogate"),
    ]
    assert len(told) == len(expected)
    for fault, (where, rule) in zip(told, expected, strict=True):
        assert fault.startswith(f"{where}: "), fault
        assert rule in fault


@pytest.mark.parametrize(
    ("rows", "rule"),
    [
        ([], "must hold at least one row"),
        (["", " "], "must hold at least one row"),
        ([{"question": "?"}], "must have messages, prompt and completion, or text"),
        ([{"text": " "}], "must not be empty"),
        ([{"prompt": "", "completion": "a"}], "must not be empty"),
        ([{"prompt": 5, "completion": ""}], "must be a string"),
        (['{"a": ' + "[" * 100_000 + "}"], "must be JSON"),
    ],
)
def test_rows_that_cannot_be_asked(tmp_path: Path, rows: list[Any], rule: str) -> None:
    assert rule in faults(write(tmp_path / "data.jsonl", *rows))[0]


def test_faults_are_counted_from_the_twenty_first_on(tmp_path: Path) -> None:
    told = faults(write(tmp_path / "data.jsonl", *["{"] * 30))
    assert len(told) == MAX_FAULTS + 1
    assert told[-1] == "...: and 10 more"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        read_data(tmp_path / "none.jsonl")
    assert "is a folder" in faults(tmp_path)[0]
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}')
    assert "must be UTF-8" in faults(tmp_path / "latin.jsonl")[0]
