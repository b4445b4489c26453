"""Cores and GPUs are given out once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from common.process import ENGINE_CORES_VARIABLE
from common.recipe import Recipe
from deploy.launch.layout import share_out


def recipe(**sections) -> Recipe:
    return Recipe.model_validate({"model": {"path": "m"}, "data": {"train": "demo"}, **sections})


def test_two_cores_are_one_each() -> None:
    layout = share_out(recipe(), [0, 1], [])
    assert (layout.device, layout.learner.cores, layout.actors[0].cores) == ("cpu", (0,), (1,))
    assert layout.actors[0].environment()["OMP_NUM_THREADS"] == "1"
    assert layout.actors[0].environment()["CUDA_VISIBLE_DEVICES"] == ""


def test_gpus_are_counted_as_nvml_counts_them() -> None:
    layout = share_out(recipe(), [0, 1], ["0", "1"])
    environment = layout.actors[0].environment()
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["CUDA_DEVICE_ORDER"]) == ("1", "PCI_BUS_ID")


@given(cores=st.integers(1, 64), ranks=st.integers(1, 4), count=st.integers(1, 8))
def test_no_core_is_given_out_twice(cores: int, ranks: int, count: int) -> None:
    layout = share_out(recipe(learner={"ranks": ranks}, actor={"count": count}), list(range(cores)), [])
    given_out = [c for share in (layout.learner, *layout.actors) for c in share.cores or ()]
    assert len(given_out) == len(set(given_out))
    assert set(given_out) <= set(range(cores))
    assert len(layout.actors) == count
    if cores >= ranks + count:
        assert all(share.cores for share in (layout.learner, *layout.actors))


def test_all_but_the_engine_roams_where_no_thread_waits_for_another() -> None:
    alone = share_out(recipe(), [4, 5], []).actors[0]
    assert (alone.cores, alone.roaming) == ((5,), (4, 5))
    assert alone.environment()[ENGINE_CORES_VARIABLE] == "5"
    teams = share_out(recipe(), [0, 1, 2, 3], [])
    assert teams.learner.threads == teams.actors[0].threads == 2
    assert teams.actors[0].roaming is None
    assert ENGINE_CORES_VARIABLE not in teams.actors[0].environment()
    crowded = share_out(recipe(actor={"count": 4}), [0, 1], [])
    assert all(share.roaming is None for share in (crowded.learner, *crowded.actors))


def test_gpus_are_split_between_learner_and_actors() -> None:
    wanted = recipe(learner={"ranks": 4}, actor={"count": 2, "tensor_parallel": 2})
    layout = share_out(wanted, list(range(16)), [str(i) for i in range(8)])
    assert layout.learner.gpus == ("0", "1", "2", "3")
    assert [a.gpus for a in layout.actors] == [("4", "5"), ("6", "7")]


def test_too_few_gpus_and_one_shared_gpu() -> None:
    with pytest.raises(UserError, match=r"actor\.count"):
        share_out(recipe(actor={"count": 8}), [0, 1], [str(i) for i in range(8)])
    shared = share_out(recipe(launch={"shared_gpu": True}), [0, 1, 2, 3], ["0"])
    assert shared.learner.gpus == shared.actors[0].gpus == ("0",)
    with pytest.raises(UserError, match=r"launch\.shared_gpu"):
        share_out(recipe(launch={"shared_gpu": True, "device": "gpu"}), [0, 1], [])


def test_asking_for_more_cores_than_there_are() -> None:
    with pytest.raises(UserError, match=r"launch\.actor_cores"):
        share_out(recipe(launch={"actor_cores": 4}), [0, 1], [])
