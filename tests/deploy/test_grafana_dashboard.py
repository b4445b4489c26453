"""Every query of the dashboard selects series that a real broker's metrics page has."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from contextlib import suppress

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.deploy.dashboards import DASHBOARD, expressions, panels, selectors
from tests.scripted.actor import ScriptedActor
from tests.scripted.broker import running_broker, scripted_recipe
from tests.scripted.learner import ScriptedLearner
from tests.scripted.wait import until

# Reported by real learners, evaluations and GPUs, which are not here; a run's own log says which names there are.
ELSEWHERE = {"slipstream_learner", "slipstream_eval", "slipstream_telemetry"}


def page_of(folder) -> list:
    """The samples of the metrics page of the broker that serves a folder."""
    port = json.loads((folder / "broker.json").read_text())["metrics_port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as reply:
        page = reply.read().decode()
    return [sample for family in text_string_to_metric_families(page) for sample in family.samples]


def selecting_nothing(samples) -> list[str]:
    """Selectors of the dashboard for which there is no sample."""
    missing = []
    for name, labels in selectors():
        chosen = (
            sample
            for sample in samples
            if sample.name == name
            and all(pattern.fullmatch(sample.labels.get(label, "")) for label, pattern in labels.items())
        )
        if name not in ELSEWHERE and not any(chosen):
            missing.append(f"{name}{labels}")
    return missing


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list:
    """Samples of the page, one of each series that a few steps bring.

    A series is not there at every moment: a step during which no group arrived says nothing of lengths.
    """
    recipe = scripted_recipe(tmp_path_factory.mktemp("run"), run={"steps": 1000}, data={"count": 4000})
    with running_broker(recipe) as address:
        peers = [
            ScriptedActor(address, "actor-0"),
            ScriptedLearner(address, recipe.folder / "checkpoint.json"),
        ]
        threads = [threading.Thread(target=peer.run, daemon=True) for peer in peers]
        for thread in threads:
            thread.start()
        seen: dict = {}

        def all_seen() -> bool:
            seen.update({(s.name, *sorted(s.labels.items())): s for s in page_of(recipe.folder)})
            return not selecting_nothing(seen.values()) and ("slipstream_learner", ("name", "reward")) in seen

        with suppress(AssertionError):  # a test says what was never seen
            until(all_seen, every=0.1)
        for peer, thread in zip(peers, threads, strict=True):
            peer.stop()
            thread.join(10)
    return list(seen.values())


def test_every_query_selects_something(samples):
    assert not selecting_nothing(samples)


def test_labels_of_reported_metrics_exist(samples):
    known = {sample.name: set(sample.labels) for sample in samples}
    for name, labels in selectors():
        if name in known:
            assert set(labels) <= known[name] | {"le"}, name
    assert known["slipstream_learner"] == {"name"}


def test_every_number_of_the_page_is_shown(samples):
    """A metric that nobody looks at is either not worth having or missing from the dashboard."""
    asked = {name for name, _ in selectors()}
    histograms = re.compile(r"_(bucket|count|sum|created)$")
    shown = {histograms.sub("", name) for name in asked}
    page = {histograms.sub("", sample.name) for sample in samples if sample.name.startswith("slipstream_")}
    assert page <= shown


def test_panels_say_what_they_show():
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids))
    for panel in panels():
        assert panel["title"], panel["id"]
        assert panel["description"].endswith("."), panel["title"]
    assert all("$instance" in expression for expression in expressions())
    assert json.loads(DASHBOARD.read_text())["uid"] == "slipstream"
