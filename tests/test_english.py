"""Phrases that readers stumble over are in no text of the project; the glossary has the field's words."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORN = {
    "so many": "the number, or `this many`",
    "so-manieth": "every Nth",
    "whoever": "who it is: the caller, the user",
    "mends?|mended": "fix",
    "anew": "again",
    "as ever": "as before, or nothing",
    "beside": "next to, or compared with",
    "in the place of": "in place of, instead of",
    "without a word": "without an error message",
    "comes? along": "is included",
    "(is|are) warned of": "saekit warns if",
    "being asked": "interactive",
    "from cheap to dear": "cheapest first",
}
"""By expression, what to write instead."""
TEXTS = [
    *(ROOT / "saekit").rglob("*.py"),
    *(ROOT / "saekit").rglob("*.j2"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "examples").glob("*.py"),
    *(ROOT / "benchmarks").rglob("*.py"),
    *ROOT.glob("*.md"),
]


def worn(text):
    """The worn phrases in a text, each with the number of its line; a phrase may be cut by the end of a line."""
    for phrase in WORN:
        pattern = phrase.replace(" ", r"\s+(?:#\s*)?")
        for found in re.finditer(rf"(?<![\w-])(?:{pattern})(?![\w-])", text, re.ASCII):
            yield phrase, text.count("\n", 0, found.start()) + 1


def test_the_search_finds_what_it_is_for():
    text = "Sums so\n    # many rows as there are.\nA file BESIDE that, and a besides.\nWhat mends it lies beside it."
    assert sorted(worn(text)) == [("beside", 4), ("mends?|mended", 4), ("so many", 1)]


@pytest.mark.parametrize("room", ["saekit", "docs", "examples", "benchmarks", "."])
def test_no_worn_phrase(room):
    own = [file for file in TEXTS if file.is_relative_to(ROOT / room) and (room != "." or file.parent == ROOT)]
    assert own
    found = [
        f"{file.relative_to(ROOT)}:{line}: {phrase}: write {WORN[phrase]}"
        for file in own
        for phrase, line in worn(file.read_text(encoding="utf-8"))
    ]
    assert not found
