"""The view of `saekit doctor`: a list per area, a mark per finding, the remedy beneath."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from saekit.doctor.checks import can_train
from saekit.doctor.findings import AREAS, TOGETHER, Finding
from saekit.text import wrap
from saekit.units import plural

MARKS = {"ok": ("✓", "green"), "note": ("!", "yellow"), "problem": ("✗", "red")}
REMEDY = "→ "
TO_ASCII = str.maketrans({"✓": "+", "✗": "x", "→": ">"})
WELL = "This machine has everything that saekit needs."
WIDEST = 110
"""Lines longer than this are hard to read."""


def render_findings(findings: Sequence[Finding], console: Console, well: str = WELL) -> None:
    """Print all findings, and in one line what they come to: `well` if there is no problem."""
    lines = [*_lists(findings, console), *_wrapped(summary(findings, well), min(console.width, WIDEST))]
    for line in lines:
        line.rstrip()
        if console.options.ascii_only:
            line.plain = line.plain.translate(TO_ASCII)
        console.print(line, no_wrap=True, overflow="ignore", crop=False)


def _lists(findings: Sequence[Finding], console: Console) -> Iterator[Text]:
    column = max((len(finding.name) for finding in findings), default=0) + 2
    for area in dict.fromkeys((*AREAS, *TOGETHER)):
        own = [finding for finding in findings if finding.area == area]
        if own:
            yield Text(area if area == "saekit" else area[0].upper() + area[1:], "bold")
            for finding in own:
                yield from _lines(finding, column, console)
            yield Text()


def _lines(finding: Finding, column: int, console: Console) -> Iterator[Text]:
    """A finding, and its remedy beneath; lines of our own, as a table would fill each up with blanks to its width."""
    mark, color = MARKS[finding.state]
    margin = 4 + column
    width = max(20, min(console.width, WIDEST) - margin)
    start = Text.assemble("  ", (mark, f"bold {color}"), " ", (finding.name.ljust(column), "dim"))
    for part in _wrapped(Text(finding.found), width):
        yield start + part
        start = Text(" " * margin)
    start += Text(REMEDY, color)
    for part in _wrapped(Text(finding.remedy or "", color), width - len(REMEDY)):
        if part:
            yield start + part
        start = Text(" " * (margin + len(REMEDY)))


def _wrapped(text: Text, width: int) -> Iterator[Text]:
    """Break lines between words; a path or a command that is longer than a line stays whole."""
    end = 0
    for line in wrap(text.plain, width).split("\n"):
        start = text.plain.index(line, end)
        end = start + len(line)
        yield text[start:end]


def summary(findings: Sequence[Finding], well: str = WELL) -> Text:
    """Make the last line: what has to be fixed, if anything."""
    problems = [finding.name for finding in findings if finding.state == "problem"]
    blocking = [finding.name for finding in findings if finding.blocks]
    notes = sum(finding.state == "note" for finding in findings)
    line = Text()
    if problems:
        line.append(f"{plural(len(problems), 'thing')} to fix: {', '.join(problems)}.", "bold red")
    else:
        line.append(well, "bold green")
    if not can_train(findings):
        line.append(f" saekit train cannot run until {' and '.join(blocking)} can be imported.", "bold red")
    if notes:
        line.append(f" {plural(notes, 'note')} (marked !).", "yellow")
    return line
