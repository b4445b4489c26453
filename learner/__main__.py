"""`python -m learner --join HOST:PORT | --run FOLDER [--resume] [--keys FOLDER]`: `slipstream learner` as a module."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from common.errors import RunFailedError, UserError, report
from common.process import leave
from learner.main import run_learner


def _option(arguments: list[str], name: str) -> str | None:
    if name not in arguments:
        return None
    place = arguments.index(name) + 1
    if place == len(arguments):
        raise UserError("needs a value.", setting=name)
    return arguments[place]


def _address(arguments: list[str]) -> str:
    join, run = _option(arguments, "--join"), _option(arguments, "--run")
    if join is not None:
        return join
    if run is None:
        raise UserError("give either --join HOST:PORT or --run FOLDER.")
    try:
        return json.loads((Path(run) / "broker.json").read_text(encoding="utf-8"))["address"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"no broker has written its address to '{run}'.", setting="--run") from None


def main(arguments: list[str]) -> int:
    """Run the learner; returns the exit code."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname).1s %(name)s: %(message)s"
    )
    try:
        keys = _option(arguments, "--keys")
        return run_learner(
            _address(arguments), resume="--resume" in arguments, keys=Path(keys) if keys else None
        )
    except (UserError, RunFailedError) as error:
        return report(error)
    except Exception:
        logging.getLogger("slipstream.learner").exception("the learner died")
        return 1


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
