import random
import socket
import statistics

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from tokenflex.evaluation.hub_metrics import ANLS, ExactMatch, MultipleChoice, RelaxedAccuracy, VQAAccuracy
from tokenflex.evaluation.metrics import METRICS


CLASSES = [ExactMatch, VQAAccuracy, ANLS, RelaxedAccuracy, MultipleChoice]


@pytest.fixture(params=CLASSES, ids=lambda metric: metric.__name__)
def metric(request, tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a metric asked the network"))
    return request.param(cache_dir=str(tmp_path))


def questions(number=50):
    draw = random.Random(0)
    return draw.choices("ABC", k=number), [draw.choices("ABC", k=draw.randint(2, 10)) for _ in range(number)]


def test_every_metric_has_a_class(tmp_path):
    assert [metric(cache_dir=str(tmp_path)).name for metric in CLASSES] == list(METRICS)


def test_is_the_mean_over_questions(metric):
    predictions, references = questions()
    expected = statistics.mean(map(METRICS[metric.name], predictions, references))
    assert metric.compute(predictions=predictions, references=references) == {metric.name: pytest.approx(expected)}


@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_batches_equal_all_at_once(metric, batch_size):
    predictions, references = questions()
    expected = metric.compute(predictions=predictions, references=references)
    for start in range(0, 50, batch_size):
        part = slice(start, start + batch_size)
        metric.add_batch(predictions=predictions[part], references=references[part])
    assert metric.compute() == expected
    for prediction, answers in zip(predictions, references):
        metric.add(prediction=prediction, reference=answers)
    assert metric.compute() == expected


def test_in_memory_equals_on_disk(metric):
    predictions, references = questions()
    memory = type(metric)(keep_in_memory=True)
    expected = metric.compute(predictions=predictions, references=references)
    assert memory.compute(predictions=predictions, references=references) == expected


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("ABC"), st.sampled_from("ABC")), min_size=1, max_size=20))
def test_one_answer_each_is_scikit_learns_accuracy(tmp_path, pairs):
    predictions, references = map(list, zip(*pairs))
    expected = pytest.approx(accuracy_score(references, predictions))
    for metric in (ExactMatch, ANLS, RelaxedAccuracy, MultipleChoice):
        (score,) = metric(cache_dir=str(tmp_path)).compute(predictions=predictions, references=references).values()
        assert score == expected


def test_options_are_each_questions_own(tmp_path):
    metric = MultipleChoice(cache_dir=str(tmp_path))
    inputs = {"predictions": ["a dog", "a dog"], "references": ["B", "A"]}
    options = [["a cat", "a dog"], ["a dog", "a cat"]]
    assert metric.compute(**inputs, options=options) == {"multiple_choice": 1}
    assert metric.compute(**inputs, options=options[::-1]) == {"multiple_choice": 0}
    assert metric.compute(**inputs) == {"multiple_choice": 0}
    with pytest.raises(ValueError, match="`options` of 1 questions for 2 predictions"):
        metric.compute(**inputs, options=options[:1])


def test_no_questions_are_refused(metric):
    with pytest.raises(ValueError, match="`predictions`=.*at least one question"):
        metric.compute(predictions=[], references=[])


def test_another_number_of_references_is_refused(metric):
    with pytest.raises(ValueError, match="Mismatch in the number of predictions"):
        metric.compute(predictions=["A", "B"], references=[["A", "B"]])


@pytest.mark.parametrize("bad", [None, float("nan"), [], [None, "B"], [float("nan"), "B"]])
def test_references_that_are_no_texts_are_named(metric, bad):
    with pytest.raises(ValueError, match="`references`: those of question 1 are"):
        metric.compute(predictions=["A", "B"], references=[["A", "B"], bad])
    with pytest.raises(ValueError, match="`references`: those of question 0 are"):
        metric.add(prediction="A", reference=bad)


@pytest.mark.parametrize("bad", [None, float("nan")])
def test_predictions_that_are_no_texts_are_named(metric, bad):
    with pytest.raises(ValueError, match=f"`predictions`: that of question 1 is {bad}"):
        metric.compute(predictions=["A", bad], references=[["A", "B"], ["A", "B"]])
