"""Kinds by name: who may give a name to what."""

import pytest

from saekit import UserError
from saekit.registry import SELECTIONS, Registry
from saekit.sae.selection.topk import TopK


@pytest.fixture
def registry():
    """One built-in kind and no other."""
    return Registry("saekit.of_a_test", "thing", {"own": "saekit.sae.selection.topk:TopK"})


class Theirs:
    """What somebody else's package registers."""


@pytest.mark.parametrize("name", ["topk", "batchtopk", "groupmax"])
def test_no_plug_in_takes_the_name_of_a_built_in_kind(name):
    with pytest.raises(ValueError, match=f"there is already a selection '{name}'"):
        SELECTIONS.register(name)(Theirs)
    assert SELECTIONS.origin(name) is None


def test_no_plug_in_takes_the_name_of_another(registry):
    registry.register("theirs")(Theirs)
    with pytest.raises(ValueError, match="there is already a thing 'theirs'"):
        registry.register("theirs")(TopK)
    registry.register("theirs")(Theirs)  # as when its file is read again
    assert registry.get("theirs") is Theirs
    assert registry.origin("theirs") == __file__


def test_no_installed_package_takes_the_name_of_a_built_in_kind(registry, tmp_path, monkeypatch):
    (tmp_path / "theirs-1.0.dist-info").mkdir()
    (tmp_path / "theirs-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (tmp_path / "theirs-1.0.dist-info" / "entry_points.txt").write_text("[saekit.of_a_test]\nown = json:JSONDecoder\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert list(registry._installed) == ["own"], "else this would test nothing"
    assert registry.get("own") is TopK
    assert registry.origin("own") is None
    assert registry.names() == ("own",)


def test_the_names_are_told_where_there_is_none(registry):
    registry.register("theirs")(Theirs)
    assert "other" not in registry
    with pytest.raises(UserError, match="there is no thing 'other': choose one of own, theirs, or pass the file"):
        registry.get("other")
