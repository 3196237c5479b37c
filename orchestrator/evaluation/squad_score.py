"""SQuAD 2.0's scores, as its official script (evaluate-v2.0.py) computes them: exact match and F1 of words, and the
threshold on "no answer" that is best for each. Scores are from 0 to 1.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation and articles, one space between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(gold: str, predicted: str) -> float:
    return float(normalize_answer(gold) == normalize_answer(predicted))


def f1(gold: str, predicted: str) -> float:
    """Of the bags of words; 1 where both are empty, 0 where one is."""
    one, other = normalize_answer(gold).split(), normalize_answer(predicted).split()
    if not one or not other:
        return float(one == other)
    same = sum((Counter(one) & Counter(other)).values())
    return 2 * same / (len(one) + len(other))


def score_squad(
    answers: Mapping[str, Sequence[str]], predicted: Mapping[str, str], no_answer: Mapping[str, float]
) -> dict[str, float]:
    """f1 and exact at their best thresholds, by question id.

    answers: the accepted ones, none where the passage has no answer. predicted: the best answer that is not empty.
    no_answer: how much the model prefers none; above the threshold its answer counts as none.
    """
    gold = {i: [text for text in texts if normalize_answer(text)] or [""] for i, texts in answers.items()}
    return {
        name: _best(measure, gold, predicted, no_answer) for name, measure in (("f1", f1), ("exact", exact))
    }


def _best(
    measure: Callable[[str, str], float],
    gold: Mapping[str, Sequence[str]],
    predicted: Mapping[str, str],
    no_answer: Mapping[str, float],
) -> float:
    """The best sum over thresholds: each question, surest of an answer first, changes from "none" to its answer."""
    current = best = float(sum(texts == [""] for texts in gold.values()))
    for number in sorted(no_answer, key=no_answer.__getitem__):
        if gold[number] == [""]:
            current -= 1.0 if predicted[number] else 0.0
        else:
            current += max(measure(text, predicted[number]) for text in gold[number])
        best = max(best, current)
    return best / len(gold)
