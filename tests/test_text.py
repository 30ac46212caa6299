"""Text that fits: names stay different, lines break between words, commands can be pasted."""

import io
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from saekit.text import command, for_screen, least_width, shorten, tail, that_fits, wrap


class Screen(io.StringIO):
    def isatty(self):
        return True


def console(file, width):
    return Console(file=file, width=width)


@pytest.mark.parametrize(
    ("names", "width", "expected"),
    [
        (["layers.0", "layers.11"], 9, ["layers.0", "layers.11"]),
        (["layers.0", "layers.11"], 5, ["…rs.0", "…s.11"]),
        (["layers.0.mlp:in", "layers.11.mlp:in"], 9, ["…0.mlp:in", "…11.mlp:…"]),
        (["layers.0.mlp:in", "layers.11.mlp:in"], 4, ["…0.…", "…11…"]),
        (["layers.10", "layers.11"], 3, ["…10", "…11"]),
        (["a.11", "a.21"], 3, ["…11", "…21"]),
        (["0.mlp", "11.mlp"], 5, ["0.mlp", "11.m…"]),
        (["transformer.h.3"], 6, ["…r.h.3"]),
    ],
)
def test_shortened_names(names, width, expected):
    assert shorten(names, width) == expected


@given(
    numbers=st.lists(st.integers(0, 200), min_size=2, max_size=8, unique=True),
    before=st.text("ab.1", max_size=12),
    after=st.sampled_from(["", ".mlp", ".mlp:in", "_proj"]),
    more=st.integers(0, 12),
)
def test_shortened_names_fit_and_stay_different(numbers, before, after, more):
    names = [f"{before}.{number}{after}" for number in numbers]
    width = least_width(names) + more
    short = shorten(names, width)
    assert len(set(short)) == len(names)
    assert max(map(len, short)) <= width
    for number, each in zip(numbers, short, strict=True):
        assert str(number) in each


def test_the_end_of_a_name_stays():
    assert tail("model.layers.10", 9) == "…ayers.10"
    assert that_fits(["too long", "short", "s"], 5) == "short"
    assert that_fits(["too long", "short"], 2) == "short"


@given(st.lists(st.text("abc/-_.", min_size=1, max_size=40), min_size=1, max_size=30), st.integers(20, 100))
def test_lines_break_between_words_only(words, width):
    lines = wrap(" ".join(words), width).split("\n")
    assert [word for line in lines for word in line.split(" ")] == words
    assert all(len(line) <= width or " " not in line for line in lines)


def test_line_breaks_and_indents_stay():
    assert wrap("one\n  two three four five six", 21, "    ") == "one\n  two three four five\n    six"


def test_in_a_file_lines_stay_whole():
    long = "word " * 40
    assert for_screen(long, console(io.StringIO(), 40)) == long
    assert max(map(len, for_screen(long, console(Screen(), 40)).splitlines())) <= 40


@given(st.lists(st.text("ab '\"$\\", max_size=30), min_size=1, max_size=10), st.integers(20, 80))
def test_commands_are_the_same_words_in_a_shell(words, width):
    words = ["saekit", *words]
    shown = command(words, console(Screen(), width), "  ")
    assert shlex.split(shown.replace("\\\n", "")) == words
    assert command(words, console(io.StringIO(), width)) == shlex.join(words)
    for line in shown.split("\n"):
        assert len(line) <= width or len(shlex.split(line.removesuffix(" \\"))) == 1
