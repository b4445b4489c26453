"""A real Prometheus scrapes a real broker, and answers every query of the dashboard."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.ports import free_port
from tests.deploy.dashboards import expressions
from tests.scripted.actor import ScriptedActor
from tests.scripted.broker import running_broker, scripted_recipe
from tests.scripted.learner import ScriptedLearner

CONFIGURATION = Path(__file__).resolve().parents[2] / "deploy" / "grafana" / "prometheus.yml"
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no prometheus here (tests/slurm/install.sh installs it)"
)
pytestmark = [pytest.mark.slurm, needs_prometheus]
SERVICE_UNAVAILABLE = 503
SCRIPTED = ("slipstream_learner", "slipstream_eval", "slipstream_telemetry")


@pytest.fixture(scope="module")
def broker_port(tmp_path_factory) -> Iterator[int]:
    """Metrics port of a broker whose run goes on."""
    recipe = scripted_recipe(tmp_path_factory.mktemp("run"), run={"steps": 100000}, data={"count": 20000})
    with running_broker(recipe) as address:
        peers = [
            ScriptedActor(address, "actor-0"),
            ScriptedLearner(address, recipe.folder / "checkpoint.json", step_s=0.05),
        ]
        threads = [threading.Thread(target=peer.run, daemon=True) for peer in peers]
        for thread in threads:
            thread.start()
        yield json.loads((recipe.folder / "broker.json").read_text())["metrics_port"]
        for peer, thread in zip(peers, threads, strict=True):
            peer.stop()
            thread.join(10)


@pytest.fixture(scope="module")
def prometheus(broker_port: int, tmp_path_factory) -> Iterator[str]:
    """URL of a Prometheus with the shipped configuration, its port and pace changed."""
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    text = CONFIGURATION.read_text().replace("9464", str(broker_port)).replace("5s", "1s")
    (folder / "prometheus.yml").write_text(text)
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, "sum(slipstream_run)")
        yield url
    finally:
        process.terminate()
        process.wait(10)


def query(url: str, expression: str) -> list:
    """Result of an instant query.

    Raises:
        urllib.error.HTTPError: Prometheus does not accept the expression.
    """
    text = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"{url}/api/v1/query?{text}", timeout=10) as reply:
        return json.load(reply)["data"]["result"]


def wait_for(url: str, expression: str) -> None:
    """Wait until Prometheus has something for an expression.

    A series is not there at every moment: a rate wants two scrapes, and a step during which no group arrived says
    nothing of lengths.

    Raises:
        urllib.error.HTTPError: Prometheus does not accept the expression.
    """
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if query(url, expression):
                return
        except urllib.error.HTTPError as error:
            if error.code != SERVICE_UNAVAILABLE:  # which it is until it has started
                raise
        except OSError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"Prometheus has nothing for {expression}")


@pytest.mark.parametrize("expression", expressions())
def test_prometheus_answers_the_panel(prometheus: str, expression: str):
    expression = expression.replace("$instance", ".*")
    if any(name in expression for name in SCRIPTED):
        query(prometheus, expression)
    else:  # a broker with peers at work shows something in every panel
        wait_for(prometheus, expression)


def test_the_target_is_up(prometheus: str):
    assert [series["value"][1] for series in query(prometheus, 'up{job="slipstream"}')] == ["1"]


def test_promtool_accepts_the_shipped_configuration():
    if shutil.which("promtool") is None:
        pytest.skip("no promtool here")
    done = subprocess.run(
        ["promtool", "check", "config", str(CONFIGURATION)], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout
