"""Pages are short enough to be read, and the glossary is a list in which a word can be found."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
LIMIT = 1500
REFERENCES = {"formats.md", "glossary.md", "api.md"}
"""Pages to look things up in, not to read from start to end. The page of options is made from the code."""
GLOSSARY = (DOCS / "glossary.md").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^\| \*\*(.+?)\*\* \| (.*?) \| (.*?) \|$", GLOSSARY, re.MULTILINE)


def words(page):
    return len(page.read_text(encoding="utf-8").split())


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.name)
def test_a_page_is_read_at_one_sitting(page):
    assert page.name in REFERENCES or words(page) <= LIMIT


def test_the_glossary_has_each_word_once_in_alphabetical_order():
    found = [word for word, _, _ in ENTRIES]
    assert len(found) == GLOSSARY.count("\n| **") > 60
    assert found == sorted(set(found), key=str.lower)


@pytest.mark.parametrize(("word", "meaning"), [entry[:2] for entry in ENTRIES], ids=[entry[0] for entry in ENTRIES])
def test_an_entry_of_the_glossary_is_one_or_two_sentences(word, meaning):
    assert meaning.endswith((".", ".)"))
    assert len(re.findall(r"[.!?]\)?(?= [A-Z`(]|$)", meaning)) <= 2, word
