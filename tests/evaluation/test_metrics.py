import itertools
import re
import statistics
import unicodedata
from math import nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein
from sklearn.metrics import accuracy_score

from tokenflex.evaluation.metrics import (
    METRICS,
    anls,
    edit_distance,
    exact_match,
    get_metric,
    multiple_choice,
    relaxed_accuracy,
    vqa_accuracy,
)


thousand = settings(max_examples=1000, deadline=None)
answers = st.text(st.sampled_from("aAbBcÇß. 1\n"), max_size=6)
words = st.text(st.sampled_from("abé 1%"), max_size=12)


@given(answers)
def test_an_answer_matches_itself(answer):
    assert exact_match(answer, answer)


@given(answers, answers)
def test_matching_is_symmetric(first, second):
    assert exact_match(first, second) == exact_match(second, first)


@given(answers, answers, answers)
def test_matching_is_transitive(first, second, third):
    if exact_match(first, second) and exact_match(second, third):
        assert exact_match(first, third)


@given(st.text(st.sampled_from("abAB1"), min_size=1), st.sampled_from(["", " ", "\n"]), st.sampled_from(["", "."]))
def test_case_space_and_full_stop_do_not_count(answer, space, stop):
    assert exact_match(f"{space}{answer.upper()}{space}{stop}{space}", answer.lower())


@given(st.text(st.sampled_from("ab1"), min_size=1), st.text(st.sampled_from("ab1"), min_size=1))
def test_nothing_else_matches(first, second):
    assert exact_match(first, second) == (first == second)


def test_part_of_an_answer_is_not_the_answer():
    assert not exact_match("red and blue", "red")
    assert not exact_match("", "red")
    assert not exact_match("1", "10")
    assert not exact_match("1.5", "15")


@thousand
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1, max_size=20))
def test_mean_exact_match_is_scikit_learns_accuracy(pairs):
    predictions, references = zip(*pairs)
    expected = accuracy_score(references, predictions)
    for metric in (exact_match, multiple_choice):
        assert statistics.mean(map(metric, predictions, references)) == pytest.approx(expected)


@pytest.mark.parametrize("name", [name for name in METRICS if name != "vqa_accuracy"])
@given(given_answers=st.lists(st.sampled_from("ABC"), min_size=1, max_size=4), prediction=st.sampled_from("ABCD"))
def test_of_several_answers_the_best_counts(name, given_answers, prediction):
    metric = METRICS[name]
    assert metric(prediction, given_answers) == max(metric(prediction, answer) for answer in given_answers)
    assert metric(prediction, tuple(given_answers)) == metric(prediction, given_answers)


SAME = {"vqa_accuracy": 2 / 3}  # of three who agree


@pytest.mark.parametrize("name", [name for name in METRICS if name != "multiple_choice"])
@pytest.mark.parametrize("text", ["caf\u00e9", "\u212bngstr\u00f6m", "\ud55c\uad6d", "\u0915\u093c\u093e"])
def test_letters_may_be_put_together_in_any_way(name, text):
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    for prediction, answer in itertools.product(forms, forms):
        assert METRICS[name](prediction, [answer] * 3) == pytest.approx(SAME.get(name, 1))


@pytest.mark.parametrize("stop", [".", "。", "．", "।", "۔"])
def test_a_final_period_of_any_script_does_not_count(stop):
    assert exact_match(f"红色 {stop} ", "红色")
    assert not exact_match(f"{stop}红色", "红色")


@pytest.mark.parametrize("prediction, answer", [("1２", "12"), ("x²", "x2"), ("сat", "cat"), ("5", "٥"), ("−5", "-5")])
def test_signs_that_only_look_alike_are_others(prediction, answer):
    assert not exact_match(prediction, answer)


# VQA accuracy


def official_vqa_form(text):
    """The form of https://github.com/GT-Vision-Lab/VQA, but for contractions."""
    text = out = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in [
        ";",
        r"/",
        "[",
        "]",
        '"',
        "{",
        "}",
        "(",
        ")",
        "=",
        "+",
        "\\",
        "_",
        "-",
        ">",
        "<",
        "@",
        "`",
        ",",
        "?",
        "!",
    ]:
        if (mark + " " in text or " " + mark in text) or (re.search(r"(\d)(\,)(\d)", text) is not None):
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    out = re.sub(r"(?!<=\d)(\.)(?!\d)", "", out)
    digits = {"none": "0", "zero": "0", "one": "1", "two": "2"}
    words = [digits.get(word, word) for word in out.lower().split()]
    return " ".join(word for word in words if word not in ("a", "an", "the"))


vqa_texts = st.lists(st.sampled_from([*"ab12 ,.-/?()\n", " two ", " none ", "The "]), max_size=12).map("".join)


@thousand
@given(vqa_texts, vqa_texts)
def test_vqa_accuracy_compares_as_the_official_script(prediction, answer):
    same = official_vqa_form(prediction) == official_vqa_form(answer)
    assert vqa_accuracy(prediction, [answer] * 4) == same


def test_vqa_accuracy_drops_marks_beside_a_space_and_splits_at_others():
    assert vqa_accuracy("red- blue-green", ["red bluegreen"] * 4) == 1
    assert vqa_accuracy("1,000-2", ["10002"] * 4) == 1


@pytest.mark.parametrize("same, expected", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_of_ten(same, expected):
    assert vqa_accuracy("yes", ["yes"] * same + ["no"] * (10 - same)) == pytest.approx(expected)


@pytest.mark.parametrize("people, expected", [(2, 1 / 3), (3, 2 / 3), (4, 1), (5, 1)])
def test_vqa_accuracy_of_fewer_who_agree(people, expected):
    assert vqa_accuracy("yes", ["yes"] * people) == pytest.approx(expected)


@thousand
@given(st.lists(st.sampled_from("xyz"), min_size=2, max_size=12), st.sampled_from("xyz"))
def test_vqa_accuracy_leaves_everyone_out_once(said, prediction):
    left = itertools.combinations(said, len(said) - 1)
    expected = statistics.mean(min(others.count(prediction) / 3, 1) for others in left)
    assert vqa_accuracy(prediction, said) == pytest.approx(expected)


@pytest.mark.parametrize(
    "first, second",
    [
        ("Yes", "yes"),
        ("The dog.", "dog"),
        ("an apple a day", "apple day"),
        ("two", "2"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldn'tve", "couldnt've"),
        ("oclock", "o'clock"),
        ("black/white", "black, white"),
        ("t-shirt", "t shirt"),
        ("1,000", "1000"),
        ("U.S.A.", "usa"),
        ("red\n and\tblue", "red and blue"),
    ],
)
def test_vqa_accuracy_takes_for_the_same(first, second):
    assert vqa_accuracy(first, [second] * 10) == vqa_accuracy(second, [first] * 10) == 1


@pytest.mark.parametrize(
    "first, second",
    [("3.5", "35"), ("10:30", "1030"), ("girl's", "girls"), ("well", "we'll"), ("eleven", "11"), ("1, 2", "12")],
)
def test_vqa_accuracy_tells_apart(first, second):
    assert vqa_accuracy(first, [second] * 10) == vqa_accuracy(second, [first] * 10) == 0


def test_vqa_accuracy_of_one_answer_is_refused():
    for one in ("yes", ["yes"]):
        with pytest.raises(ValueError, match=r"`answers`=\['yes'\].*at least two.*`exact_match`"):
            vqa_accuracy("yes", one)


# ANLS


@pytest.mark.parametrize(
    # The examples of https://pypi.org/project/anls, answers "Coca Cola" and "Coca Cola Company".
    "prediction, first, second, expected",
    [
        ("The Coca", 0, 0, 0),
        ("CocaCola", 8 / 9, 0, 8 / 9),
        ("Coca cola", 1, 9 / 17, 1),
        ("Cola", 0, 0, 0),
        ("Cat", 0, 0, 0),
    ],
)
def test_anls_of_published_examples(prediction, first, second, expected):
    answers = ["Coca Cola", "Coca Cola Company"]
    assert [anls(prediction, answer) for answer in answers] == pytest.approx([first, second])
    assert anls(prediction, answers) == pytest.approx(expected)


def test_anls_at_its_edges():
    assert anls("ab", "ax") == 0.5
    assert anls("abc", "axy") == 0
    assert anls("", "") == anls(" A  b ", "a B") == 1
    assert anls("", "a") == anls("a", "") == 0


@thousand
@given(words, words)
def test_edit_distance_is_rapidfuzzs(first, second):
    assert edit_distance(first, second) == Levenshtein.distance(first, second)


@thousand
@given(words, st.lists(words, min_size=1, max_size=4))
def test_anls_is_rapidfuzzs(prediction, given_answers):
    prediction, *squeezed = (" ".join(text.split()) for text in (prediction, *given_answers))
    best = max(Levenshtein.normalized_similarity(prediction, answer) for answer in squeezed)
    assert anls(prediction, given_answers) == pytest.approx(best if best >= 0.5 - 1e-9 else 0)


# Relaxed accuracy


@pytest.mark.parametrize(
    "prediction, answer, right",
    [
        ("105", "100", True),
        ("95", "100", True),
        ("105.1", "100", False),
        ("94.9", "100", False),
        ("-21", "-20", True),
        ("20", "-20", False),
        ("12%", "0.12", True),
        ("12 %", "12.5%", True),
        ("12", "12%", False),
        ("0.0", "0", True),
        ("0.001", "0", False),
        ("Red ", "red", True),
        ("reds", "red", False),
        ("1,000", "1,000", True),
        ("1,000", "1000", False),
        ("nan", "NaN", True),
        ("inf", "1", False),
        ("5", "five", False),
        ("", "", True),
    ],
)
def test_relaxed_accuracy(prediction, answer, right):
    assert relaxed_accuracy(prediction, answer) == right


@thousand
@given(st.integers(-(10**6), 10**6), st.integers(1, 10**6), st.sampled_from(["", "%"]))
def test_relaxed_accuracy_is_five_percent(prediction, answer, unit):
    assert relaxed_accuracy(f"{prediction}{unit}", f"{answer}{unit}") == (20 * abs(prediction - answer) <= answer)


def official_relaxed(prediction, target):
    """Pix2Struct's `relaxed_correctness`."""

    def to_float(text):
        try:
            return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
        except ValueError:
            return None

    number, wanted = to_float(prediction), to_float(target)
    if number is not None and wanted:
        return abs(number - wanted) / abs(wanted) <= 0.05
    return prediction.lower() == target.lower()


numbers = st.text(st.sampled_from("0159.-%,") | st.sampled_from(["１", "٥", "५", "\u2212", "e", "$", "_"]), max_size=6)


@thousand
@given(numbers, numbers)
def test_relaxed_accuracy_is_pix2structs(prediction, answer):
    if float("inf") in map(abs, (_float(prediction), _float(answer))) or _float(answer) == 0:
        return  # where it is this project's own
    assert relaxed_accuracy(prediction, answer) == official_relaxed(prediction, answer)


def _float(text):
    try:
        return float(text.rstrip("%"))
    except ValueError:
        return 1.0


@pytest.mark.parametrize(
    "prediction, answer, right",
    [
        ("１２", "12", 1),
        ("١٢", "12", 1),
        ("12%%", "12%", 1),
        ("\u22125", "-5", 0),
        ("1,000", "1000", 0),
        ("$5", "5", 0),
    ],
)
def test_relaxed_accuracy_reads_the_numbers_that_float_does(prediction, answer, right):
    assert relaxed_accuracy(prediction, answer) == right


# Multiple choice


def test_choices_score_by_letter_and_by_text():
    options = ["a cat", "a dog", "a bird"]
    for reply in ("B", "a dog", "The answer is (B)."):
        assert multiple_choice(reply, "a dog", options) == multiple_choice(reply, "B", options) == 1
        assert multiple_choice(reply, "a cat", options) == multiple_choice(reply, "C", options) == 0
    assert multiple_choice("A or B", ["A", "B", "C"], options) == 0


@pytest.mark.parametrize("answer, options", [("D", ["x", "y", "z"]), ("w", ["x", "y"]), ("yes", None), ("", ["x"])])
def test_an_answer_that_is_no_option_is_refused(answer, options):
    with pytest.raises(ValueError, match="`answers`=.*a letter from A to"):
        multiple_choice("A", answer, options)


@pytest.mark.parametrize("options", [[], "xy", ["x"] * 27, [1, 2]])
def test_options_that_are_no_list_of_texts_are_refused(options):
    with pytest.raises(ValueError, match="`options`=.*1 to 26 strings"):
        multiple_choice("A", "A", options)


# All


@given(st.sampled_from(list(METRICS)), words, st.lists(st.sampled_from("ABC"), min_size=2, max_size=4))
def test_scores_are_shares(name, prediction, given_answers):
    score = METRICS[name](prediction, given_answers)
    assert type(score) is float and 0 <= score <= 1


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    "bad", [[], None, 5, nan, [nan, "yes"], [None], [5], [["yes"]], [{"answer": "yes"}], {"yes": 10}]
)
def test_answers_that_are_no_texts_are_refused(name, bad):
    with pytest.raises(ValueError, match="`answers`="):
        METRICS[name]("yes", bad)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("bad", [None, nan, 5, ["yes"]])
def test_a_prediction_that_is_no_text_is_refused(name, bad):
    with pytest.raises(ValueError, match="`prediction`="):
        METRICS[name](bad, ["A", "B"])


def test_metrics_are_found_by_name():
    assert {name: get_metric(name) for name in METRICS} == METRICS
    for wrong, near in [("exact-match", "exact_match"), ("ANLS", "anls"), ("vqa_acc", "vqa_accuracy"), ("", ".*")]:
        with pytest.raises(ValueError, match=f"`metric`='{wrong}'.*perhaps '{near}'; .*relaxed_accuracy"):
            get_metric(wrong)
