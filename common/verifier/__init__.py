"""The verifier: does a response hold the gold answer?

Invariant: nothing that a model writes is executed, and no response makes `grade` raise or hang; a verification that
fails is `unverified`, its own state.

    from common.verifier import grade, VerifierPool

    grade("so \\\\boxed{2/4}", "1/2").verdict            # Outcome.CORRECT
    with VerifierPool(workers=2) as pool:
        verdicts = pool.grade_many([(response, gold)])   # or: await pool.grade(response, gold)

Why code of its own beside Math-Verify, which level `full` asks only about gold answers that it cannot read itself: on the
same cases it has 34 times the speed, and an accuracy of 99.75 % against 95.75 % (docs/benchmarks.md).

Levels and templates are those of the paper (arXiv 2503.20783, appendix and code): see `grade` and `extract`. Custom
rewards: see `rewards`.
"""

from .extract import TEMPLATES, Template
from .grade import LEVELS, Gold, Level, grade
from .pool import VerifierPool
from .rewards import RewardFunction, load_reward
from .verdict import Outcome, Verdict

__all__ = [
    "LEVELS",
    "TEMPLATES",
    "Gold",
    "Level",
    "Outcome",
    "RewardFunction",
    "Template",
    "Verdict",
    "VerifierPool",
    "grade",
    "load_reward",
]
