"""The MLflow page of a finished run, in a real browser: the metrics stand in the groups that docs/metrics.md names."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path

import pytest
from PIL import Image

from common.recipe import Recipe, resolved_toml
from tests.nightly.mlflow_page import browser, find_chromium, open_metrics, sections, served
from tests.scripted.actor import ScriptedActor
from tests.scripted.broker import running_broker, scripted_recipe
from tests.scripted.learner import ScriptedLearner

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)"),
]


def a_finished_run(folder: Path) -> Recipe:
    held = folder / "held.jsonl"
    held.write_text("".join(json.dumps({"problem": f"{i}?", "answer": "1"}) + "\n" for i in range(3)))
    recipe = scripted_recipe(folder, eval={"sets": [str(held)], "every": 2, "samples": 2})
    with running_broker(recipe) as address:
        peers = [ScriptedActor(address, "actor-0"), ScriptedLearner(address, folder / "checkpoint.json")]
        threads = [threading.Thread(target=peer.run, daemon=True) for peer in peers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60.0)
    (recipe.folder / "recipe.toml").write_text(resolved_toml(recipe))
    return recipe


def test_the_groups_are_sections_of_the_page(tmp_path: Path) -> None:
    recipe = a_finished_run(tmp_path)
    with served(recipe.folder) as url, browser(CHROMIUM) as page:
        open_metrics(page, url)
        page.until("document.querySelectorAll('svg.main-svg').length > 2", "drawn charts")
        found = sections(page)
        picture = Image.open(io.BytesIO(page.picture()))
    assert {"actor", "broker", "learner", "eval"} <= set(found)
    assert any(name.startswith("eval/held") for name in found), "a section for each set"
    assert all(name.split("/")[0] in ("actor", "broker", "learner", "eval") for name in found)
    assert found["actor"] > 10
    assert found["broker"] > 10
    assert len(set(picture.convert("L").getdata())) > 16, "the page is not blank"
