"""Which choices an answer's text names: three readings of the same outputs.

- official: the benchmark's own code. M3CoT's is lenient about the form of an answer, not about which choice it is.
- strict: the trained answer sentence at the text's end, and nothing else.
- released: what the paper's published inference code counts as right, to compare with its figures.

A judge takes the conversation's messages (the last one is the model's answer) and the choices, and returns 0-based
positions. The answer is right if the gold one is among them, and failed if there is none. A position may lie outside
the choices where the text names such a letter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from pipeline.prompt import ANSWER, LETTERS

Benchmark = Literal["m3cot", "scienceqa"]
JudgeName = Literal["official", "strict", "released"]
Style = Literal["letter", "index"]
Judge = Callable[[Sequence[str], Sequence[str]], list[int]]

_SENTENCE = re.compile(re.escape(ANSWER) + r"([A-Z]|[0-9]{1,9})\.?\s*(?:</s>)?\s*$")
_AFTER_ANSWER = re.compile(r"(?i:the\s+answer\s+is|answer:)\s*([A-Za-z])")
_ROLE_AFTER_PROMPT = re.compile(r"(?<=answer:)\s*assistant\b", re.IGNORECASE)
_LEADS = (r"(?i:therefore,?\s*the\s+answer\s+is\s+)", r"(?i:the\s+answer\s+is\s+)", r"(?i:answer\s+is:?\s*)")


def judge_of(benchmark: Benchmark, name: JudgeName, style: Style | None = None) -> Judge:
    """The judge of that name; `style`: how the strict one expects an answer (None: as published for the benchmark)."""
    if name == "strict":
        return partial(_strict, style=style or ("letter" if benchmark == "m3cot" else "index"))
    if name == "released":
        return _released_m3cot if benchmark == "m3cot" else _released_scienceqa
    read = m3cot_choice if benchmark == "m3cot" else scienceqa_choice
    return lambda messages, choices: _listed(read(messages[-1], choices))


def m3cot_choice(text: str, choices: Sequence[str]) -> int | None:
    """The choice that M3CoT's own judge reads from an answer (utils/metric.py of its repository), or None.

    The first rule that finds something decides: the last letter in round brackets, of any case and even where there is
    no such choice; the last choice whose text occurs, in any case; the last choice whose capital letter stands alone
    between spaces, line ends and `.,!?`; the same with small letters. Only what follows `[Answer]` counts where the
    text has that mark, up to a `[Rationale]` or `[Context]`; without it, these two marks mean nothing.
    """
    if "[Answer]" in text:
        text = re.split(r"\[Rationale\]|\[Context\]", text.rpartition("[Answer]")[2])[0]
    if bracketed := re.findall(r"\(([A-Za-z])\)", text):
        return LETTERS.index(bracketed[-1].upper())
    letters = LETTERS[: len(choices)]
    words = re.sub(r"[\n.,!?]", " ", text).split(" ")
    lower = text.lower()
    for named in (
        [i for i, choice in enumerate(choices) if choice.lower() in lower],
        [i for i, letter in enumerate(letters) if letter in words],
        [i for i, letter in enumerate(letters) if letter.lower() in words],
    ):
        if named:
            return named[-1]
    return None


def scienceqa_choice(text: str, choices: Sequence[str]) -> int | None:
    """The choice that ScienceQA's own code reads from an answer (models/run_gpt3.py of its repository), or None.

    `The answer is X` and one more character, exactly once, and a choice that exists. Where that fails, the benchmark
    draws a choice at random; here, the answer sentence of this project is read instead (our addition: it begins
    otherwise and may end in an index), and without one the answer is a failed one.
    """
    found = re.findall(r"The answer is ([A-Z]).", text)
    if len(found) == 1 and found[0] in LETTERS[: len(choices)]:
        return LETTERS.index(found[0])
    return next((i for style in ("letter", "index") for i in _strict([text], choices, style)), None)


def strict_choice(text: str, choices: int, style: str) -> int | None:
    """The choice an answer names, or None.

    Strict: the text ends in the trained answer sentence with exactly one option, a letter or a 0-based index as
    `style` says.
    """
    found = _SENTENCE.search(text)
    if found is None:
        return None
    option = found[1]
    if option.isdigit() != (style == "index"):
        return None
    number = int(option) if style == "index" else LETTERS.index(option)
    return number if number < choices else None


def _strict(messages: Sequence[str], choices: Sequence[str], style: str) -> list[int]:
    return _listed(strict_choice(messages[-1], len(choices), style))


def _released_m3cot(messages: Sequence[str], choices: Sequence[str]) -> list[int]:
    """Every letter that follows `the answer is` or `Answer:` anywhere in prompt and output, in any case.

    Known: the pattern; that it runs over the decoded prompt and output; that a word's first letter counts, so that
    "the answer is correct" names C, and so does the first letter after a prompt that ends in `Answer:` (the code takes
    the chat template's `assistant` away there). Our reading: the messages joined by line ends stand for the decoded
    text, whose template words match nothing.
    """
    text = _ROLE_AFTER_PROMPT.sub("", "\n".join(messages))
    return [LETTERS.index(letter.upper()) for letter in _AFTER_ANSWER.findall(text)]


def _released_scienceqa(messages: Sequence[str], choices: Sequence[str]) -> list[int]:
    """The first digit after `the answer is`, else the first letter, in any case, in the output alone.

    Known: this is the rule of the Chameleon inference; three patterns from narrow to wide are tried for a digit (a
    0-based index; its first digit where there are more), then for a letter. Our reading: the Qwen2-VL figures on
    ScienceQA were counted by the same rule.
    """
    for option in (r"(\d)", "([A-Za-z])"):
        for lead in _LEADS:
            if found := re.search(lead + option, messages[-1]):
                return [int(found[1])] if found[1].isdigit() else [LETTERS.index(found[1].upper())]
    return []


def _listed(choice: int | None) -> list[int]:
    return [] if choice is None else [choice]
