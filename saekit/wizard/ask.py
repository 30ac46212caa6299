"""The two kinds of `Asker`: a user at a terminal, or the defaults."""

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
"""The width of the column with the labels of the answers."""
KEYS = "Enter accepts · → edits · Esc or < goes back · Ctrl-C quits without writing"
KEYS_AGAIN = "Enter tries again · Ctrl-U clears · Esc goes back · Ctrl-C quits without writing"
"""The keys to correct a refused answer, which stays in the input line."""


class Defaults:
    """Takes every default. The first default that cannot be used is an error.

    Args:
        console: Where to show the answers.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def ask(self, question: Question, draft: Draft, default: str, refused: Refused | None) -> str:
        """Return the default.

        Raises:
            UserError: If the default was refused.
        """
        if refused is not None:
            raise UserError(refused.problem)
        return default

    def went_back(self, question: Question) -> None:
        """Do nothing, since this asker never goes back."""

    def working(self, text: str) -> AbstractContextManager[object]:
        """Show nothing during the work."""
        return nullcontext()

    def answered(self, question: Question, answer: str, told: Sequence[Fact]) -> None:
        """Show the answer."""
        show(self.console, question, answer, told)


class Terminal:
    """Asks a user at a terminal.

    An open question takes a few lines. After the answer, one line with the answer remains, so that the screen shows the
    list of answers.

    Args:
        console: Where everything is shown. It should be stderr, since stdout is for the result.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def ask(self, question: Question, draft: Draft, default: str, refused: Refused | None) -> str:
        """Ask at the prompt.

        Raises:
            Back: For Esc or `<`.
        """
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
        """Show which question is asked again."""
        self.console.print(Text(f"↩ back to {question.label}", style="dim"))

    def working(self, text: str) -> AbstractContextManager[object]:
        """Show a spinner during the work."""
        return self.console.status(text) if text else nullcontext()

    def answered(self, question: Question, answer: str, told: Sequence[Fact]) -> None:
        """Show a line with the answer."""
        show(self.console, question, answer, told)

    def _wrapped(self, text: str) -> str:
        """Wrap text between words, which the prompt does not do."""
        return wrap(text, self.console.width - 2)


def show(console: Console, question: Question, answer: str, told: Sequence[Fact]) -> None:
    """Show the question's label and the answer, and below them the facts about it."""
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
