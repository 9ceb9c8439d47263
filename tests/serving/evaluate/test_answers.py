from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import ConflictError, InputError, MachineError
from serving.evaluate.answers import Answer, AnswerFile, Likelihood
from tests.waiting import wait_until

ROOT = Path(__file__).parents[3]
IDENTITY = {"model": "support@1", "sha256": "0" * 64, "settings": {"max_tokens": 8}}


def open_file(folder: Path, **changes: object) -> AnswerFile:
    return AnswerFile(folder, IDENTITY | changes)


def test_what_was_answered_is_there_again(tmp_path: Path) -> None:
    hard = "line\nbreak \u2028 \x85 \ud800"[:-1] + "\N{SNOWMAN}"
    with open_file(tmp_path) as file:
        file.add(1, Answer(hard, cut=True))
        file.add(7, Likelihood(2.5, 4))
    with open_file(tmp_path) as file:
        assert file.answers == {1: Answer(hard, cut=True)}
        assert file.likelihoods == {7: Likelihood(2.5, 4)}
        assert file.has(1, "answer")
        assert not file.has(1, "likelihood")
        assert file.has(7, "likelihood")
        assert file.path.name.startswith("support@1-")


def test_other_models_data_and_settings_have_other_files(tmp_path: Path) -> None:
    paths: set[Path] = set()
    for changes in ({}, {"model": "support@2"}, {"sha256": "1" * 64}, {"settings": {"max_tokens": 9}}):
        with open_file(tmp_path, **changes) as file:
            assert not file.answers
            file.add(1, Answer("x", cut=False))
            paths.add(file.path)
    assert len(paths) == 4
    with open_file(tmp_path, model="../a/b") as file:
        assert file.path.parent == tmp_path


@pytest.mark.parametrize(
    "tail", [b'{"line": 2, "ki', b"{", b"\xff\xfe", b'{"line": 2, "kind": "answer", "text": "\xc3']
)
def test_half_a_line_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    with open_file(tmp_path) as file:
        file.add(1, Answer("x", cut=False))
    whole = file.path.read_bytes()
    file.path.write_bytes(whole + tail)
    with open_file(tmp_path) as file:
        assert file.answers == {1: Answer("x", cut=False)}
        file.add(2, Answer("y", cut=False))
    with open_file(tmp_path) as file:
        assert sorted(file.answers) == [1, 2]
    file.path.write_bytes(whole[:5])  # even the first
    with open_file(tmp_path) as file:
        assert not file.answers


def test_what_this_program_did_not_write_is_refused(tmp_path: Path) -> None:
    with open_file(tmp_path) as file:
        file.add(1, Answer("x", cut=False))
    content = file.path.read_text()
    file.path.write_text(content + '{"line": 2}\n')
    with pytest.raises(InputError, match="line 3: must be an answer"):
        open_file(tmp_path)
    file.path.write_text("{}\n")
    with pytest.raises(InputError, match="line 1: must be what this program wrote"):
        open_file(tmp_path)
    file.path.write_text(content)
    with open_file(tmp_path) as file:  # no refusal has left it held
        assert file.answers


def test_one_program_at_a_time(tmp_path: Path) -> None:
    with open_file(tmp_path), pytest.raises(ConflictError, match="another evaluation"):
        open_file(tmp_path)
    with open_file(tmp_path):
        pass


WRITER = """
import sys
from pathlib import Path
from serving.evaluate.answers import Answer, AnswerFile
file = AnswerFile(Path(sys.argv[1]), {identity!r})
for line in range(1, 1_000_000):
    file.add(line, Answer("x" * 1000, cut=False))
"""


def test_a_killed_program_loses_no_answer_and_frees_the_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER.replace("{identity!r}", repr(IDENTITY)), str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: any(path.stat().st_size > 50_000 for path in tmp_path.glob("*")), process)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(30)
    (path,) = tmp_path.glob("*")
    lines = path.read_bytes().count(b"\n")
    with open_file(tmp_path) as file:
        assert sorted(file.answers) == list(range(1, lines))


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="--out"):
        open_file(tmp_path / "file")
