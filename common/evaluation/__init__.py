"""Measuring a model on question sets: answers on disk, metrics, tables."""

from common.evaluation.answers import Answer, AnswerFile, Response
from common.evaluation.metrics import Interval, bootstrap, pass_at_k, stratified_bootstrap
from common.evaluation.report import Report, SetResult, summarise

__all__ = [
    "Answer",
    "AnswerFile",
    "Interval",
    "Report",
    "Response",
    "SetResult",
    "bootstrap",
    "pass_at_k",
    "stratified_bootstrap",
    "summarise",
]
