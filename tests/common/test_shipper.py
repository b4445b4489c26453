"""Points reach a real MLflow store once each, across outages, crashes and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from common.tracking import shipper as sh
from common.tracking.delivery import Delivery, tracking_view, without_password
from common.tracking.mlflow_run import MlflowRun
from common.tracking.spool import Record, Spool


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "metrics.jsonl")


def shipper(folder: Path, uri: str) -> sh.Shipper:
    return sh.Shipper(folder, uri, "tests", folder.name)


def history(uri: str, run: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in MlflowClient(uri).get_metric_history(run, name)]


def table(uri: str, run: str, name: str) -> list[dict]:
    text = Path(MlflowClient(uri).download_artifacts(run, name)).read_text()
    loaded = json.loads(text)
    return [dict(zip(loaded["columns"], row, strict=True)) for row in loaded["data"]]


def test_a_run_is_delivered_whole_and_a_resumed_one_continues_it(
    tmp_path: Path, store: str, spool: Spool
) -> None:
    spool.append("run", 0, {"recipe": {"learner": {"lr": 1e-6}, "run": {"name": "x", "steps": 2}}})
    spool.append("learner", 0, {"reward": 0.25, "text": "ignored"})
    spool.append("broker", 0, {"buffered": 3})
    spool.append("samples", 0, {"rows": [{"question": "1+1", "reward": 1.0, "versions": [[0, 3]]}]})
    spool.append("eval", 0, {"pass1": 0.5, "a/pass1": 0.25, "b/pass1": 0.75})
    spool.append("event", 0, {"text": "actor-0 joined", "warning": False})
    first = shipper(tmp_path, store)
    assert first.deliver() is None
    spool.append("end", 1, {"status": "stopped"})
    end = first.deliver()
    assert isinstance(end, Record)
    summary = tmp_path / "summary.json"
    summary.write_text("{}")
    first.finish(end, [summary])
    closed = MlflowClient(store).get_run(first.run_id).info
    assert (closed.status, closed.end_time) == ("KILLED", int(end.time * 1000))
    assert 0 <= closed.end_time - closed.start_time < 60_000, "the run's own time, not that of the delivery"

    spool.append("run", 1, {"recipe": {"learner": {"lr": 1e-6}, "run": {"name": "x", "steps": 9}}})
    spool.append("learner", 1, {"reward": 0.5})
    spool.append("samples", 1, {"rows": [{"question": "1+2", "reward": 0.0}]})
    second = shipper(tmp_path, store)
    assert second.deliver() is None, "an end that a resume follows is not the end"
    run = second.run_id
    assert run == first.run_id
    assert history(store, run, "learner/reward") == [(0, 0.25), (1, 0.5)]
    assert history(store, run, "broker/buffered") == [(0, 3.0)]
    assert history(store, run, "eval/a/pass1") == [(0, 0.25)]
    found = MlflowClient(store).get_run(run)
    assert found.data.params["learner.lr"] == "1e-06"
    assert (found.data.params["run.steps"], found.data.tags["resumed.run.steps"]) == ("2", "9")
    assert found.info.status == "RUNNING"
    names = {a.path for a in MlflowClient(store).list_artifacts(run)}
    assert {"summary.json", "samples.json", "evaluations.json", "events.txt"} <= names
    assert [(row["step"], row["question"]) for row in table(store, run, "samples.json")] == [
        (0, "1+1"),
        (1, "1+2"),
    ]
    assert [(row["set"], row["pass1"]) for row in table(store, run, "evaluations.json")] == [
        ("all", 0.5),
        ("a", 0.25),
        ("b", 0.75),
    ]
    shown = json.loads(found.data.tags["mlflow.loggedArtifacts"])
    assert sorted(entry["path"] for entry in shown) == ["evaluations.json", "samples.json"]


def test_what_was_sent_and_not_answered_counts_once(tmp_path: Path, store: str, spool: Spool) -> None:
    """A crash after MLflow took a batch and before it was written down: the batch is sent again."""
    spool.append("run", 0, {"recipe": {"a": 1}})
    for step in range(3):
        spool.append("learner", step, {"reward": step / 4})
        spool.append("samples", step, {"rows": [{"n": step}]})
    one = shipper(tmp_path, store)
    one.deliver()
    memory = Delivery.load(tmp_path)
    memory.offset = 0
    memory.save(tmp_path)
    two = shipper(tmp_path, store)
    two.deliver()
    assert history(store, two.run_id, "learner/reward") == [(0, 0.0), (1, 0.25), (2, 0.5)]
    assert [row["n"] for row in table(store, two.run_id, "samples.json")] == [0, 1, 2]


def test_a_run_whose_creation_was_never_answered_is_found(tmp_path: Path, store: str, spool: Spool) -> None:
    spool.append("learner", 0, {"reward": 1.0})
    one = shipper(tmp_path, store)
    token = Delivery.load(tmp_path).token
    lost = MlflowRun.find_or_create(MlflowClient(store), "tests", tmp_path.name, token)
    one.deliver()
    assert one.run_id == lost.run_id


def test_another_store_gets_everything(tmp_path: Path, store: str, spool: Spool) -> None:
    spool.append("learner", 0, {"reward": 1.0})
    shipper(tmp_path, store).deliver()
    other = f"sqlite:///{tmp_path / 'other.db'}"
    again = shipper(tmp_path, other)
    again.deliver()
    assert history(other, again.run_id, "learner/reward") == [(0, 1.0)]


def test_the_end_is_found_whenever_it_comes(tmp_path: Path, store: str, spool: Spool) -> None:
    """The end was delivered before its files existed, or MLflow went away in between."""
    spool.append("end", 1, {"status": "failed"})
    one = shipper(tmp_path, store)
    assert one.deliver() is not None
    assert sh.ship_until_end(shipper(tmp_path, store), lambda end: [])
    assert MlflowClient(store).get_run(one.run_id).info.status == "FAILED"


def test_an_outage_keeps_points_and_is_said(
    tmp_path: Path, store: str, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sh, "RETRY_S", 0.01)
    monkeypatch.setattr(sh, "POLL_S", 0.01)
    spool.append("learner", 0, {"reward": 1.0})
    spool.append("end", 1, {"status": "finished"})
    one = shipper(tmp_path, store)
    seen: list[dict] = []
    send = MlflowRun.log_metrics

    def flaky(run: MlflowRun, metrics: list) -> None:
        if len(seen) < 3:
            seen.append(tracking_view(tmp_path))
            raise ConnectionError("away\nfor a while")
        send(run, metrics)

    monkeypatch.setattr(MlflowRun, "log_metrics", flaky)
    finalised: list[Record] = []

    def finalise(end: Record) -> list[Path]:
        finalised.append(end)
        return []

    assert sh.ship_until_end(one, finalise)
    assert len(finalised) == 1
    assert history(store, one.run_id, "learner/reward") == [(0, 1.0)]
    assert MlflowClient(store).get_run(one.run_id).info.status == "FINISHED"
    assert [view["error"] for view in seen] == [None, "ConnectionError: away", "ConnectionError: away"]
    assert all(view["points_behind"] == 2 and view["seconds_behind"] > 0 for view in seen)
    after = tracking_view(tmp_path)
    assert (after["points_behind"], after["seconds_behind"], after["error"]) == (0, 0.0, None)


def test_a_slow_store_gets_less_at_a_time(
    tmp_path: Path, store: str, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that always takes too long would otherwise be sent again for ever."""
    monkeypatch.setattr(sh, "RETRY_S", 0.001)
    for step in range(30):
        spool.append("learner", step, {"reward": step / 4})
    spool.append("end", 30, {"status": "finished"})
    send = MlflowRun.log_metrics

    def slow(run: MlflowRun, metrics: list) -> None:
        if len(metrics) > 4:
            raise TimeoutError("read timed out")
        send(run, metrics)

    monkeypatch.setattr(MlflowRun, "log_metrics", slow)
    one = shipper(tmp_path, store)
    assert sh.ship_until_end(one, lambda end: [])
    assert history(store, one.run_id, "learner/reward") == [(step, step / 4) for step in range(30)]


def test_a_store_that_never_answers_is_given_up_after_the_end(
    tmp_path: Path, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sh, "RETRY_S", 0.01)
    spool.append("end", 1, {"status": "finished"})
    (tmp_path / "file").write_text("")
    one = shipper(tmp_path, f"sqlite:///{tmp_path}/file/mlflow.db")
    finalised: list[Record] = []
    assert not sh.ship_until_end(one, lambda end: finalised.append(end) or [], patience_s=0.05)
    assert len(finalised) == 1, "the summary does not wait for MLflow"


def test_a_full_disk_is_waited_out(
    tmp_path: Path, store: str, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot write down how far it came must neither end nor stop delivering."""
    monkeypatch.setattr(sh, "RETRY_S", 0.01)
    monkeypatch.setattr(sh, "POLL_S", 0.01)
    spool.append("learner", 0, {"reward": 1.0})
    spool.append("end", 1, {"status": "finished"})
    save, full = Delivery.save, [None] * 5

    def on_a_full_disk(delivery: Delivery, folder: Path) -> None:
        if full:
            full.pop()
            raise OSError(28, "No space left on device")
        save(delivery, folder)

    monkeypatch.setattr(Delivery, "save", on_a_full_disk)
    one = shipper(tmp_path, store)

    def finalise(end: Record) -> list[Path]:
        raise OSError(28, "No space left on device")

    assert sh.ship_until_end(one, finalise)
    assert history(store, one.run_id, "learner/reward") == [(0, 1.0)]
    assert MlflowClient(store).get_run(one.run_id).info.status == "FINISHED"


def test_passwords_are_not_shown() -> None:
    assert without_password("https://me:secret@host:5000/x") == "https://host:5000/x"
    assert without_password("sqlite:////a/b.db") == "sqlite:////a/b.db"
