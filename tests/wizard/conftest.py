"""Answering the questions in this process, from a script."""

import os
import shutil
from contextlib import nullcontext
from functools import partial

import pytest

from saekit.cli.launch import launch_files
from saekit.machine import cache_folder
from saekit.wizard import QUESTIONS, Back, Targets, start, walk

BACK, QUIT, ENTER = object(), object(), object()
"""Instead of an answer: go back, leave, take the default."""


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One for all, that has nothing but the native kernels, if some have been compiled already."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "saekit").mkdir()
    for file in cache_folder().glob("native-*.so"):
        shutil.copy(file, folder / "saekit")
    return folder


@pytest.fixture(autouse=True)
def _not_calibrated(cache, monkeypatch):
    """What a plan recommends would depend on how fast the machine was found to be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


class Scripted:
    """Gives one answer after the other, and the defaults when there are no more."""

    def __init__(self, *answers, then=ENTER):
        self.answers = list(answers)
        self.then = then
        self.asked = []
        """(key, default) of every question, in order."""
        self.problems = []
        self.told = {}
        self.explained = {}

    def ask(self, question, draft, default, refused):
        if refused is not None:
            self.problems.append((question.key, refused.answer, refused.problem))
            assert self.answers, f"a default was refused: {refused}"
        self.asked.append((question.key, default))
        self.explained[question.key] = question.explain(draft)
        answer = self.answers.pop(0) if self.answers else self.then
        if answer is BACK:
            raise Back
        if answer is QUIT:
            raise KeyboardInterrupt
        return default if answer is ENTER else answer

    def working(self, text):
        return nullcontext()

    def answered(self, question, answer, told):
        self.told[question.key] = [fact for fact in told if isinstance(fact, str)]

    def went_back(self, question):
        self.asked.append(("back to", question.key))


@pytest.fixture
def targets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Targets(tmp_path / "run.yaml", tmp_path / "launch.yaml", launch_files())


@pytest.fixture
def answer(targets):
    """`answer("1", ...)` walks through the real questions; returns the draft and the asker."""

    def call(*answers, processes="", **typed):
        asker = Scripted(*answers)
        return walk(QUESTIONS, start(typed, targets, processes), asker), asker

    return call


@pytest.fixture
def environment(forked):
    # Where tests run in several processes, each has a size of terminal in its environment.
    inherited = {name: value for name, value in forked.environment().items() if name not in ("COLUMNS", "LINES", "CI")}
    return {**inherited, "TERM": "xterm-256color", "PATH": f"{forked.commands}:{os.environ['PATH']}"}


@pytest.fixture
def config(forked, environment, tmp_path):
    """Run `saekit config` where there is no terminal."""
    return partial(forked.complete, "-m", "saekit", "config", cwd=tmp_path, environment=environment)
