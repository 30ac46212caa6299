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
    "but for": "except for",
    "once more": "again",
    "no more than": "at most",
    "evidently": "clearly",
    "likewise": "in the same way, or also",
    "in vain": "what failed",
    "hence(?:forth)?|thereby|whereby|wherein|therein|thereof|hitherto|forthwith|albeit|whilst": "a plain word",
}
"""By expression, what to write instead."""
WORN_IN_DOCUMENTS = {
    "go(?:es)? on|going on|went on": "continue",
    "besides": "also, or in addition",
    "lies?": "is, or are",
    "stands?(?! for)": "is, or has",
    "behind": "after",
    "(?:deal|dealt) out": "divide among",
    "in all[,.;:]": "total",
}
"""The same, for what is read as prose: docstrings and comments still have these in places."""
TEXTS = [
    *(ROOT / "saekit").rglob("*.py"),
    *(ROOT / "saekit").rglob("*.j2"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "docs" / "tutorials").glob("*.ipynb"),
    *(ROOT / "examples").glob("*.py"),
    *(ROOT / "benchmarks").rglob("*.py"),
    *ROOT.glob("*.md"),
]


def worn(text, phrases=WORN):
    """The worn phrases in a text, each with the number of its line; a phrase may be cut by the end of a line."""
    for phrase in phrases:
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
    found = []
    for file in own:
        phrases = {**WORN, **WORN_IN_DOCUMENTS} if file.suffix == ".md" else WORN
        for phrase, line in worn(file.read_text(encoding="utf-8"), phrases):
            found.append(f"{file.relative_to(ROOT)}:{line}: {phrase}: write {phrases[phrase]}")
    assert not found
