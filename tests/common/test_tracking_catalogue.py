"""The table of metrics: every name is MLflow's to take, means one thing, and stands in docs/metrics.md."""

from __future__ import annotations

import re

import pytest
from mlflow.utils.validation import _validate_metric_name

from common.tracking.catalogue import BUCKETS, GROUPS, TABLE, entry_of, full_name, plain
from deploy.metrics_reference import PAGE, page

EXAMPLES = {
    "bucket": "3-4",
    "lag": "12",
    "gpu": "7",
    "k": "8",
    "set": "math_500",
    "peer": "actor-3.gpu-node-1",
}


def example(name: str) -> str:
    return re.sub(r"\{(\w+)\}", lambda field: EXAMPLES[field[1]], name)


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m deploy.metrics_reference"


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.full_name)
def test_an_entry_finds_itself_and_mlflow_takes_its_name(entry) -> None:
    name = example(entry.full_name)
    assert entry_of(name) is entry, "two entries mean the same name"
    _validate_metric_name(name)
    assert entry.group in GROUPS
    assert entry.what.strip()


def test_sections_of_the_mlflow_page() -> None:
    """One section per part before the last slash: the four groups, and those meant to be apart."""
    sections = {entry.full_name.rpartition("/")[0] for entry in TABLE}
    assert sections == {
        "actor",
        "broker",
        "learner",
        "eval",
        "learner/by_staleness",
        "eval/{set}",
        "system/{peer}",
    }


def test_unknown_names_are_unknown() -> None:
    for name in (
        "train/reward",
        "learner/rewards",
        "learner/by_staleness/ratio_mean_at_9+",
        "eval/a b/pass1",
    ):
        assert entry_of(name) is None


def test_buckets_and_foreign_names_are_names_that_mlflow_takes() -> None:
    for bucket in BUCKETS:
        _validate_metric_name(full_name("learner", f"by_staleness/tokens_at_{bucket}"))
    assert plain("org/set name+x") == "org_set_name_x"
