"""What the registry keeps of a gate: the lines that were checked, the scores, and why it was passed by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minilm.orchestrator.tracking.registry import RegisteredModel, _patiently, find_logged_model

# isort: split
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag

CHALLENGER = "challenger"
GATE_TAG, FORCED_TAG = "minilm.gate", "minilm.forced"
MAX_DIGEST_CHARS = 36  # of a data set, by MLflow
MAX_TAG_CHARS = 4_000  # MLflow's own limit is 5,000


@dataclass(frozen=True)
class Metric:
    """A score as MLflow keeps it: of which data, by name and digest."""

    name: str
    value: float
    dataset: str
    dataset_digest: str


def record_scores(
    store: str, model: RegisteredModel, metrics: Sequence[Metric], *, patience_seconds: float = 10.0
) -> None:
    """Log scores on the version's logged model and its run, with their data sets as inputs. Can be repeated."""
    number = str(model.version)

    def attempt(client: MlflowClient) -> None:
        version = client.get_model_version(model.name, number)
        if not version.run_id or not metrics:  # of a model that somebody else registered there may be none
            return
        logged = find_logged_model(client, version.run_id, model.digest)
        known = {(m.key, m.value) for m in (logged.metrics or ())} if logged else set()
        inputs = {
            (m.dataset, m.dataset_digest[:MAX_DIGEST_CHARS]): DatasetInput(
                Dataset(m.dataset, m.dataset_digest[:MAX_DIGEST_CHARS], "minilm", "{}"),
                [InputTag("mlflow.data.context", "evaluation")],
            )
            for m in metrics
        }
        client.log_inputs(version.run_id, list(inputs.values()))
        for m in metrics:
            if (m.name, m.value) not in known:
                client.log_metric(
                    version.run_id,
                    m.name,
                    m.value,
                    dataset_name=m.dataset,
                    dataset_digest=m.dataset_digest[:MAX_DIGEST_CHARS],
                    model_id=logged.model_id if logged else None,
                )

    _patiently(store, attempt, patience_seconds)


def record_gate(
    store: str,
    model: RegisteredModel,
    *,
    lines: Sequence[Mapping[str, Any]],
    reason: str | None,
    patience_seconds: float = 10.0,
) -> None:
    """Note on the version what was checked and, where it was passed by, why; point `challenger` to it. Can be
    repeated."""
    number = str(model.version)
    text = json.dumps(list(lines))
    if len(text) > MAX_TAG_CHARS:  # the numbers alone: a part of JSON is none
        text = json.dumps([{key: value for key, value in line.items() if key != "text"} for line in lines])
    tags = {GATE_TAG: text} if lines else {}  # none are checked where the candidate is champion already
    if reason is not None:
        tags[FORCED_TAG] = reason[:MAX_TAG_CHARS]

    def attempt(client: MlflowClient) -> None:
        for key, value in tags.items():
            client.set_model_version_tag(model.name, number, key, value)
        client.set_registered_model_alias(model.name, CHALLENGER, number)

    _patiently(store, attempt, patience_seconds)


def holder(store: str, name: str, alias: str, *, patience_seconds: float = 10.0) -> int | None:
    """The version that an alias names now; None where it names none."""

    def attempt(client: MlflowClient) -> int | None:
        found = client.get_registered_model(name).aliases.get(alias)
        return None if found is None else int(found)

    return _patiently(store, attempt, patience_seconds)
