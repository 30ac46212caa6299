"""The way through the questions, forwards and back, for any kind of answerer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from saekit.errors import UserError
from saekit.planning import Advice, Plan
from saekit.wizard.draft import Draft


class Planned(NamedTuple):
    """A plan, and what to change where it does not fit."""

    plan: Plan
    advice: Sequence[Advice]


Fact = str | Planned
"""A message about an answer: a line, or a whole plan."""

QUOTE = "│ "
"""Begins a line that shows a piece of a file."""


class Back(Exception):  # noqa: N818  # not an error
    """The question before this one is wanted again."""


@dataclass(frozen=True)
class Question:
    """One question, and what becomes of its answer."""

    key: str
    label: str
    """Names the answer, in a word or two."""
    explain: Callable[[Draft], str]
    """One line on what is asked."""
    default: Callable[[Draft], str]
    take: Callable[[Draft, str], Draft]
    """The draft with the answer in it; raises `UserError` if it cannot be used."""
    tell: Callable[[Draft], Sequence[Fact]] = lambda draft: ()
    """The messages to show once it is answered."""
    needed: Callable[[Draft], bool] = lambda draft: True
    """Whether it has to be asked, given the answers before."""
    choices: Callable[[Draft], Sequence[str]] = lambda draft: ()
    """Answers to offer, where they can be listed."""
    is_path: bool = False
    working: str = ""
    """The status while the answer is being checked, if that takes time."""


@dataclass(frozen=True)
class Refused:
    """An answer that could not be used."""

    answer: str
    problem: str


class Asker(Protocol):
    """Answers questions: a person at a terminal, or the defaults."""

    def ask(self, question: Question, draft: Draft, default: str, refused: Refused | None) -> str:
        """One answer, after one to the same question that was refused if there was one.

        Raises:
            Back: If the question before is wanted.
            KeyboardInterrupt: If no more is to be asked.
        """

    def went_back(self, question: Question) -> None:
        """This one is asked again next."""

    def working(self, text: str) -> AbstractContextManager[object]:
        """While inside, something takes time."""

    def answered(self, question: Question, answer: str, told: Sequence[Fact]) -> None:
        """The answer was taken."""


def walk(questions: Sequence[Question], draft: Draft, asker: Asker) -> Draft:
    """Ask them one by one; returns the draft with all answers in it.

    Going back restores the draft of that time, so that nothing of a withdrawn answer is left. What had been typed is
    offered again.

    Raises:
        KeyboardInterrupt: When the asker has had enough.
    """
    passed: list[tuple[int, Draft]] = []
    said: dict[str, str] = {}
    number = 0
    while number < len(questions):
        question, before = questions[number], draft
        try:
            if question.needed(draft):
                draft = _answer(question, draft, said, asker)
                passed.append((number, before))
            number += 1
        except Back:
            if passed:  # there is nothing before the first
                number, draft = passed.pop()
                asker.went_back(questions[number])
    return draft


def _answer(question: Question, draft: Draft, said: dict[str, str], asker: Asker) -> Draft:
    """Ask one question until the answer can be used."""
    default = said.get(question.key) or question.default(draft)
    refused = None
    while True:
        answer = asker.ask(question, draft, default, refused).strip()
        try:
            with asker.working(question.working):
                after = question.take(draft, answer)
        except UserError as error:
            refused = Refused(answer, str(error))
            continue
        said[question.key] = answer
        asker.answered(question, answer, question.tell(after))
        return after
