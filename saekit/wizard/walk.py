"""Walks through the questions, forwards and back, with any `Asker`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from saekit.errors import UserError
from saekit.planning import Advice, Plan
from saekit.wizard.draft import Draft


class Planned(NamedTuple):
    """A plan, and changes to make if it does not fit."""

    plan: Plan
    advice: Sequence[Advice]


Fact = str | Planned
"""A message about an answer: a line, or a whole plan."""

QUOTE = "│ "
"""The prefix of a line that shows a part of a file."""


class Back(Exception):  # noqa: N818  # not an error
    """Asks for the previous question again."""


@dataclass(frozen=True)
class Question:
    """One question, and what to do with its answer."""

    key: str
    label: str
    """The name of the answer, in one or two words."""
    explain: Callable[[Draft], str]
    """Returns one line that explains the question."""
    default: Callable[[Draft], str]
    """Returns the default answer."""
    take: Callable[[Draft, str], Draft]
    """Returns the draft with the answer in it. Raises `UserError` if the answer cannot be used."""
    tell: Callable[[Draft], Sequence[Fact]] = lambda draft: ()
    """Returns the messages to show after the answer."""
    needed: Callable[[Draft], bool] = lambda draft: True
    """Tells whether to ask the question, given the earlier answers."""
    choices: Callable[[Draft], Sequence[str]] = lambda draft: ()
    """Returns the answers to offer, if they can be listed."""
    is_path: bool = False
    """Whether Tab completes paths."""
    working: str = ""
    """The status to show while the answer is checked, if that takes time."""


@dataclass(frozen=True)
class Refused:
    """An answer that cannot be used."""

    answer: str
    problem: str
    """The error message."""


class Asker(Protocol):
    """Gets answers to questions: from a user at a terminal, or from the defaults."""

    def ask(self, question: Question, draft: Draft, default: str, refused: Refused | None) -> str:
        """Return an answer.

        Args:
            question: The question.
            draft: The answers so far.
            default: The default answer.
            refused: The last answer to the same question, if it was refused.

        Raises:
            Back: To ask the previous question again.
            KeyboardInterrupt: To quit.
        """

    def went_back(self, question: Question) -> None:
        """Note that this question is asked again next."""

    def working(self, text: str) -> AbstractContextManager[object]:
        """Return a context for work that takes time, with a status text."""

    def answered(self, question: Question, answer: str, told: Sequence[Fact]) -> None:
        """Note that an answer was accepted, with the messages about it."""


def walk(questions: Sequence[Question], draft: Draft, asker: Asker) -> Draft:
    """Ask the questions one by one, and return the draft with all answers.

    Going back restores the earlier draft, so that nothing of a withdrawn answer remains. The earlier answer is offered
    as the default.

    Args:
        questions: All questions, in order.
        draft: The draft before the first question.
        asker: Gets the answers.

    Raises:
        KeyboardInterrupt: If the asker quits.
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
            if passed:  # the first question has no previous one
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
