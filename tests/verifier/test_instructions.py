"""Reward "instructions": what follows each instruction and what does not, and the share of them."""

import json

import pytest

from spiral_jax.tasks.problem import Problem, TaskError
from spiral_jax.verifier.instructions import (
    CHECKS,
    BrokenInstructions,
    check_instructions,
    instructions_reward,
)
from spiral_jax.verifier.references import check_problems
from spiral_jax.verifier.settings import VerifierSettings
from spiral_jax.verifier.verifier import Verifier

FIVE = "One two three four five."
# name -> arguments, answers that follow it, answers that do not
CASES = {
    "keywords:existence": (
        {"keywords": ["sea", "ship"]},
        ["A ship at Sea.", "ship, sea"],
        ["A ship.", "ships at seas"],
    ),
    "keywords:frequency": (
        {"keyword": "tea", "frequency": 2, "relation": "at least"},
        ["Tea and tea."],
        ["tea and team", "no"],
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["no"]}, ["now", "none"], ["No!", "say no"]),
    "keywords:letter_frequency": (
        {"letter": "q", "let_frequency": 2, "let_relation": "less than"},
        ["Quick", "x"],
        ["qQ", "quack quick"],
    ),
    "length_constraints:number_words": (
        {"num_words": 5, "relation": "at least"},
        [FIVE, "it's 1 2 3 4"],
        ["one two", "- - - - - -"],
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"},
        ["One. Two!", "It costs 3.50 today", "What?! Yes"],
        ["A. B. C.", "A! B? C"],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        ["one\n***\ntwo", "one *** two", "***\none\n***\ntwo"],
        ["one", "one\n***\n***\ntwo", "a *** b *** c"],
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        ["First.\n\nThen, more."],
        ["Then.\n\nFirst.", "a\n\nThen\n\nb", "Then"],
    ),
    "detectable_content:number_placeholders": (
        {"num_placeholders": 2},
        ["[name] in [city]"],
        ["[name]", "[]", "[[name]]"],
    ),
    "detectable_content:postscript": (
        {"postscript_marker": "P.S."},
        ["x\nP.S. y", "p.s. z", "PS y"],
        ["nothing"],
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        ["* a\n* b", "text\n- a\n - b"],
        ["* a", "* a\n* b\n- c", "**bold**\n* a"],
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        ["*a* and **b c**"],
        ["*a*", "* * x"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb"],
        ["Section 1", "Section one\nSection two"],
    ),
    "detectable_format:json_format": (
        {},
        ['{"a": 1}', "```json\n[1, 2]\n```", "3"],
        ["{a: 1}", "Here: {}", "```\nx\n```"],
    ),
    "detectable_format:title": ({}, ["<<A poem>>\nx"], ["<A poem>", "<< >>"]),
    "detectable_format:constrained_response": (
        {},
        ["My answer is yes."],
        ["yes", "My answer is sure."],
    ),
    "combination:two_responses": (
        {},
        ["a\n******\nb"],
        ["a", "a\n******\na", "a ****** b ****** c"],
    ),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": "Say it."},
        ["Say it. It.", "say it. x"],
        ["It. Say it."],
    ),
    "startend:end_checker": (
        {"end_phrase": "The end."},
        ["x. The end.", '"the end."'],
        ["The end"],
    ),
    "startend:quotation": ({}, ['"quoted"'], ["'quoted'", '"', '"open']),
    "change_case:english_lowercase": ({}, ["all small, 3"], ["Not"]),
    "change_case:english_capital": ({}, ["ALL 3"], ["aLL"]),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["NASA and ESA"],
        ["NASA and Esa", "B2B"],
    ),
    "punctuation:no_comma": ({}, ["no comma"], ["one, two"]),
}


def asked(*names, **changes):
    kwargs = [CASES[name][0] | changes for name in names]
    columns = {"instruction_id_list": list(names), "kwargs": kwargs}
    return Problem("p", "?", "", columns)


def test_every_check_has_a_case():
    assert CASES.keys() == CHECKS.keys()


@pytest.mark.parametrize("name", CASES)
def test_what_follows_an_instruction_and_what_does_not(name):
    _, following, others = CASES[name]
    problem = asked(name, unused=None)  # data sets fill up kwargs with None
    check_instructions(problem)
    for text in following:
        assert instructions_reward(f"<think>, Hm. *</think>\n{text}\n", problem) == 1, text
    for text in (*others, ""):
        assert instructions_reward(text, problem) == 0, text


def test_the_reward_is_the_share_and_comes_from_a_worker():
    problem = asked("punctuation:no_comma", "startend:quotation", "detectable_format:title")
    items = [('"plain"', problem), ('"<<t>>"', problem), ("a, b", problem)]
    with Verifier("instructions", VerifierSettings(workers=1, timeout_s=20.0)) as verifier:
        rewards = [verdict.reward for verdict in verifier.verify(items)]
    assert rewards == pytest.approx([2 / 3, 1, 0], abs=1e-7)  # multiples of 2^-24


def test_instructions_may_stand_in_the_reference_answer():
    asks = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]}
    problem = Problem("p", "?", json.dumps(asks))
    assert [instructions_reward(text, problem) for text in ("a b", "a, b")] == [1, 0]


@pytest.mark.parametrize(
    ("columns", "part"),
    [
        ({"difficulty": 1}, "instruction_id_list"),
        ({"instruction_id_list": ["language:response_language"], "kwargs": [{}]}, "unknown"),
        ({"instruction_id_list": ["startend:quotation"], "kwargs": []}, "as many"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{}]}, "lack keywords"),
        (
            {
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"num_words": 5, "relation": "about"}],
            },
            "relation",
        ),
        ({"instruction_id_list": ["startend:quotation"], "kwargs": ["{}"]}, "train:7"),
        ({"instruction_id_list": ["startend:quotation"], "kwargs": 5}, "train:7"),
        ({"instruction_id_list": [["startend:quotation"]], "kwargs": [{}]}, "train:7"),
    ],
)
def test_instructions_that_cannot_be_checked_are_refused_at_the_start(columns, part):
    problem = Problem("train:7", "?", "", columns)
    if part not in ("as many", "train:7"):
        with pytest.raises(BrokenInstructions, match=part):
            instructions_reward("x", problem)
    with pytest.raises(TaskError, match=part):
        check_problems([problem, asked("punctuation:no_comma")], lambda problem: "instructions")
