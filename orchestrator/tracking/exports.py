"""What the registry keeps of an export: its results as a tag of the version, the score in 8 bits as metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from minilm.orchestrator.tracking.promotion import MAX_TAG_CHARS, Metric, record_scores
from minilm.orchestrator.tracking.registry import RegisteredModel, _patiently

# isort: split
from mlflow import MlflowClient

EXPORT_TAG = "minilm.export."  # and the format


def record_export(
    store: str,
    model: RegisteredModel,
    format: str,
    results: Mapping[str, Any],
    metrics: Sequence[Metric] = (),
    *,
    patience_seconds: float = 10.0,
) -> None:
    """Note on the version what an export to `format` has checked and measured, in place of an earlier one's. Can be
    repeated. results: values of JSON; their "latency" is left out where a tag has no room for it."""
    text = json.dumps(results)
    if len(text) > MAX_TAG_CHARS:
        text = json.dumps({key: value for key, value in results.items() if key != "latency"})

    def attempt(client: MlflowClient) -> None:
        client.set_model_version_tag(model.name, str(model.version), f"{EXPORT_TAG}{format}", text)

    _patiently(store, attempt, patience_seconds)
    record_scores(store, model, metrics, patience_seconds=patience_seconds)
