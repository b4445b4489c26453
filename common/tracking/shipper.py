"""Deliver the spool of a run to MLflow, from a process of its own.

Invariant: every complete line of the spool reaches the MLflow run, in order; what was delivered is remembered
beside the spool, so that an outage, a crash or a resume neither loses points nor opens a second MLflow run.
A point may be delivered twice after a crash (MLflow keeps both, equal): at least once, never not.

Nothing here can disturb training: it runs at low priority, reads only files, and no worker waits for it.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.tracking.spool import Record, read_spool

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("slipstream.tracking")

POLL_S = 1.0
RETRY_S = 5.0
BATCH = 500
PARAM_LENGTH = 6000
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


def tracking_uri(uri: str | None, root: Path) -> str:
    """The MLflow store of a recipe: `tracking.uri`, or an SQLite store beside the run folders."""
    return uri or f"sqlite:///{(root / 'mlflow.db').resolve()}"


class Shipper:
    """Delivers one run folder's `metrics.jsonl`.

    Args:
        folder: the run folder.
        uri: MLflow store; see `tracking_uri`.
        experiment: MLflow experiment, made when absent.
        run_name: name of the MLflow run.
    """

    def __init__(self, folder: Path, uri: str, experiment: str, run_name: str) -> None:
        self.folder, self.uri, self.experiment, self.run_name = folder, uri, experiment, run_name
        self.spool = folder / "metrics.jsonl"
        self._memory = folder / "tracking.json"
        self._run_id, self._offset = self._remembered()
        self._client: MlflowClient | None = None

    def deliver(self) -> Record | None:
        """Deliver what is new; returns the run's `end` record once it has been delivered.

        Raises:
            Exception: whatever MLflow raises when its store cannot be reached; nothing is lost, call again.
        """
        client = self._connect()
        batch: list[Record] = []
        last: Record | None = None
        for last in read_spool(self.spool, self._offset):
            batch.append(last)
            if len(batch) >= BATCH:
                self._send(client, batch)
                batch = []
        self._send(client, batch)
        # A run that was stopped and resumed has an earlier `end` too: only one that nothing follows counts.
        return last if last is not None and last.kind == "end" else None

    def finish(self, end: Record, files: Iterable[Path]) -> None:
        """Upload the final files and close the MLflow run."""
        client = self._connect()
        for path in files:
            if path.exists():
                client.log_artifact(self._run_id, str(path))
        client.set_terminated(self._run_id, STATUS.get(str(end.values.get("status")), "FINISHED"))

    def _connect(self) -> MlflowClient:
        if self._client is None:
            from mlflow import MlflowClient

            client = MlflowClient(tracking_uri=self.uri)
            if self._run_id is None:
                self._run_id = self._create_run(client)
                self._remember()
            else:
                client.update_run(self._run_id, status="RUNNING")
            self._client = client
        return self._client

    def _create_run(self, client: MlflowClient) -> str:
        found = client.get_experiment_by_name(self.experiment)
        experiment_id = (
            found.experiment_id
            if found
            else client.create_experiment(self.experiment, artifact_location=self._local_artifacts())
        )
        return client.create_run(experiment_id, run_name=self.run_name).info.run_id

    def _local_artifacts(self) -> str | None:
        # A server knows where its artifacts go; a local store would put them in the working directory.
        if not self.uri.startswith("sqlite:///"):
            return None
        return (Path(self.uri.removeprefix("sqlite:///")).parent / "mlartifacts" / self.experiment).as_uri()

    def _send(self, client: MlflowClient, batch: list[Record]) -> None:
        if not batch:
            return
        metrics = [metric for record in batch for metric in _metrics(record)]
        for start in range(0, len(metrics), 1000):
            client.log_batch(self._run_id, metrics=metrics[start : start + 1000])
        for record in batch:
            self._send_special(client, record)
        self._offset = batch[-1].offset
        self._remember()

    def _send_special(self, client: MlflowClient, record: Record) -> None:
        if record.kind == "run":
            _log_params(client, self._run_id, record.values.get("recipe", {}))
        elif record.kind == "samples" and record.values.get("rows"):
            rows: list[dict[str, Any]] = record.values["rows"]
            keys = sorted({key for row in rows for key in row})
            table = {
                "step": [record.step] * len(rows),
                **{k: [_cell(row.get(k)) for row in rows] for k in keys},
            }
            client.log_table(self._run_id, table, "samples.json")
        elif record.kind == "event":
            client.set_tag(
                self._run_id, f"event.{int(record.time)}", str(record.values.get("text", ""))[:5000]
            )

    def _remembered(self) -> tuple[str | None, int]:
        try:
            memory = json.loads(self._memory.read_text())
            return memory["mlflow_run"], int(memory["offset"])
        except (OSError, ValueError, KeyError):
            return None, 0

    def _remember(self) -> None:
        temporary = self._memory.with_suffix(".tmp")
        temporary.write_text(
            json.dumps({"mlflow_run": self._run_id, "offset": self._offset, "uri": self.uri})
        )
        os.replace(temporary, self._memory)


def ship_until_end(shipper: Shipper, finalise: Any, *, patience_s: float = 60.0) -> bool:
    """Deliver until the run's end, then finalise and upload; True when everything was delivered.

    While the run goes on, an outage is waited out for ever; after its end for at most `patience_s` seconds.

    Args:
        shipper: what to deliver.
        finalise: called once with the end record; returns the files to upload.
        patience_s: seconds to go on trying after the end.
    """
    complaint, ended_at, end, files = False, None, None, None
    while True:
        try:
            end = end or shipper.deliver()
            if end is not None:
                files = finalise(end) if files is None else files
                shipper.finish(end, files)
                return True
            complaint = False
            time.sleep(POLL_S)
        except Exception as error:  # MLflow raises whatever its store does; the run must not care
            if not complaint:
                log.warning(
                    "MLflow at %s is not reachable; points are kept and sent later: %s", shipper.uri, error
                )
                complaint = True
            if ended_at is None and _has_ended(shipper.spool):
                ended_at = time.monotonic()
            if ended_at is not None and time.monotonic() - ended_at > patience_s:
                return False
            time.sleep(RETRY_S)


def _has_ended(spool: Path) -> bool:
    newest = deque(read_spool(spool), maxlen=1)
    return bool(newest) and newest[0].kind == "end"


def _metrics(record: Record) -> list[Any]:
    from mlflow.entities import Metric

    if record.kind in ("run", "samples", "event", "end"):
        return []
    stamp = int(record.time * 1000)
    return [
        Metric(name if "/" in name else f"{record.kind}/{name}", float(value), stamp, record.step)
        for name, value in record.values.items()
        if isinstance(value, int | float)
    ]


def _log_params(client: MlflowClient, run_id: str | None, recipe: dict[str, Any]) -> None:
    from mlflow.entities import Param

    params = [Param(name, str(value)[:PARAM_LENGTH]) for name, value in _flatten(recipe)]
    for start in range(0, len(params), 100):
        client.log_batch(run_id, params=params[start : start + 100])


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in tree.items():
        flat.extend(
            _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
        )
    return flat


def _cell(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) or value is None else json.dumps(value)
