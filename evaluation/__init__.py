"""Evaluation with the vision-token count as an axis."""

from .evaluate import evaluate, save_report
from .metrics import exact_match
from .sweep import predict, score


__all__ = ["evaluate", "exact_match", "predict", "save_report", "score"]
