"""Calling the command line in this process, as the console script would."""

import sys
from functools import cache
from typing import NamedTuple

import pytest


class Result(NamedTuple):
    code: int
    out: str
    err: str


@cache
def built():
    """The command line as Typer builds it from our functions, at each start: a quarter of a second."""
    from typer.main import get_command

    from saekit.cli.app import app

    return get_command(app)


def build_once(patch):
    """Let `main` use one that is built already."""
    from saekit.cli.output import run

    patch.setattr("saekit.cli.app.run", lambda _: run(built()))


@pytest.fixture
def saekit(monkeypatch, capsys, tmp_path):
    """`saekit("train", ...)` runs the app in an empty folder; returns exit code, stdout and stderr."""
    from saekit.cli import main

    build_once(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["saekit", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code or 0
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call


@pytest.fixture
def train(saekit, model_dir, text_file):
    """`train("--k", 4)`: a small run of the tiny model on the short texts."""

    def call(*arguments, model=model_dir, data=text_file):
        small = ["--ctx-len", 32, "--max-tokens", 2048, "--layers", 1, "--num-latents", 64, "--k", 4]
        given = {argument for argument in arguments if isinstance(argument, str)}
        defaults = [
            part
            for option, value in zip(small[::2], small[1::2], strict=True)
            if option not in given and not (option == "--num-latents" and "--expansion-factor" in given)
            for part in (option, value)
        ]
        return saekit("train", model, data, "--batch-size", 4, *defaults, *arguments)

    return call
