from hypothesis import given
from hypothesis import strategies as st

from tokenflex.evaluation.metrics import exact_match


answers = st.text(st.sampled_from("aAbBcÇß. 1\n"), max_size=6)


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
