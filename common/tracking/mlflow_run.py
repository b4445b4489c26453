"""One MLflow run: found or made, and what is put into it.

Invariant: every method may be repeated without a trace, because an answer that never came says nothing about
whether the server did what was asked: a run is found again by its token, MLflow keeps equal points once (same
name, step, value and time), parameters are written once, files are replaced.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

TOKEN_TAG = "slipstream.token"
METRICS_AT_ONCE, PARAMS_AT_ONCE, VALUE_LENGTH = 1000, 100, 6000  # limits of MLflow's API
TIMEOUT_S = 20
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development"
}  # the page for training, not for agents


def connect(uri: str) -> MlflowClient:
    """A client that gives up soon: whoever delivers comes again anyway, and a hung server must not hold it."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(TIMEOUT_S))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


class MlflowRun:
    """A run in an MLflow store; every method raises whatever MLflow raises when the store is away."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client, self.run_id = client, run_id

    @classmethod
    def find_or_create(
        cls,
        client: MlflowClient,
        experiment: str,
        name: str,
        token: str,
        *,
        started: float | None = None,
        artifacts: str | None = None,
    ) -> MlflowRun:
        """The run with this token, made if absent.

        Args:
            client: of the store.
            experiment: made if absent.
            name: of the run.
            token: names the run for good.
            started: time since the epoch, in seconds; now by default.
            artifacts: where a new experiment keeps its files; the server's choice by default.
        """
        found = client.get_experiment_by_name(experiment)
        if found is None:
            number = client.create_experiment(experiment, artifact_location=artifacts, tags=EXPERIMENT_TAGS)
        else:
            number = found.experiment_id
        runs = client.search_runs([number], f"tags.`{TOKEN_TAG}` = '{token}'", max_results=1)
        if runs:
            return cls(client, runs[0].info.run_id)
        start = None if started is None else int(started * 1000)
        run = client.create_run(number, start_time=start, run_name=name, tags={TOKEN_TAG: token})
        return cls(client, run.info.run_id)

    def url(self, uri: str) -> str | None:
        """Where a browser shows the run; None where the store is a database without a server."""
        if not uri.startswith(("http://", "https://")):
            return None
        experiment = self._client.get_run(self.run_id).info.experiment_id
        return f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{self.run_id}/model-metrics"

    def reopen(self) -> None:
        """A run that goes on is running."""
        self._client.update_run(self.run_id, status="RUNNING")

    def log_metrics(self, metrics: Sequence[Metric]) -> None:
        """Points; equal ones are kept once."""
        for some in _pieces(metrics, METRICS_AT_ONCE):
            self._client.log_batch(self.run_id, metrics=some)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Parameters. MLflow never changes one: what a resumed run changed goes into tags `resumed.KEY`."""
        from mlflow.entities import Param

        known = self._client.get_run(self.run_id).data.params
        wanted = {key: str(value)[:VALUE_LENGTH] for key, value in values.items()}
        new = [Param(key, value) for key, value in wanted.items() if key not in known]
        for some in _pieces(new, PARAMS_AT_ONCE):
            self._client.log_batch(self.run_id, params=some)
        changed = {key: value for key, value in wanted.items() if known.get(key, value) != value}
        self.set_tags({f"resumed.{key}": value for key, value in changed.items()})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tags; those of the same name are replaced."""
        from mlflow.entities import RunTag

        listed = [RunTag(key, value[:5000]) for key, value in tags.items()]
        for some in _pieces(listed, PARAMS_AT_ONCE):
            self._client.log_batch(self.run_id, tags=some)

    def put_file(self, path: Path) -> None:
        """A file of the run folder, if it exists."""
        if path.exists():
            self._client.log_artifact(self.run_id, str(path))

    def put_text(self, name: str, text: str, *, table: bool) -> None:
        """A file with this content; a table is announced as one, so that MLflow shows it as one."""
        self._client.log_text(self.run_id, text, name)
        if not table:
            return
        announced = self._client.get_run(self.run_id).data.tags.get("mlflow.loggedArtifacts", "[]")
        entry, entries = {"path": name, "type": "table"}, json.loads(announced)
        if entry not in entries:
            self.set_tags({"mlflow.loggedArtifacts": json.dumps([*entries, entry])})

    def close(self, status: str, ended: float) -> None:
        """The run is over since `ended` (seconds since the epoch): FINISHED, KILLED or FAILED."""
        self._client.set_terminated(self.run_id, status, end_time=int(ended * 1000))


T = TypeVar("T")


def _pieces(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The items, so many at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
