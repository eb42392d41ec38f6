import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tokenflex.data.options import ask_with_options
from tokenflex.evaluation import evaluate
from tokenflex.evaluation.metrics import METRICS
from tokenflex.evaluation.options import rate_option
from tokenflex.evaluation.sweep import predict, score


COLORS = ["blue", "red", "dark red"]
RIGHT = ["B", "b", "(B)", "B.", "B. red", "(B) red", "red", "Red.", " red ", "Answer: B", "The answer is red."]
WRONG = ["A", "C", "blue", "dark red", "B or C", "red or blue", "", "crimson", "D", "none"]


@pytest.mark.parametrize("reply, expected", [*((reply, 1) for reply in RIGHT), *((reply, 0) for reply in WRONG)])
def test_replies(reply, expected):
    assert rate_option(reply, "B", COLORS) == rate_option(reply, ["B", "B"], COLORS) == expected


def test_any_of_several_letters_is_right():
    assert [rate_option(reply, ["A", "B"], COLORS) for reply in ("A", "red", "C")] == [1, 1, 0]


def test_option_that_stands_there_twice_is_right_by_its_text():
    options = ["red", "blue", "red"]
    assert [rate_option(reply, "C", options) for reply in ("red", "C", "A", "blue")] == [1, 1, 0, 0]


@given(
    st.data(), st.lists(st.text("abcdefgh ", min_size=2).filter(lambda t: len(t.strip()) > 1), min_size=1, max_size=26)
)
def test_a_letter_and_a_text_of_its_own_are_right_for_their_option_alone(data, options):
    number = data.draw(st.integers(0, len(options) - 1))
    letters = [chr(ord("A") + place) for place in range(len(options))]
    assert [rate_option(letter, letters[number], options) for letter in letters] == [
        float(place == number) for place in range(len(options))
    ]
    assert rate_option(options[number], letters[number], options) == 1


@pytest.fixture(scope="module")
def answered(narrow):
    image = Image.new("RGB", (8, 8))
    rows = [
        {"image": image, "question": "Which?\n<image1>", "options": COLORS, "answer": "red"},
        {"image": image, "question": "How many?\n<image1>", "options": [], "answer": "6"},
    ]
    return predict(*narrow, rows, [4], max_new_tokens=1, show_progress=False)


def test_questions_are_asked_with_their_options(answered):
    assert [prediction.question for prediction in answered] == [
        f"Which? {ask_with_options('', COLORS).strip()}",
        "How many?",
    ]
    assert [(prediction.answer, prediction.options) for prediction in answered] == [("B", COLORS), ("6", None)]


@pytest.mark.parametrize("metric", ["exact_match", "relaxed_accuracy", "anls"])
def test_options_are_scored_as_such_by_every_metric(answered, metric):
    for replies, expected in ((("B. red", "6"), 1), (("red", "7"), 0.5), (("b", "B"), 0.5), (("A", "7"), 0)):
        for prediction, reply in zip(answered, replies):
            prediction.predictions = {4: reply}
        report = score(answered, [4], metric)
        assert report["overall"][4] == expected and report["majority"] == {"all": 0.5}
    assert metric in METRICS


def test_rows_as_public_benchmarks_have_them_are_answered_at_every_count(narrow):
    model, processor = narrow
    small, wide, clear = Image.new("RGB", (304, 290)), Image.new("L", (1750, 632)), Image.new("RGBA", (512, 512))
    rows = [
        {"image": wide, "question": "$x^2$\n<image1>\n" + "Then Bob goes on. " * 200, "options": [], "answer": "6"},
        {"images": [small, clear], "question": "<image1> or\n<image2>?", "options": list("ABCDE"), "answer": "A"},
        {"image": clear, "question": "图中缺少什么颜色？", "options": ["黄色", "红色"], "answer": "红色"},
        {"image": small, "question": "ما اللون؟", "options": '["أحمر", "أزرق"]', "answer": "B"},
        {"image": small, "question": "Which curve?", "options": ["$a$", "none of them"], "answer": "none of them"},
    ]
    report, predictions = evaluate(model, processor, rows, [1, 4], max_new_tokens=2, latency_batch_size=0)
    assert [prediction.answer for prediction in predictions] == ["6", "A", "B", "B", "B"]
    assert all(set(prediction.predictions) == {1, 4} for prediction in predictions)
    alone = [evaluate(model, processor, [row], [4], max_new_tokens=2, latency_batch_size=0)[1][0] for row in rows]
    assert [answer.predictions[4] for answer in alone] == [answer.predictions[4] for answer in predictions]


def test_a_question_without_options_is_refused_by_multiple_choice_before_any_is_answered(narrow, tmp_path):
    image, partial = Image.new("RGB", (8, 8)), tmp_path / "partial.jsonl"
    rows = [
        {"image": image, "question": "Which?", "options": COLORS, "answer": "red"},
        {"image": image, "question": "How many?", "options": [], "answer": "6"},
    ]
    with pytest.raises(ValueError, match="Row 1 has no options, and `metric='multiple_choice'` cannot score it"):
        evaluate(*narrow, rows, [4], metric="multiple_choice", partial_file=partial, latency_batch_size=0)
    assert not partial.exists()
