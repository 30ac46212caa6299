"""Where `saekit inspect` and `eval` look for SAEs, and where they do not."""

import json
import os

import pytest

from saekit import Sae, UserError
from saekit.runs.layout import FORMAT
from saekit.runs.locate import locate
from saekit.sae.storage import layer_number, natural_key


def sae(folder):
    Sae(4, 8, 2).save_to_disk(folder)
    return folder


@pytest.fixture
def home(tmp_path):
    """A home folder: a project with a run, another tool's files, an SAE deep below that is nobody's checkpoint."""
    home = tmp_path / "home"
    checkpoint = home / "work" / "r" / "step_00000010"
    for layer in (1, 2):
        sae(checkpoint / f"layers.{layer}")
    (checkpoint / "checkpoint.json").write_text(json.dumps({"format": FORMAT, "hookpoints": [], "files": {}}))
    (home / "game").mkdir()
    (home / "game" / "checkpoint.json").write_text('{"level": 7}')
    return home


def test_a_folder_high_up_names_the_checkpoint_that_lies_in_it(home):
    with pytest.raises(UserError, match=r"home is not a checkpoint, but contains one: give \S*/r/step_00000010$"):
        locate(home)


def test_only_a_checkpoint_is_suggested(home):
    # Sorted before the real one; a file of another tool makes no checkpoint of what is below it.
    (home / "another").mkdir()
    (home / "another" / "checkpoint.json").write_text('{"level": 7}')
    sae(home / "another" / "model" / "layers.0")
    with pytest.raises(
        UserError, match=r"contains several checkpoints: give one of them, such as \S*work/r/step_00000010$"
    ):
        locate(home)


def test_saes_of_another_tool_are_found_where_they_are(home):
    folder = home / "theirs" / "pile"
    sae(folder / "layers.0")
    sae(folder / "layers.1" / "seed2")
    assert list(locate(folder).saes) == ["layers.0", "layers.1/seed2"]
    with pytest.raises(UserError, match=r"theirs is not a checkpoint, but contains one: give \S*theirs/pile$"):
        locate(home / "theirs")


def test_a_home_full_of_folders_is_not_searched_to_its_end(home, monkeypatch):
    monkeypatch.setattr("saekit.sae.storage.SEARCH_LIMIT", 20)
    seen = []
    for number in range(10):
        (home / f"project{number}" / "src").mkdir(parents=True)
    scandir = os.scandir
    monkeypatch.setattr("saekit.sae.storage.os.scandir", lambda path: seen.append(path) or scandir(path))
    with pytest.raises(UserError, match="home has more than 20 folders below it"):
        locate(home)
    assert len(set(seen)) == 20  # the folder itself is looked at for checkpoints, too


def test_a_search_does_not_follow_links_or_enter_hidden_folders(home, tmp_path):
    (tmp_path / "place" / ".cache" / "layers.0").mkdir(parents=True)
    sae(tmp_path / "place" / ".cache" / "layers.0")
    (tmp_path / "place" / "link").symlink_to(home)
    with pytest.raises(UserError, match="contains no SAE"):
        locate(tmp_path / "place")


def test_names_that_no_folder_can_have(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read|does not exist"):
        locate(tmp_path / ("a" * 300))


def test_numbers_in_names_sort_as_numbers_however_long():
    long = "layers." + "9" * 5000
    names = [long, "layers.10", "layers.9", "layers.0", "h.3²", "h.20"]
    assert sorted(names, key=natural_key) == ["h.3²", "h.20", "layers.0", "layers.9", "layers.10", long]
    assert natural_key("layers.09") == natural_key("layers.9")
    assert layer_number(long) is None
