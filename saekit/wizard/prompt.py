"""Asks one question on a terminal: draws it, edits the answer, and erases it again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prompt_toolkit import Application
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, PathCompleter, get_common_complete_suffix
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.layout import BufferControl, FormattedTextControl, HSplit, Layout, Window
from prompt_toolkit.layout.processors import AfterInput, BeforeInput, ConditionalProcessor
from prompt_toolkit.output import create_output
from prompt_toolkit.styles import Style

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyPressEvent

SECONDS_FOR_ESCAPE = 0.05
"""How long to wait after Esc, since arrows and other keys begin with the same character."""
STYLE = Style.from_dict({"quiet": "ansibrightblack", "mark": "ansicyan", "problem": "ansired"})


@dataclass(frozen=True)
class Prompt:
    """The text on the screen while a question is open."""

    label: str
    explanation: str
    default: str
    """Shown until the user types something. Enter accepts it."""
    hint: str
    problem: str = ""
    """The problem with the previous answer."""
    rejected: str = ""
    """The previous answer, which the user can correct."""
    choices: Sequence[str] = field(default=())
    is_path: bool = False


def ask(prompt: Prompt) -> str | None:
    """Return the answer, or None for Esc.

    Raises:
        KeyboardInterrupt: For Ctrl-C, and for Ctrl-D if nothing was typed.
    """
    buffer = Buffer(document=Document(prompt.rejected), multiline=False)
    output = create_output(stdout=sys.stderr)
    if hasattr(output, "enable_cpr"):
        output.enable_cpr = False  # not every terminal reports the cursor's position, and it is not needed
    app: Application[str | None] = Application(
        layout=_layout(prompt, buffer),
        key_bindings=_keys(prompt, buffer),
        style=STYLE,
        erase_when_done=True,
        output=output,
    )
    app.ttimeoutlen = SECONDS_FOR_ESCAPE
    return app.run()


def _layout(prompt: Prompt, buffer: Buffer) -> Layout:
    placeholder = ConditionalProcessor(AfterInput(prompt.default, "class:quiet"), Condition(lambda: not buffer.text))
    control = BufferControl(buffer, input_processors=[BeforeInput("› ", "class:mark"), placeholder])
    above = FormattedText([("bold", f"\n{prompt.label}\n"), ("class:quiet", prompt.explanation)])
    problem = f"{prompt.problem}\n" if prompt.problem else ""
    below = FormattedText([("class:problem", problem), ("class:quiet", prompt.hint)])
    parts = (FormattedTextControl(above), control, FormattedTextControl(below))
    lines = HSplit([Window(part, wrap_lines=True, dont_extend_height=True) for part in parts])
    return Layout(lines, focused_element=control)


def _keys(prompt: Prompt, buffer: Buffer) -> KeyBindings:
    keys = KeyBindings()
    choices = list(prompt.choices)

    def put(text: str) -> None:
        buffer.text = text
        buffer.cursor_position = len(text)

    @keys.add("enter")
    def _take(event: KeyPressEvent) -> None:
        event.app.exit(result=buffer.text or prompt.default)

    @keys.add("escape", eager=True)
    def _back(event: KeyPressEvent) -> None:
        event.app.exit(result=None)

    @keys.add("c-c")
    @keys.add("<sigint>")
    @keys.add("c-d", filter=Condition(lambda: not buffer.text))
    def _quit(event: KeyPressEvent) -> None:
        event.app.exit(exception=KeyboardInterrupt())

    @keys.add("right", filter=Condition(lambda: not buffer.text))
    def _edit(event: KeyPressEvent) -> None:
        put(prompt.default)

    @keys.add("up", filter=Condition(lambda: bool(choices)))
    @keys.add("down", filter=Condition(lambda: bool(choices)))
    def _choose(event: KeyPressEvent) -> None:
        step = 1 if event.key_sequence[0].key == "down" else -1
        shown = buffer.text or prompt.default
        put(choices[(choices.index(shown) + step) % len(choices)] if shown in choices else choices[0])

    @keys.add("tab", filter=Condition(lambda: prompt.is_path))
    def _complete(event: KeyPressEvent) -> None:
        asked = CompleteEvent(completion_requested=True)
        found: list[Any] = list(PathCompleter(expanduser=True).get_completions(buffer.document, asked))
        buffer.insert_text(get_common_complete_suffix(buffer.document, found))

    return keys
