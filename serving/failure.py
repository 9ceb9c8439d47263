"""Why an engine did not start or has ended, out of what Ray Serve reports and what vLLM's processes logged.

Ray Serve's report is a traceback through five libraries that ends in "see root cause above"; the cause itself is a
line that one of vLLM's own processes has written to the replica's log.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_ENGINE_LINE = re.compile(r"\((?:Worker|EngineCore)[^)]*\) ERROR \S+ \S+ \[[^\]]*\] (?P<cause>[\w.]+: .*)")
_EXCEPTION = re.compile(r"[\w.]*(?:Error|Exception|Exit|Interrupt)\b.*")
_SHOWN = 3
_LAST_LINES = 5


def explain(messages: Iterable[str], logs: Path | None, headline: str = "the server did not start") -> str:
    """A few lines for people: the causes that vLLM logged, or else the ends of the tracebacks.

    Args:
        messages: What Ray Serve reports of the application and its deployments.
        logs: Ray's log folder on this machine, if known.
        headline: What has happened.
    """
    causes = (
        engine_causes(path.read_text(errors="replace") for path in sorted(logs.glob("worker-*.out"))) if logs else []
    )
    ends = list(dict.fromkeys(end for message in messages if (end := last_exception(message))))
    hint = "cluster.temp_dir and cluster.keep_logs keep Ray's logs for a closer look"
    return "\n  ".join([f"{headline}:", *(causes or ends)[-_SHOWN:], f"({hint})"])


def engine_causes(texts: Iterable[str]) -> list[str]:
    """The exceptions that vLLM's processes logged, each once, in the order in which they came."""
    causes: dict[str, None] = {}
    for text in texts:
        for line in text.splitlines():
            match = _ENGINE_LINE.match(line)
            if match and _EXCEPTION.match(match["cause"]):
                causes[match["cause"].strip()] = None
    return list(causes)


def last_exception(message: str) -> str:
    """The last exception of a report that may hold several tracebacks; its last lines if there is none; "" if it is
    empty.
    """
    lines = [line for line in message.splitlines() if line.strip()]
    for line in reversed(lines):
        if _EXCEPTION.match(line):
            return line.strip()
    return "\n  ".join(line.strip() for line in lines[-_LAST_LINES:])
