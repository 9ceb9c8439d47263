"""What one answer is worth beside its reference, by each metric.

| metric | unit | better | of one row |
|---|---|---|---|
| exact_match | share, 0 to 1 | higher | 1 if answer and reference are equal, else 0 |
| contains | share, 0 to 1 | higher | 1 if the reference stands in the answer, else 0 |
| rouge | 0 to 1 | higher | ROUGE-L, the F-measure of the longest common subsequence of words (Lin, ACL 2004 workshop) |
| f1 | 0 to 1 | higher | F1 of the bags of words (Rajpurkar et al., EMNLP 2016, sec. 6.1) |
| perplexity | per token, from 1 | lower | negative log-likelihood (nats) and number of the reference's tokens |

``exact_match`` and ``contains`` compare texts after Unicode's NFC, with every run of white space made one blank and
none at the ends. Case and punctuation count: what an adapter is trained to write, it should write so. ``f1`` and
``rouge`` normalise as their sources do: SQuAD's drops case, punctuation and English articles, ROUGE's case and all but
a-z and 0-9, without stemming.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Metric = Literal["exact_match", "contains", "rouge", "f1", "perplexity"]
METRICS: tuple[Metric, ...] = get_args(Metric)
SHARES: frozenset[Metric] = frozenset({"exact_match", "contains"})
"""Metrics whose rows are 0 or 1."""
LOWER_IS_BETTER: frozenset[Metric] = frozenset({"perplexity"})

Score = Callable[[Sequence[str], Sequence[str]], Floats]


def normalised(text: str) -> str:
    """``text`` as ``exact_match`` and ``contains`` compare it."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def score_rows(metric: Metric, answers: Sequence[str], references: Sequence[str]) -> Floats:
    """The worth of each answer, in the order of the rows; float64[n].

    Raises:
        KeyError: ``metric`` is perplexity, which is not about answers.
    """
    return _SCORES[metric](answers, references)


def _exact_match(answers: Sequence[str], references: Sequence[str]) -> Floats:
    return np.array([normalised(a) == normalised(r) for a, r in zip(answers, references, strict=True)], np.float64)


def _contains(answers: Sequence[str], references: Sequence[str]) -> Floats:
    return np.array([normalised(r) in normalised(a) for a, r in zip(answers, references, strict=True)], np.float64)


def _rouge(answers: Sequence[str], references: Sequence[str]) -> Floats:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    scores = [scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True)]
    return np.array(scores, np.float64)


def _f1(answers: Sequence[str], references: Sequence[str]) -> Floats:
    from torchmetrics.functional.text import squad

    def one(answer: str, reference: str) -> float:
        target = {"answers": {"answer_start": [0], "text": [reference]}, "id": "row"}
        return float(squad([{"prediction_text": answer, "id": "row"}], [target])["f1"]) / 100

    return np.array([one(a, r) for a, r in zip(answers, references, strict=True)], np.float64)


_SCORES: dict[Metric, Score] = {
    "exact_match": _exact_match,
    "contains": _contains,
    "rouge": _rouge,
    "f1": _f1,
}
