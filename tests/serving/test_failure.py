from __future__ import annotations

from pathlib import Path

from serving.failure import engine_causes, explain, last_exception

LOG = """INFO 11-22 22:14:47 [model.py:684] Resolved architecture: LlamaForCausalLM
(Worker pid=32) ERROR 11-22 22:47:26 [multiproc_executor.py:944] Traceback (most recent call last):
(Worker pid=32) ERROR 11-22 22:47:26 [multiproc_executor.py:944]     raise RuntimeError(
(Worker pid=32) ERROR 11-22 22:47:26 [multiproc_executor.py:944] RuntimeError: Cannot find any model weights with `/b`
(EngineCore pid=31) ERROR 11-22 22:47:27 [core.py:1] RuntimeError: Cannot find any model weights with `/b`
(EngineCore pid=31) ERROR 11-22 22:47:27 [core.py:1] Exception: WorkerProc initialization failed
"""
REPORT = """The deployment failed to start 1 times in a row. Error:
  File "x.py", line 1, in y
    raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_the_engines_own_words_come_first(tmp_path: Path) -> None:
    (tmp_path / "worker-1.out").write_text(LOG)
    (tmp_path / "worker-2.out").write_text("nothing\n")
    text = explain([REPORT, REPORT], tmp_path)
    assert "RuntimeError: Cannot find any model weights with `/b`\n" in text
    assert "See root cause" not in text
    assert text.count("Cannot find") == 1


def test_without_them_the_end_of_the_traceback(tmp_path: Path) -> None:
    for logs in (None, tmp_path, tmp_path / "none"):
        assert "RuntimeError: Engine core initialization failed." in explain([REPORT, ""], logs)


def test_causes() -> None:
    assert engine_causes([LOG, LOG]) == [
        "RuntimeError: Cannot find any model weights with `/b`",
        "Exception: WorkerProc initialization failed",
    ]
    assert engine_causes(["(Worker pid=1) ERROR 1 2 [x] note: this is none", ""]) == []


def test_the_last_exception() -> None:
    assert last_exception(REPORT) == "RuntimeError: Engine core initialization failed. See root cause above."
    assert last_exception("vllm.exceptions.VLLMError: a\nfoo") == "vllm.exceptions.VLLMError: a"
    assert last_exception("a\nb\n\nc") == "a\n  b\n  c"
    assert last_exception("") == ""
