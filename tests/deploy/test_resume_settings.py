"""`slipstream run RECIPE --resume` reads the recipe again: what that changes is said, or refused with nothing touched."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import typer

from common.errors import UserError
from common.recipe import load_recipe
from common.run_files import ADDRESS_FILE, RECIPE_FILE, SLURM_FOLDER, SPOOL
from common.tracking.spool import Spool
from deploy import preflight, run
from deploy.folder import check_unfinished, launching, prepare, read_recipe
from deploy.slurm.state import State, write_state
from tests.scripted.broker import running_broker, scripted_recipe


def test_settings_of_an_earlier_start_that_are_not_given_again_are_named(tmp_path: Path) -> None:
    root = f"run.root='{tmp_path}'"
    folder = prepare(load_recipe("demo", [root, "learner.lr=0.5"]), resume=False, fresh=False)
    lr = load_recipe("demo").learner.lr
    assert run._what_changes(load_recipe("demo", [root])) == [
        f"resumed with learner.lr = {lr}; until now 0.5",
        f"to go on with everything as it was: slipstream run {folder / RECIPE_FILE} --resume",
    ]
    assert not run._what_changes(load_recipe(folder / RECIPE_FILE)), (
        "the folder's own recipe keeps everything"
    )


def test_a_recipe_of_another_release_is_no_obstacle(tmp_path: Path) -> None:
    recipe = load_recipe("demo", [f"run.root='{tmp_path}'"])
    folder = prepare(recipe, resume=False, fresh=False)
    (folder / RECIPE_FILE).write_text("[launch]\nno_such_setting = 1\n")
    assert "cannot be compared: " in run._what_changes(recipe)[0]


# --- a run that is served, and one that would be refused -----------------------------------------------------


def kept(folder: Path) -> dict[str, bytes]:
    """What stands in the files of a run folder that a second start could spoil."""
    return {name: (folder / name).read_bytes() for name in (RECIPE_FILE, ADDRESS_FILE)}


@pytest.mark.parametrize("how", [{"resume": True}, {"fresh": True}, {}])
def test_a_run_that_is_served_is_left_alone(tmp_path: Path, how: dict[str, bool]) -> None:
    recipe = scripted_recipe(tmp_path)
    prepare(recipe, resume=False, fresh=False)
    changed = scripted_recipe(tmp_path, learner={"lr": 0.5})
    with running_broker(recipe):
        before = kept(recipe.folder)
        with pytest.raises(UserError, match=r"^run\.name: '.*' is being served; stop it first"):
            prepare(changed, **{"resume": False, "fresh": False, **how})
        assert kept(recipe.folder) == before
    assert not recipe.folder.with_name("test.1").exists()
    prepare(changed, resume=True, fresh=False)
    assert read_recipe(recipe.folder).learner.lr == 0.5


def test_two_launchers_of_one_run_do_not_meet_before_its_broker_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"run.root='{tmp_path}'"
    changed = [root, "learner.lr=0.5"]
    folder = prepare(load_recipe("demo", [root]), resume=False, fresh=False)
    before = (folder / RECIPE_FILE).read_text()
    monkeypatch.setattr(preflight, "preflight", lambda _: None)
    monkeypatch.setattr(run, "run_here", lambda *_, **__: 0)
    for how in ({"resume": True}, {"fresh": True}):
        with (
            launching(folder),
            pytest.raises(UserError, match=r"^run\.name: '.*' is being served; stop it first"),
        ):
            run.run("demo", changed, **how)
        assert (folder / RECIPE_FILE).read_text() == before
    with pytest.raises(typer.Exit):
        run.run("demo", changed, resume=True)
    assert read_recipe(folder).learner.lr == 0.5


def test_a_run_on_slurm_is_not_resumed_on_another_host(tmp_path: Path) -> None:
    here = {"broker": {"bind": "192.0.2.1"}, "weights": {"bind": "192.0.2.1"}}
    recipe = scripted_recipe(tmp_path, **here)
    said = r"^broker\.bind: '192\.0\.2\.1' is not an address of this machine"
    with pytest.raises(UserError, match=f"{said}$"):
        preflight.check_host(recipe)
    (recipe.folder / SLURM_FOLDER).mkdir(parents=True)
    write_state(recipe.folder, State(run="test", head=1))
    with pytest.raises(UserError, match=f"{said}; .*slipstream submit .*recipe.toml --resume"):
        preflight.check_host(recipe)
    preflight.check_host(scripted_recipe(tmp_path))


def test_what_may_not_change_within_a_run_is_refused_before_the_recipe_is_written(tmp_path: Path) -> None:
    durable = {"broker": {"durability": "journal"}}
    recipe = scripted_recipe(tmp_path, **durable)
    prepare(recipe, resume=False, fresh=False)
    with running_broker(recipe):
        pass
    before = (recipe.folder / RECIPE_FILE).read_text()
    changed = scripted_recipe(tmp_path, **durable, rollout={"group_size": 8})
    with pytest.raises(UserError, match=r"^rollout\.group_size: it was 4 "):
        prepare(changed, resume=True, fresh=False)
    assert (recipe.folder / RECIPE_FILE).read_text() == before


@pytest.mark.parametrize(("code", "lr"), [(2, 1e-6), (1, 0.5), (0, 0.5)])
def test_a_recipe_that_a_worker_refuses_is_not_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int,
    lr: float,
) -> None:
    """The learner's checkpoint knows more of what may not change."""
    root = f"run.root='{tmp_path}'"
    folder = prepare(load_recipe("demo", [root, "learner.lr=1e-6"]), resume=False, fresh=False)
    monkeypatch.setattr(run, "run_here", lambda *_, **__: code)
    monkeypatch.setattr(preflight, "preflight", lambda _: None)
    with pytest.raises(typer.Exit) as ended:
        run.run("demo", [root, "learner.lr=0.5"], resume=True)
    assert "resumed with learner.lr = 0.5; until now 1e-06" in capsys.readouterr().out
    assert (ended.value.exit_code, read_recipe(folder).learner.lr) == (code, lr)


@pytest.mark.parametrize(
    ("done", "now", "said"),
    [
        ((5, 5), {}, r"^run\.steps: '.*' finished at step 5 of 5; raise run\.steps to go on"),
        ((7, 7), {"run": {"steps": 5}}, r"^run\.steps: '.*' finished at step 7 of 7"),
        ((3, 5), {}, r"^data\.max_epochs: '.*' finished at step 3 of 5, when its questions ran out"),
        ((5, 5), {"run": {"steps": 6}}, None),
        ((3, 5), {"data": {"max_epochs": 2}}, None),
    ],
)
def test_a_finished_run_goes_on_only_where_there_is_something_to_do(
    tmp_path: Path, done: tuple[int, int], now: dict[str, dict[str, int]], said: str | None
) -> None:
    folder = prepare(scripted_recipe(tmp_path), resume=False, fresh=False)
    final = {"step": done[0], "steps_total": done[1]}
    spool = Spool(folder / SPOOL)
    spool.append("end", done[0], {"status": "finished", "reason": "finished", "final": final})
    recipe = scripted_recipe(tmp_path, **now)
    with pytest.raises(UserError, match=said) if said else nullcontext():
        check_unfinished(recipe)
    spool.append("event", done[0], {"text": "it went on", "warning": False})
    check_unfinished(recipe)


def test_a_finished_run_whose_model_was_not_saved_goes_on(tmp_path: Path) -> None:
    recipe = scripted_recipe(tmp_path)
    folder = prepare(recipe, resume=False, fresh=False)
    for pinned, said in ((4, nullcontext()), (5, pytest.raises(UserError, match="finished at step 5"))):
        final = {"step": 5, "steps_total": 5, "pinned": {"step": pinned, "path": "x"}}
        end = {"status": "finished", "reason": "finished", "final": final}
        Spool(folder / SPOOL).append("end", 5, end)
        with said:
            check_unfinished(recipe)
