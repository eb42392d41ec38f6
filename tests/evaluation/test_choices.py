import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflex.evaluation.choices import find_choice


COLORS = ["blue", "red", "green", "yellow"]
PETS = ["a cat", "a dog", "a bird"]
thousand = settings(max_examples=1000, deadline=None)


@pytest.mark.parametrize(
    "reply",
    [
        *["B", "b", " B\n", "(B)", "(b)", "[B]", "B.", "B)", "B:", "**B**", "**B.**", "Option B", "choice (b)."],
        *["Answer: B", "answer: b", "Answer:\nB", "Answer: **(B)**", "The answer is B", "the answer is b."],
        *["The answer is option B.", "The correct option is B", "The correct choice is: B", "My final answer is (B)."],
        *["The answer is B because A cat is small.", "There are two. Answer: The answer is B.", "Answer: B. a dog"],
        *["B. a dog", "(B) a dog", "B: a dog", "I think it is (B).", "It has four legs.\nB) a dog", "B\n\nAnswer: B"],
        *[
            "\\boxed{B}",
            "$\\boxed{B}$",
            "So \\boxed{\\text{B}}.",
            "The answer is \\boxed{B}.",
            "\\boxed{\\mathbf{(B)}}",
        ],
        *[
            "答案是B",
            "答案：B",
            "正确答案是 B。",
            "正确答案是：（B）",
            "答案为B，因为它有四条腿",
            "选B",
            "故选：B。",
            "选项B",
        ],
        *["Ｂ", "（B）", "（Ｂ）", "B。", "B．", "B、", "Ｂ．红色", "B、红色"],
        *["Option B is correct.", "I choose B", "I would choose option B.", "<answer>B</answer>", "**Answer:** B"],
        *["(A) It has no wings.\n(B) It barks.\nAnswer: (B)", "B\n\nExplanation: (A) is too small."],
        *["<think>Perhaps (A), or A.\nA</think>B", "perhaps (A)</think>\n\nThe answer is B."],
    ],
)
def test_reply_chooses_a_letter(reply):
    for options in (None, PETS):
        assert find_choice(reply, options) == 1


@pytest.mark.parametrize(
    "reply",
    [
        *["A or B", "A, B", "(A) or (B)", "A. a cat\nB. a dog", "Answer: A or B", "The answer is A and B", "AB", "B2"],
        *["The answer is A/B", "Answer: A. No, the answer is B.", "", " ", "?", "dog(s) and cat(s)", "B.A. in arts"],
        *["a lion", "The answer is a lion", "A lion", "I do not know", "no options", "Z", "the best"],
        *["The answer is A lion that sleeps", "Answer: A lion", "\\boxed{A}, \\boxed{B}", "\\boxed{AB}", "\\boxed{}"],
        *["答案不是B", "答案是A或B", "答案是A和B", "The answer is not B", "The answer isn't B"],
        *["<think>It is (B)", "<think>It is (B)</think>"],
        *["В", "Answer: В", "Β", "The answer is Β.", "ب", "ख", "\\boxed{В}", "ı", "(ı)"],
    ],
)
def test_reply_chooses_nothing(reply):
    assert find_choice(reply, PETS) is None
    assert find_choice(reply, [*PETS, *"EFGHIJ"]) is None or reply == "Z"


@pytest.mark.parametrize(
    "reply",
    [
        *[
            "red",
            "Red.",
            "The answer is red.",
            "Answer: red",
            "(b) red",
            "B red",
            "B - red",
            "B, red",
            "B、red",
            "ｒｅｄ",
        ],
        *[
            "\\boxed{red}",
            "\\boxed{\\text{red}}",
            "答案是red。",
            "The answer is red.\n\nIt is the (A) color of blood.",
        ],
    ],
)
def test_reply_chooses_an_options_text(reply):
    assert find_choice(reply, COLORS) == 1


def test_text_of_two_options_and_letters_that_are_texts():
    assert find_choice("dog", ["dog", "Dog.", "cat"]) is None
    assert find_choice("B", ["A", "B"]) == 1
    assert find_choice("B", ["B", "A"]) is None
    assert find_choice("-5", ["5", "-5"]) == find_choice("Answer: -5", ["5", "-5"]) == 1
    assert find_choice(r"\boxed{\frac{1}{2}}", ["1", r"\frac{1}{2}"]) == 1


def test_a_letter_beyond_the_options_points_to_nothing():
    assert find_choice("D", PETS) is None
    assert find_choice("D") == 3


@thousand
@given(st.text(st.sampled_from("ABCabcＢⒷВıſK（()).: \nansweri答案是选"), max_size=20))
def test_a_choice_is_an_option_and_stands_in_the_reply(reply):
    choice = find_choice(reply, ["x", "y"])
    assert choice is None or (choice in (0, 1) and "AB"[choice] in unicodedata.normalize("NFKC", reply).upper())


@thousand
@given(
    st.integers(0, 3),
    st.sampled_from(
        ["{}", "({})", "Answer: {}", "The answer is {}.", "**{}**", "{0}. {1}", "({0}) {1}", "答案是{}", "（{}）"]
    ),
)
def test_every_phrase_gives_every_letter(choice, phrase):
    assert find_choice(phrase.format("ABCD"[choice], COLORS[choice]), COLORS) == choice


@pytest.mark.parametrize("options", [[], "xy", ["x"] * 27, [1, 2]])
def test_options_that_are_no_list_of_texts_are_refused(options):
    with pytest.raises(ValueError, match="`options`=.*1 to 26 strings"):
        find_choice("A", options)


def test_a_reply_that_is_no_text_is_refused():
    with pytest.raises(ValueError, match="`reply`=None"):
        find_choice(None)
