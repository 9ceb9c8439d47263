from __future__ import annotations

import pytest

from serving.evaluate.metrics import METRICS, Metric, score_rows

ANSWERS = {
    "exact_match": [
        ("exchange/sport/normal", "exchange/sport/normal", 1),
        (" exchange/sport/normal \n", "exchange/sport/normal", 1),
        ("Exchange/sport/normal", "exchange/sport/normal", 0),
        ("two  words", "two\nwords", 1),
        ("caf\u00e9", "cafe\u0301", 1),
        ("", "x", 0),
    ],
    "contains": [
        ("It is Paris, of course", "Paris", 1),
        ("It is paris", "Paris", 0),
        ("a  b c", "b c", 1),
        ("", "x", 0),
    ],
    # 4 and 5 words, a longest common subsequence of 4: precision 1, recall 0.8.
    "rouge": [
        ("the cat sat here", "the cat sat down here", 2 * 1 * 0.8 / 1.8),
        ("The CAT!", "the cat", 1),
        ("dog", "cat", 0),
    ],
    # SQuAD drops articles: 1 word of 2 and 1 of 1 in common.
    "f1": [
        ("the big cat", "a cat", 2 * 0.5 * 1 / 1.5),
        ("Cat.", "cat", 1),
        ("dog", "cat", 0),
    ],
}


@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric != "perplexity"])
def test_rows(metric: Metric) -> None:
    answers, references, expected = zip(*ANSWERS[metric], strict=True)
    assert score_rows(metric, answers, references).tolist() == pytest.approx(list(expected), abs=1e-6)
