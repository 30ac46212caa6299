"""`saekit man` writes pages with everything that `--help-all` shows."""

import re
import shutil
import subprocess

import pytest

from saekit.cli.reference import visible_commands
from tests.cli.conftest import built


@pytest.fixture
def pages(saekit, tmp_path):
    result = saekit("man", tmp_path / "man1")
    assert result.code == 0, result.err
    return {file.name: file.read_text(encoding="utf-8") for file in (tmp_path / "man1").iterdir()}


def test_a_page_for_each_command(pages):
    assert set(pages) == {"saekit.1", *(f"saekit-{name}.1" for name in visible_commands(built()))}
    for name, text in pages.items():
        assert text.startswith(f".TH {name.removesuffix('.1').upper()} 1 ")
        assert text.isascii()  # roff of any age reads it
        assert all(line[:2] != ". " and not line.startswith("'") for line in text.splitlines())
    assert "saekit\\-train(1)" in pages["saekit.1"]


def test_every_option_is_in_its_page(pages):
    for name, command in visible_commands(built()).items():
        text = pages[f"saekit-{name}.1"].replace("\\-", "-")
        shown = set(re.findall(r"\\fB(--?[a-z0-9-]+)\\fR", text))
        options = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
        assert {option for option in options if option.startswith("-")} <= shown
    assert "\\[u00D7]" in pages["saekit-train.1"]


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="needs mandoc")
def test_mandoc_finds_no_fault(pages, tmp_path):
    files = sorted(map(str, (tmp_path / "man1").iterdir()))
    done = subprocess.run(["mandoc", "-Tlint", "-Wwarning", *files], capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == ""


def test_a_folder_that_cannot_be_written(saekit, tmp_path):
    (tmp_path / "file").touch()
    result = saekit("man", tmp_path / "file" / "man1")
    assert result.code == 2
    assert result.err.startswith(f"Error: {tmp_path / 'file' / 'man1'} cannot be written (")
