"""Deliver the spool of a run to MLflow, from a process of its own.

Invariant: every complete line of the spool reaches one MLflow run, in order, and counts there once, whatever is
killed, hangs or is away in between. How far it came is written down after MLflow's answer; what was sent and not
answered is sent again, and MLflow keeps equal points once (`common.tracking.mlflow_run`).

Nothing here can disturb training: it runs at low priority, reads only files, and no worker waits for it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.run_files import SPOOL
from common.tracking.catalogue import full_name
from common.tracking.delivery import Delivery, one_line, without_password
from common.tracking.mlflow_run import MlflowRun, connect
from common.tracking.spool import Record, read_spool
from common.tracking.tables import Tables, flatten, is_table

log = logging.getLogger("slipstream.tracking")

POLL_S = 1.0
RETRY_S = 5.0
BATCH = 100
PATIENCE_S = 30.0
NOT_METRICS = ("run", "samples", "event", "end")
INTERRUPTED = "interrupted"
STATUS = {"finished": "FINISHED", "stopped": "KILLED", INTERRUPTED: "KILLED", "failed": "FAILED"}


def tracking_uri(uri: str | None, root: Path) -> str:
    """The MLflow store of a recipe: `tracking.uri`, else $MLFLOW_TRACKING_URI, else SQLite beside the run folders."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(root / 'mlflow.db').resolve()}"


class Shipper:
    """Delivers one run folder's `metrics.jsonl`.

    Args:
        folder: the run folder.
        uri: MLflow store; see `tracking_uri`.
        experiment: MLflow experiment, made when absent.
        run_name: name of the MLflow run.
        tags: of the MLflow run.
        files: of the run folder, uploaded when the run begins or goes on.
    """

    def __init__(
        self,
        folder: Path,
        uri: str,
        experiment: str,
        run_name: str,
        *,
        tags: Mapping[str, str] | None = None,
        files: Sequence[Path] = (),
    ) -> None:
        self.folder, self.uri, self.experiment, self.run_name = folder, uri, experiment, run_name
        self.spool = folder / SPOOL
        self._tags, self._files = dict(tags or {}), files
        self._delivery = Delivery.load(folder)
        if self._delivery.uri not in ("", uri):  # another store knows nothing of what this one was sent
            self._delivery = Delivery()
        self._delivery.uri = uri
        self._save_if_possible()
        self._run: MlflowRun | None = None
        self._tables = Tables()
        self._last: Record | None = None  # that was delivered
        self._size = BATCH  # records sent at a time

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run, once there is one."""
        return self._delivery.mlflow_run

    @property
    def url(self) -> str | None:
        """Where a browser shows the run; None before there is one, or without a server."""
        return self._delivery.url

    @property
    def shown_uri(self) -> str:
        """The store, without a password."""
        return without_password(self.uri)

    def deliver(self) -> Record | None:
        """Deliver what is new; returns the run's `end` record once it has been delivered.

        Raises:
            Exception: whatever MLflow raises when its store cannot be reached; nothing is lost, call again.
        """
        run = self._run or self._open()
        batch: list[Record] = []
        for record in read_spool(self.spool, self._delivery.offset):
            batch.append(record)
            if len(batch) >= self._size:
                self._send(run, batch)
                batch = []
        self._send(run, batch)
        self._upload(run)
        # A run that was stopped and resumed has an earlier `end` too: only one that nothing follows counts.
        return self._last if self._last is not None and self._last.kind == "end" else None

    def finish(self, end: Record, files: Iterable[Path]) -> None:
        """Upload the final files and close the MLflow run."""
        run = self._run or self._open()
        for path in files:
            run.put_file(path)
        run.close(STATUS.get(str(end.values.get("status")), "FINISHED"), end.time)

    def note(self, error: Exception | None) -> None:
        """Write down why MLflow takes nothing, or that it does again; said once in the log."""
        before, self._delivery.error = self._delivery.error, None if error is None else one_line(error)
        if self._delivery.error == before:
            return
        self._save_if_possible()
        if error is None:
            log.info("MLflow at %s takes points again", self.shown_uri)
        elif before is None:
            log.warning(
                "MLflow at %s takes nothing; points are kept and sent later: %s",
                self.shown_uri,
                self._delivery.error,
            )

    def _save_if_possible(self) -> None:
        """A full disk, where the error came from perhaps, ends no tracking: the next delivery saves again."""
        with suppress(OSError):
            self._delivery.save(self.folder)

    def _open(self) -> MlflowRun:
        """Connect; find or make the run; what belongs to its beginning."""
        delivery, client = self._delivery, connect(self.uri)
        if delivery.mlflow_run is None:
            first = next(read_spool(self.spool), None)
            run = MlflowRun.find_or_create(
                client,
                self.experiment,
                self.run_name,
                delivery.token,
                started=first.time if first else None,
                artifacts=self._local_artifacts(),
            )
        else:
            run = MlflowRun(client, delivery.mlflow_run)
            run.reopen()
        delivery.mlflow_run, delivery.url = run.run_id, run.url(self.shown_uri)
        delivery.save(self.folder)
        run.set_tags(self._tags)
        for path in self._files:
            run.put_file(path)
        self._tables = Tables()
        for record in read_spool(self.spool):
            if record.offset > delivery.offset:
                break
            self._tables.add(record)
            self._last = record
        log.info("MLflow run %s: %s", run.run_id, delivery.url or self.shown_uri)
        self._run = run
        return run

    def _local_artifacts(self) -> str | None:
        # A server knows where its artifacts go; a local store would put them in the working directory.
        if not self.uri.startswith("sqlite:///"):
            return None
        return (Path(self.uri.removeprefix("sqlite:///")).parent / "mlartifacts" / self.experiment).as_uri()

    def _send(self, run: MlflowRun, batch: Sequence[Record]) -> None:
        """Send a batch; one that a slow server did not take in time is sent in halves the next time."""
        if not batch:
            return
        size, self._size = self._size, max(1, self._size // 2)
        self._send_whole(run, batch)
        self._size = min(BATCH, 2 * size)

    def _send_whole(self, run: MlflowRun, batch: Sequence[Record]) -> None:
        run.log_metrics([metric for record in batch for metric in _metrics(record)])
        for record in batch:
            if record.kind == "run":
                run.log_params(flatten(record.values.get("recipe", {})))
        for record in batch:
            self._tables.add(record)
        self._last = batch[-1]
        self._delivery.offset = batch[-1].offset
        self._delivery.save(self.folder)

    def _upload(self, run: MlflowRun) -> None:
        for name, text in self._tables.changed().items():
            run.put_text(name, text, table=is_table(name))
            self._tables.uploaded(name)


def ship_until_end(
    shipper: Shipper,
    finalise: Callable[[Record], list[Path]],
    *,
    patience_s: float = PATIENCE_S,
    interrupted: Callable[[], bool] = lambda: False,
) -> bool:
    """Deliver until the run's end and what is written then; True when MLflow has everything.

    While the run goes on, an outage is waited out for ever; after its end for at most `patience_s` seconds.

    Args:
        shipper: what to deliver.
        finalise: called once with the end record, whether or not MLflow answers; returns the files to upload.
        patience_s: seconds to go on trying after the end.
        interrupted: whether nobody is left who could write an end; see `SpoolEnd.or_interruption`.
    """
    spool = SpoolEnd(shipper.spool)
    end: Record | None = None
    files: list[Path] | None = None
    ended_at = 0.0
    while True:
        if files is None and (end := spool.or_interruption(interrupted)) is not None:
            files, ended_at = _final_files(finalise, end), time.monotonic()
        delivered = _try(shipper, end, files)
        if delivered:
            return True
        if files is not None and time.monotonic() - ended_at > patience_s:
            return False
        time.sleep(POLL_S if delivered is False else RETRY_S)


def _final_files(finalise: Callable[[Record], list[Path]], end: Record) -> list[Path]:
    try:
        return finalise(end)
    except OSError as error:  # a full disk: the points are more than the summary of them
        log.warning("the run's summary was not written: %s", error)
        return []


def _try(shipper: Shipper, end: Record | None, files: Sequence[Path] | None) -> bool | None:
    """One attempt: True when all is delivered for good, False when more may come, None when MLflow is away."""
    try:
        delivered = shipper.deliver()
        last = end if end is not None and end.kind == INTERRUPTED else delivered
        if last is not None and files is not None:
            shipper.finish(last, files)
        shipper.note(None)
        return last is not None and files is not None
    except Exception as error:  # MLflow raises whatever its store does; the run must not care
        shipper.note(error)
        return None


class SpoolEnd:
    """Watches a spool for the end of its run, reading each line once."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self._last: Record | None = None

    def end(self) -> Record | None:
        """The `end` record, if it is the last one."""
        for record in read_spool(self._path, self._offset):
            self._last, self._offset = record, record.offset
        return self._last if self._last is not None and self._last.kind == "end" else None

    def or_interruption(self, interrupted: Callable[[], bool]) -> Record | None:
        """The `end` record; or, where there is none and `interrupted()`, a record of kind `INTERRUPTED` in its place."""
        gone = interrupted()  # asked first: an end that is written meanwhile is still found
        if (end := self.end()) is not None or not gone:
            return end
        values = {"status": INTERRUPTED, "reason": "it ended without a word"}
        last = self._last
        return Record(
            self._offset, last.time if last else time.time(), INTERRUPTED, last.step if last else 0, values
        )


def _metrics(record: Record) -> list[Any]:
    from mlflow.entities import Metric

    if record.kind in NOT_METRICS:
        return []
    stamp = int(record.time * 1000)
    return [
        Metric(full_name(record.kind, name), float(value), stamp, record.step)
        for name, value in record.values.items()
        if isinstance(value, int | float)
    ]
