"""Where an answer is looked for, and what counts as formatted."""

from __future__ import annotations

import pytest

from common.verifier import Outcome, grade
from common.verifier.extract import extract


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"a \boxed{1} b \boxed{2} c", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {5}", "5"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{\{1,2\}} and more {", r"\{1,2\}"),
        ("no answer", None),
        (r"\boxed{5} then \boxed{6", None),
        (r"\fbox{5}", None),
        (r"\boxed 5", None),
        (r"\boxed", None),
    ],
)
def test_boxed_takes_the_last_box_and_it_must_close(response: str, answer: str | None) -> None:
    assert extract(response, "boxed").answer == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("x</think> <answer>5</answer>", "5"),
        ("x</think> <answer> 5 </answer>", " 5 "),
        ("x</think> <answer>4</answer> <answer>5</answer>", "5"),
        (r"x</think> <answer>it is \boxed{5} ok</answer>", "5"),
        (r"x</think> <answer>\boxed{5</answer>", ""),
        ("x</think><answer>5</answer>", None),
        ("x</think>\n<answer>5</answer>", None),
        ("x</think> <answer>5", None),
        ("<answer>5</answer>", None),
        (r"\boxed{5}", None),
    ],
)
def test_answer_tags_are_strict(response: str, answer: str | None) -> None:
    assert extract(response, "answer_tag").answer == answer


def test_the_element_alone_suffices_where_the_template_asks_for_no_more() -> None:
    response = r"so it is five. <answer> \boxed{5} </answer>"
    assert grade(response, "5", template="answer").verdict is Outcome.CORRECT
    assert grade(response, "5", template="answer_tag").verdict is Outcome.UNFORMATTED
    assert grade(r"five: \boxed{5}", "5", template="answer").verdict is Outcome.UNFORMATTED


@pytest.mark.parametrize("gap", ["", " ", "\n", "\n\n", " \t "])
def test_white_space_between_tags_on_request(gap: str) -> None:
    response = f"x</think>{gap}<answer>5</answer>"
    assert grade(response, "5", template="answer_tag", allow_tag_whitespace=True).verdict is Outcome.CORRECT
    strict = grade(response, "5", template="answer_tag").verdict
    assert strict is (Outcome.CORRECT if gap == " " else Outcome.UNFORMATTED)


def test_an_unclosed_box_inside_tags_is_wrong_not_unformatted() -> None:
    assert grade(r"</think> <answer>\boxed{5</answer>", "5", template="answer_tag").verdict is Outcome.WRONG


def test_text_after_the_closing_tag_is_wrong() -> None:
    assert grade("</think> <answer>5</answer> or 6", "5", template="answer_tag").verdict is Outcome.WRONG


def test_prose_inside_tags_only_at_level_full() -> None:
    response = "</think> <answer>the answer is 5</answer>"
    assert grade(response, "5", template="answer_tag", level="fast").verdict is Outcome.WRONG
    assert grade(response, "5", template="answer_tag", level="full").verdict is Outcome.CORRECT


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        (r"\fbox{7}", "7", True),
        (r"\boxed 7", "7", True),
        ("<answer>7</answer>", "7", True),
        ("The answer is 7.", "7", True),
        ("The answer is 7 because 3+4=7", "7", True),
        ("Answer: 6 was a guess.\nAnswer: 7", "7", True),
        ("so $x = 7$ is the solution.", "7", True),
        ("First 3*4 = 12.\nThen 7", "7", True),
        ("I think the answer is C", "C", True),
        ("因此，一共有**7颗**糖果。", "7", True),
        ("3 or 4 or 7, who knows. 8", "7", False),
        ("It is 7. No, the answer is 8.", "7", False),
        ("I don't know.", "7", False),
        (r"\boxed{8}. The answer is 7", "7", False),
        ("<think> the answer is 7", "7", False),
    ],
)
def test_auto_looks_in_one_place_only(response: str, gold: str, right: bool) -> None:
    verdict = grade(response, gold, level="full", template="auto").verdict
    assert (verdict is Outcome.CORRECT) == right


def test_adjacent_boxes_are_one_answer_only_for_a_list() -> None:
    response = r"\boxed{1}, \boxed{2} and \boxed{3}"
    assert grade(response, "1,2,3").verdict is Outcome.CORRECT
    assert grade(response, "3").verdict is Outcome.CORRECT
    assert grade(response, "1").verdict is Outcome.WRONG
    assert grade(r"\boxed{1} wait, no: \boxed{2}", "1,2").verdict is Outcome.WRONG
