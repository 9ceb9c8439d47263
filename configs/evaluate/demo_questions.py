"""The demo's held-out questions (configs/demo/eval.jsonl) as a data set of lm-evaluation-harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

QUESTIONS = Path(__file__).resolve().parent.parent / "demo" / "eval.jsonl"
WISHES = ("refund", "exchange", "delivery", "cancel", "praise", "invoice")


def load(**_: Any) -> dict[str, datasets.Dataset]:
    """``{"test": ...}`` with the columns ``question``, ``ticket``, ``tickets`` (one for each wish) and ``right`` (the
    place of the ticket among them).
    """
    rows: list[dict[str, Any]] = []
    for line in QUESTIONS.read_text(encoding="utf-8").splitlines():
        asked, answered = json.loads(line)["messages"]
        wish, _, rest = answered["content"].partition("/")
        rows.append(
            {
                "question": asked["content"],
                "ticket": answered["content"],
                "tickets": [f"{other}/{rest}" for other in WISHES],
                "right": WISHES.index(wish),
            }
        )
    return {"test": datasets.Dataset.from_list(rows)}
