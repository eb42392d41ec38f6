"""Evaluation with the vision-token count as an axis."""

from .evaluator import evaluate
from .metrics import exact_match
from .report import save_report
from .sweep import predict, score


__all__ = ["evaluate", "exact_match", "predict", "save_report", "score"]
