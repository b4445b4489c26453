"""`slipstream status`: of a run that is served, that has ended, and that was killed."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from common.errors import UserError
from common.messages import Stop
from deploy import watch
from deploy.folder import newest_folder, prepare
from deploy.status import status
from deploy.stop import stop
from tests.scripted.actor import ScriptedActor
from tests.scripted.broker import running_broker, scripted_recipe
from tests.scripted.learner import ScriptedLearner
from tests.scripted.wait import until

app = typer.Typer()
app.command()(status)
stopping = typer.Typer()
stopping.command()(stop)


def said(*arguments: str | Path) -> str:
    done = CliRunner().invoke(
        app, [str(a) for a in arguments], catch_exceptions=False, env={"COLUMNS": "200"}
    )
    assert done.exit_code == 0
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has trained its five steps."""
    root = tmp_path_factory.mktemp("runs")
    recipe = scripted_recipe(root)
    folder = prepare(recipe, resume=False, fresh=False)
    with running_broker(recipe) as address:
        workers = [ScriptedActor(address, "actor-0"), ScriptedLearner(address, root / "c.json", every=1)]
        threads = [threading.Thread(target=worker.run, daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30.0)
    return folder


def killed(root: Path) -> Path:
    """The folder of a run whose broker was killed."""
    folder = prepare(scripted_recipe(root), resume=False, fresh=False)
    (folder / "broker.json").write_text('{"address": "127.0.0.1:9"}')
    return folder


def test_a_finished_run_is_shown_as_it_was_in_the_end(finished: Path) -> None:
    screen = said(finished)
    assert "step 5/5" in screen
    assert "finished at 20" in screen
    assert "waits for" not in screen
    assert "sum_ok" in said(finished, "--ledger")
    assert json.loads(said(finished, "--json"))["step"] == 5
    assert "step 5/5" in said(finished, "--watch"), "it does not wait for what will not come"


@pytest.mark.parametrize("options", [["--groups"], ["--group", "0:0"]])
def test_groups_are_only_shown_of_a_run_that_is_served(finished: Path, options: list[str]) -> None:
    with pytest.raises(UserError, match="is not running"):
        said(finished, *options)


def test_a_group_says_how_many_tokens_are_of_which_version(tmp_path: Path) -> None:
    recipe = scripted_recipe(tmp_path)
    prepare(recipe, resume=False, fresh=False)
    with running_broker(recipe) as address:
        actor = ScriptedActor(address, "actor-0")
        threading.Thread(target=actor.run, daemon=True).start()
        until(lambda: json.loads(said(recipe.folder, "--json"))["ledger"]["buffered"] == 8)
        rows = json.loads(said(recipe.folder, "--json", "--groups"))["groups"]
        name = next(row["group"] for row in rows if row["state"] == "buffered")
        shown = said(recipe.folder, "--group", name)
        actor.stop()
    assert "versions (tokens)" in shown
    assert re.search(r"│ 0 \(\d+\) +│", shown), shown


def test_a_killed_run_is_not_running_and_how_it_goes_on_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "GONE_S", 0.1)
    folder = killed(tmp_path)
    for verb in (app, stopping):
        with pytest.raises(UserError) as seen:
            CliRunner().invoke(verb, [str(folder)], catch_exceptions=False)
        assert str(seen.value).startswith(f"'{folder}' is not running")
        assert str(seen.value).endswith(f"slipstream run {folder}/recipe.toml --resume")
    (folder / "slurm").mkdir()
    assert "slipstream submit" in str(watch.not_running(folder))


def test_a_broker_that_hangs_is_not_called_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "ANSWER_S", 0.1)
    recipe = scripted_recipe(tmp_path)
    prepare(recipe, resume=False, fresh=False)
    with running_broker(recipe):
        target = watch.Target(recipe.folder, "127.0.0.1:9", None)
        with pytest.raises(UserError, match=r"^no answer from the broker"):
            target.ask(Stop(reason="test"))
        assert "step 0/5" in said(recipe.folder)


def test_the_newest_run_is_one_with_a_broker_if_there_is_any(tmp_path: Path) -> None:
    first, second = (
        prepare(scripted_recipe(tmp_path, run={"name": name}), resume=False, fresh=False) for name in "ab"
    )
    (second / "recipe.toml").touch()
    assert newest_folder(tmp_path) == second
    (first / "broker.json").write_text("{}")
    assert newest_folder(tmp_path) == first
