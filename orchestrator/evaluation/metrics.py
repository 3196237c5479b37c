"""Scores of predictions against labels, as the tasks' authors define them. All are higher for better, at most 1."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, ndcg_score


def _correlation(measure: Callable) -> Callable[[np.ndarray, np.ndarray], float]:
    def score(labels: np.ndarray, predicted: np.ndarray) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            value = float(measure(predicted, labels).statistic)
        return (
            0.0 if np.isnan(value) else value
        )  # undefined where all predictions are one: no better than chance

    return score


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda labels, predicted: float(accuracy_score(labels, predicted)),
    "f1": lambda labels, predicted: float(f1_score(labels, predicted, zero_division=0.0)),
    "matthews": lambda labels, predicted: float(matthews_corrcoef(labels, predicted)),
    "ndcg_at_10": lambda grades, found: float(ndcg_score(grades[None], found[None], k=10)),
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
}


def score(names: tuple[str, ...], labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """The metrics `names` of predictions [rows]: classes, or real numbers where labels are."""
    return {name: METRICS[name](labels, predicted) for name in names}
