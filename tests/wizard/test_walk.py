"""Forwards and back, without a terminal and without saekit's own questions."""

from dataclasses import replace

import pytest

from saekit.errors import UserError
from saekit.wizard import Draft, Targets, walk
from saekit.wizard.walk import Question
from tests.wizard.conftest import BACK, ENTER, QUIT, Scripted


def question(key, needed=lambda draft: True):
    def take(draft, text):
        if text == "bad":
            raise UserError(f"{key} cannot be bad")
        return draft.setting(**{key: text})

    return Question(key, key, lambda draft: key, lambda draft: f"default {key}", take, needed=needed)


@pytest.fixture
def empty(tmp_path):
    return Draft({}, frozenset(), Targets(tmp_path / "r", tmp_path / "l", {}))


ABC = (question("a"), question("b", needed=lambda draft: draft.values["a"] != "no b"), question("c"))


def test_defaults_to_the_end(empty):
    assert walk(ABC, empty, Scripted()).values == {name: f"default {name}" for name in "abc"}


def test_a_wrong_answer_is_asked_again_at_once_with_the_default_as_it_was(empty):
    asker = Scripted("1", "bad", "bad", "2")
    assert walk(ABC, empty, asker).values == {"a": "1", "b": "2", "c": "default c"}
    assert asker.problems == [("b", "bad", "b cannot be bad")] * 2
    assert asker.asked == [("a", "default a"), *[("b", "default b")] * 3, ("c", "default c")]


def test_back_offers_what_was_typed_and_forgets_what_became_of_it(empty):
    asker = Scripted("1", "2", BACK, BACK, "no b", "3")
    assert walk(ABC, empty, asker).values == {"a": "no b", "c": "3"}  # b, asked no more, has left nothing
    assert [key for key, _ in asker.asked] == ["a", "b", "c", "back to", "b", "back to", "a", "c"]
    assert dict(asker.asked)["a"] == "1"
    asker = Scripted("1", "2", BACK, BACK, ENTER, ENTER, "3")
    assert walk(ABC, empty, asker).values == {"a": "1", "b": "2", "c": "3"}


def test_back_skips_what_was_not_asked(empty):
    asker = Scripted("no b", BACK, "1", "2", "3")
    assert walk(ABC, empty, asker).values == {"a": "1", "b": "2", "c": "3"}


def test_before_the_first_question_there_is_nothing(empty):
    assert walk(ABC, empty, Scripted(BACK, BACK, "1")).values["a"] == "1"


def test_leaving(empty):
    with pytest.raises(KeyboardInterrupt):
        walk(ABC, empty, Scripted("1", QUIT))


def test_a_draft_is_never_changed_by_an_answer(empty):
    before = replace(empty, values={"a": 1})
    assert before.setting(a=None, b=2).values == {"b": 2}
    assert before.values == {"a": 1}
