"""The metrics as modules of the library `evaluate`, made without the Hub."""

import inspect
from collections.abc import Sequence

import evaluate
from datasets import Features, List, Value

from .metrics import METRICS


def _refuse_no_texts(predictions: Sequence, references: Sequence) -> None:
    """Refuses what would be turned into text unasked, such as NaN into "nan"."""
    for question, prediction in enumerate(predictions):
        if not isinstance(prediction, str):
            raise ValueError(f"`predictions`: that of question {question} is {prediction!r}, not a text.")
    for question, answers in enumerate(references):
        listed = [answers] if isinstance(answers, str) else answers
        if not isinstance(listed, Sequence) or not listed or not all(isinstance(answer, str) for answer in listed):
            raise ValueError(
                f"`references`: those of question {question} are {answers!r}: a text, or a list of at least one."
            )


class _QuestionMetric(evaluate.Metric):
    """The mean over questions of the metric that has this class's name in snake case."""

    def _info(self) -> evaluate.MetricInfo:
        text = Value("string")
        return evaluate.MetricInfo(
            description=inspect.getdoc(type(self)),
            citation=self.source,
            inputs_description="""
            predictions (`list[str]`): Answers of the model.
            references (`list[list[str]]` or `list[str]`): Each question's answers, or its one answer.""",
            features=[
                Features({"predictions": text, "references": List(text)}),
                Features({"predictions": text, "references": text}),
            ],
        )

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Adds a question."""
        _refuse_no_texts([prediction], [reference])
        super().add(prediction=prediction, reference=reference, **kwargs)

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Adds questions."""
        if predictions is not None and not len(predictions):
            raise ValueError("`predictions`=[]: at least one question.")
        _refuse_no_texts(predictions or (), references or ())
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions: list[str], references: list, **options) -> dict[str, float]:
        scores = [
            METRICS[self.name](prediction, answers, **{name: values[i] for name, values in options.items()})
            for i, (prediction, answers) in enumerate(zip(predictions, references))
        ]
        return {self.name: sum(scores) / len(scores)}


class ExactMatch(_QuestionMetric):
    """
    The mean of [`exact_match`].

    Example:

    ```python
    >>> from tokenflex.evaluation.hub_metrics import ExactMatch

    >>> ExactMatch().compute(predictions=["Red.", "two"], references=[["red", "crimson"], ["2"]])
    {'exact_match': 0.5}
    ```
    """

    source = ""


class VQAAccuracy(_QuestionMetric):
    """
    The mean of [`vqa_accuracy`].

    Example:

    ```python
    >>> from tokenflex.evaluation.hub_metrics import VQAAccuracy

    >>> VQAAccuracy().compute(predictions=["two"], references=[["2"] * 3 + ["3"] * 7])
    {'vqa_accuracy': 0.9}
    ```
    """

    source = "https://visualqa.org/evaluation.html"


class ANLS(_QuestionMetric):
    """
    The mean of [`anls`].

    Example:

    ```python
    >>> from tokenflex.evaluation.hub_metrics import ANLS

    >>> ANLS().compute(predictions=["helo", "no"], references=[["hello", "hi"], ["yes"]])
    {'anls': 0.4}
    ```
    """

    source = "https://arxiv.org/abs/1905.13648"


class RelaxedAccuracy(_QuestionMetric):
    """
    The mean of [`relaxed_accuracy`].

    Example:

    ```python
    >>> from tokenflex.evaluation.hub_metrics import RelaxedAccuracy

    >>> RelaxedAccuracy().compute(predictions=["41", "40"], references=["40", "50"])
    {'relaxed_accuracy': 0.5}
    ```
    """

    source = "https://arxiv.org/abs/2203.10244"


class MultipleChoice(_QuestionMetric):
    """
    The mean of [`multiple_choice`]. `compute` also takes `options` (`list[list[str]]`, *optional*), those of each
    question.

    Example:

    ```python
    >>> from tokenflex.evaluation.hub_metrics import MultipleChoice

    >>> MultipleChoice().compute(predictions=["(B)", "dog"], references=["B", "A"], options=[["cat", "dog"]] * 2)
    {'multiple_choice': 0.5}
    ```
    """

    source = ""

    def _compute(
        self, predictions: list[str], references: list, options: list[list[str]] | None = None
    ) -> dict[str, float]:
        if options is None:
            return super()._compute(predictions, references)
        if len(options) != len(predictions):
            raise ValueError(
                f"`options` of {len(options)} questions for {len(predictions)} predictions: one list each."
            )
        return super()._compute(predictions, references, options=options)
