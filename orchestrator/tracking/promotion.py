"""What the registry keeps of a gate: the lines that were checked, the scores, and why it was passed by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from minilm.orchestrator.tracking.registry import DIGEST_TAG, RUN_TAG, RegisteredModel, _patiently

# isort: split
from mlflow import MlflowClient

CHALLENGER = "challenger"
GATE_TAG, FORCED_TAG = "minilm.gate", "minilm.forced"
MAX_TAG_CHARS = 4_000  # MLflow's own limit is 5,000


def record_gate(
    store: str,
    model: RegisteredModel,
    *,
    lines: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, float],
    reason: str | None,
    patience_seconds: float = 10.0,
) -> None:
    """Note on the version what was checked and, where it was passed by, why; log the scores on its logged model, and
    point `challenger` to it. Can be repeated."""
    number = str(model.version)
    tags = {GATE_TAG: json.dumps(list(lines))[:MAX_TAG_CHARS]}
    if reason is not None:
        tags[FORCED_TAG] = reason[:MAX_TAG_CHARS]

    def attempt(client: MlflowClient) -> None:
        for key, value in tags.items():
            client.set_model_version_tag(model.name, number, key, value)
        version = client.get_model_version(model.name, number)
        if version.run_id:  # of a model that somebody else registered there may be none
            logged = _logged_model_id(client, version.run_id, model.digest)
            for metric, score in metrics.items():
                client.log_metric(version.run_id, metric, score, model_id=logged)
        client.set_registered_model_alias(model.name, CHALLENGER, number)

    _patiently(store, attempt, patience_seconds)


def _logged_model_id(client: MlflowClient, run_id: str, digest: str | None) -> str | None:
    """The LoggedModel that `register` made for this folder; not every store's version names it."""
    experiment_id = client.get_run(run_id).info.experiment_id
    query = f"tags.`{DIGEST_TAG}` = '{digest}' and tags.`{RUN_TAG}` = '{run_id}'"
    found = client.search_logged_models([experiment_id], query)
    return found[0].model_id if found else None


def holder(store: str, name: str, alias: str, *, patience_seconds: float = 10.0) -> int | None:
    """The version that an alias names now; None where it names none."""

    def attempt(client: MlflowClient) -> int | None:
        found = client.get_registered_model(name).aliases.get(alias)
        return None if found is None else int(found)

    return _patiently(store, attempt, patience_seconds)
