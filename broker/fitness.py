"""Whether a recipe can be served as it stands, asked before anything starts: its addresses, its number of questions.

Invariant: asking binds nothing, writes nothing and needs no ZeroMQ, so that launchers ask the same as the broker.
"""

from __future__ import annotations

import ipaddress
import logging

from common.errors import UserError
from common.recipe.schema import Recipe

log = logging.getLogger("slipstream.broker")
WILDCARDS = ("", "*", "0.0.0.0", "::")


def is_loopback(host: str) -> bool:
    """Whether an address to bind is reachable from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_bind(recipe: Recipe) -> None:
    """Refuse addresses that others can reach unless there are keys (I8), and those that actors could not use.

    Raises:
        UserError: names `broker.bind`, `weights.bind` or `broker.keys`.
    """
    bound = {"broker.bind": recipe.broker.bind, "weights.bind": recipe.weights.bind}
    for setting, host in bound.items():
        if host in WILDCARDS:
            raise UserError(
                f"name the one address that the other processes reach, not '{host}': it is handed on to them.",
                setting=setting,
            )
    for setting, host in bound.items():
        if not is_loopback(host) and recipe.broker.keys is None:
            raise UserError(
                f"{setting} = '{host}' can be reached by others and needs CURVE keys: make some with "
                "`slipstream keys init FOLDER`.",
                setting="broker.keys",
            )
    if is_loopback(recipe.weights.bind) and not is_loopback(recipe.broker.bind):
        raise UserError(
            f"'{recipe.weights.bind}' is unreachable from other hosts, but broker.bind = '{recipe.broker.bind}' "
            "accepts them: set it to an address of the learner's host",
            setting="weights.bind",
        )


def check_questions(recipe: Recipe, questions: int) -> None:
    """Refuse a set that cannot fill one step; say so when it cannot fill all of them."""
    steps = questions * recipe.data.max_epochs // recipe.batch.questions_per_step
    if steps == 0:
        raise UserError(
            f"{questions} questions x data.max_epochs = {recipe.data.max_epochs} do not fill one step of "
            f"batch.questions_per_step = {recipe.batch.questions_per_step}.",
            setting="data.train",
        )
    if steps < recipe.run.steps:
        log.warning(
            "%d questions x data.max_epochs = %d are enough for %d of run.steps = %d",
            questions,
            recipe.data.max_epochs,
            steps,
            recipe.run.steps,
        )
