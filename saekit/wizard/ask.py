"""The two answerers: a person at a terminal, or the defaults."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console
from rich.text import Text

from saekit.errors import UserError
from saekit.text import for_screen, wrap
from saekit.views.plan import render_plan
from saekit.wizard.draft import Draft
from saekit.wizard.walk import QUOTE, Back, Fact, Planned, Question, Refused

INDENT = 13
"""Columns that the names of the answers take."""
KEYS = "Enter takes it · → edits it · Esc or < goes back · Ctrl-C quits and writes nothing"
KEYS_AGAIN = "Enter tries it · Ctrl-U clears it · Esc goes back · Ctrl-C quits and writes nothing"
"""For an answer that was refused, and stands there to be edited."""


class Defaults:
    """Takes every default; the first that cannot be used ends it.

    Args:
        console: Where to show what was taken.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def ask(self, question: Question, draft: Draft, default: str, refused: Refused | None) -> str:
        """Take the default; raise what was wrong with it where it was refused."""
        if refused is not None:
            raise UserError(refused.problem)
        return default

    def went_back(self, question: Question) -> None:
        """Nothing: this one never goes back."""

    def working(self, text: str) -> AbstractContextManager[object]:
        """Show nothing while something takes time."""
        return nullcontext()

    def answered(self, question: Question, answer: str, told: Sequence[Fact]) -> None:
        """Show what was taken."""
        show(self.console, question, answer, told)


class Terminal:
    """Somebody who types.

    A question takes a few lines while it is open and leaves one with its answer, so that what stays on the screen is
    the list of answers.

    Args:
        console: Where everything is shown; stderr, as stdout carries the result.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def ask(self, question: Question, draft: Draft, default: str, refused: Refused | None) -> str:
        """Ask at the prompt; Esc or `<` raises `Back`."""
        from saekit.wizard import prompt

        choices = question.choices(draft)
        more = " · ↑ ↓ choose" if choices else " · Tab completes" if question.is_path else ""
        typed = prompt.ask(
            prompt.Prompt(
                question.label,
                self._wrapped(question.explain(draft)),
                default,
                hint=self._wrapped((KEYS_AGAIN if refused else KEYS) + more),
                problem=self._wrapped(f"✗ {refused.problem}") if refused else "",
                rejected=refused.answer if refused else "",
                choices=choices,
                is_path=question.is_path,
            )
        )
        if typed is None or typed.strip() == "<":
            raise Back
        return typed

    def went_back(self, question: Question) -> None:
        """Say which question comes again."""
        self.console.print(Text(f"↩ back to {question.label}", style="dim"))

    def working(self, text: str) -> AbstractContextManager[object]:
        """Show a spinner while something takes time."""
        return self.console.status(text) if text else nullcontext()

    def answered(self, question: Question, answer: str, told: Sequence[Fact]) -> None:
        """Leave a line with the answer."""
        show(self.console, question, answer, told)

    def _wrapped(self, text: str) -> str:
        """Broken between words, which the prompt would not do."""
        return wrap(text, self.console.width - 2)


def show(console: Console, question: Question, answer: str, told: Sequence[Fact]) -> None:
    """The answer behind the question's name, and below it what there is to say about it."""
    margin = " " * INDENT
    console.print(Text(f"{question.label:{INDENT}}", style="dim"), Text(answer, style="bold"), sep="", soft_wrap=True)
    for fact in told:
        if isinstance(fact, Planned):
            console.print()
            render_plan(fact.plan, console, fact.advice)
            console.print()
        else:
            lines = for_screen(f"{margin}{fact}", console, f"{margin}{QUOTE if fact.startswith(QUOTE) else ''}")
            console.print(Text(lines, style="dim"), soft_wrap=True)
