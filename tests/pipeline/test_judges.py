"""What each judge reads from an answer."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.prompt import LETTERS
from pipeline.scoring.judges import judge_of, m3cot_choice, scienceqa_choice, strict_choice

FRUIT = ("a fig", "a pear", "Plum", "a red plum")


@pytest.mark.parametrize(
    ("text", "style", "choice"),
    [
        ("Therefore, the answer is B", "letter", 1),
        ("It is red.\nTherefore, the answer is D.\n", "letter", 3),
        ("Therefore, the answer is A\nTherefore, the answer is C", "letter", 2),
        ("Therefore, the answer is E", "letter", None),  # there are four choices
        ("Therefore, the answer is B or C", "letter", None),
        ("Therefore, the answer is b", "letter", None),
        ("Therefore, the answer is BA", "letter", None),
        ("the answer is B", "letter", None),
        ("B", "letter", None),
        ("", "letter", None),
        ("Therefore, the answer is 1", "letter", None),
        ("Therefore, the answer is 1", "index", 1),
        ("Therefore, the answer is 4", "index", None),
        ("Therefore, the answer is B", "index", None),
        ("Therefore, the answer is B. And so on", "letter", None),
    ],
)
def test_only_the_trained_sentence_counts(text: str, style: str, choice: int | None) -> None:
    assert strict_choice(text, 4, style) == choice


def test_an_end_mark_and_absurd_numbers() -> None:
    assert strict_choice("Therefore, the answer is B</s>", 4, "letter") == 1
    assert strict_choice("Therefore, the answer is " + "9" * 5000, 4, "index") is None


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        # letters in round brackets: the last one, in any case, before everything else
        ("(B) a pear", 1),
        ("First (A), then (c).", 2),
        ("It is not a pear, so (a)</s>", 0),
        ("(Z)", 25),  # there is no such choice: still decided, and wrong
        ("(ab) [B] ( B )  a fig", 0),  # none of these is a letter in brackets
        # choice texts: the last choice, not the last in the text
        ("A PEAR, not A FIG", 1),
        ("a red plum", 3),  # holds "Plum" too
        ("plum or a fig", 2),
        ("B: a fig", 0),
        # capital letters standing alone: the highest
        ("B", 1),
        ("C or A", 2),
        ("The answer:\nD.", 3),
        ("B,A!", 1),
        ("Is it C?", 2),
        ("A\tB", None),  # a tab is no space
        ("B: yes", None),
        ("E", None),  # there are four choices
        # small letters standing alone
        ("it is b", 1),
        ("it is b, or D", 3),  # capitals first
        ("what a thing", 0),
        # nothing
        ("", None),
        ("I cannot tell", None),
        # the marked part
        ("[Answer] B [Rationale] because of (A)", 1),
        ("(A) [Answer] C [Context] (D) [Rationale] (B)", 2),
        ("[Answer] B [Answer] nothing", None),
        ("(A) [Answer]", None),
        ("[Context] D [Rationale] C", 3),  # without [Answer] these marks cut nothing
    ],
)
def test_m3cot_rules(text: str, choice: int | None) -> None:
    assert m3cot_choice(text, FRUIT) == choice


def test_m3cot_needs_no_certain_number_of_choices() -> None:
    assert m3cot_choice("B", ("x1", "x2")) == 1
    assert m3cot_choice("H", [f"x{i}" for i in range(8)]) == 7
    assert m3cot_choice("nothing here", [f"choice {i}" for i in range(30)]) is None
    assert m3cot_choice("choice 29 it is", [f"choice {i}" for i in range(30)]) == 29
    assert m3cot_choice("C", ()) is None


texts = st.text(alphabet=st.sampled_from("abcdeABCDE()[].,! \nxyz"), max_size=40)
choice_lists = st.lists(st.text("fghij", min_size=1, max_size=3), min_size=2, max_size=5)


@given(texts, choice_lists, st.sampled_from("abcdeABCDE"))
def test_m3cot_last_bracket_wins_over_any_text(text: str, choices: list[str], letter: str) -> None:
    assert m3cot_choice(f"{text}({letter}) {choices[0]}", choices) == LETTERS.index(letter.upper())


@given(texts, choice_lists)
def test_m3cot_names_what_the_text_holds(text: str, choices: list[str]) -> None:
    """Whatever is named, a sign of it is in the text; where nothing is, no letter stands alone."""
    choice = m3cot_choice(text, choices)
    alone = re.findall(r"(?<![^ \n.,!?])[A-Za-z](?![^ \n.,!?])", text)
    if choice is None:
        assert "(" not in text or not re.search(r"\([A-Za-z]\)", text)
        assert not {letter.upper() for letter in alone} & set(LETTERS[: len(choices)])
    else:
        letter = LETTERS[choice]
        assert letter in text.upper() or choices[choice].lower() in text.lower()


@given(texts, choice_lists)
def test_m3cot_reads_only_behind_the_mark(text: str, choices: list[str]) -> None:
    """`[Answer]` hides what stands before it, `[Rationale]` what comes after."""
    assert m3cot_choice(f"(A) [Answer]{text}[Rationale] (B)", choices) == m3cot_choice(text, choices)


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("The answer is B.", 1),
        ("The answer is B. BECAUSE: ...", 1),
        ("The answer is A. The answer is B.", None),
        ("The answer is E.", None),  # there are four choices
        ("The answer is B", None),  # the benchmark's pattern wants one more character
        ("the answer is B.", None),
        ("Therefore, the answer is 2", 2),
        ("Therefore, the answer is B", 1),
        ("Therefore, the answer is 4", None),
        ("B", None),
    ],
)
def test_scienceqa_rules(text: str, choice: int | None) -> None:
    assert scienceqa_choice(text, FRUIT) == choice


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        (["Which?", "Therefore, the answer is B"], "B"),
        (["Which?", "the answer is correct"], "C"),  # a word's first letter counts
        (["Which?", "THE ANSWER\nIS\n\nd"], "D"),
        (["Which?", "The answer is A. No, the answer is B, or the answer is A"], "ABA"),  # all of them
        (["Is the answer is D?", "I do not know"], "D"),  # the prompt counts too
        (["Which?\nAnswer:\n", "Because it is red"], "B"),
        (["Which?\nAnswer:assistant", "C"], "C"),  # the chat template's word is taken away
        (["Which?", "the answer is 2"], ""),
        (["Which?", "The answer is \u212a"], ""),  # a Kelvin sign is no K
        (["Which?", ""], ""),
    ],
)
def test_released_m3cot_rule(messages: list[str], named: str) -> None:
    assert judge_of("m3cot", "released")(messages, FRUIT) == [LETTERS.index(letter) for letter in named]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Therefore, the answer is 1", [1]),
        ("therefore the  answer is 3!", [3]),
        ("the answer is 2. Therefore, the answer is 0", [0]),  # the narrower pattern first
        ("the answer is 2, the answer is 0", [2]),  # else the first
        ("the answer is B, yet my answer is: 3", [3]),  # any digit before any letter
        ("the answer is correct", [2]),
        ("answer is: d", [3]),
        ("the answer is 12", [1]),
        ("2", []),
    ],
)
def test_released_scienceqa_rule(text: str, named: list[int]) -> None:
    assert judge_of("scienceqa", "released")(["the answer is 3", text], FRUIT) == named  # the prompt does not count


def test_judges_by_name() -> None:
    """The same words, judged by every name."""
    messages = ["Which?", "Therefore, the answer is B"]
    assert judge_of("m3cot", "official")(messages, FRUIT) == judge_of("m3cot", "strict")(messages, FRUIT) == [1]
    assert judge_of("scienceqa", "strict")(messages, FRUIT) == []  # an index is trained there
    assert judge_of("scienceqa", "strict", "letter")(messages, FRUIT) == [1]
    assert judge_of("scienceqa", "official")(messages, FRUIT) == [1]
    assert judge_of("m3cot", "official")(["(A)", "no idea"], FRUIT) == []  # the prompt is not judged
