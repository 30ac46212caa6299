"""A placement from outside the package is one file, and no other file needs to know of it."""

import json
import sys

import pytest

from saekit.errors import UserError
from saekit.placement.choose import choose, kind_of, kinds, launched_as
from saekit.registry import PLACEMENTS, load_plugin
from tests.cli.conftest import saekit, train  # noqa: F401  # fixtures

ONE_FILE = '''
from saekit.placement import Single
from saekit.placement.ddp import Ddp
from saekit.registry import PLACEMENTS


@PLACEMENTS.register("counting")
class Counting(Single):
    """One process that notes how often its optimizers step."""

    name = "counting"
    title = "one process that counts its steps"
    steps = 0

    def apply(self, lr_scale):
        type(self).steps += 1
        super().apply(lr_scale)


@PLACEMENTS.register("loud-ddp")
class Loud(Ddp):
    """As ddp, for options that it takes; only its answers are asked here."""

    name = "loud-ddp"
    title = "every process holds all SAEs and says so"

    @classmethod
    def supports(cls, train):
        return "--optimizer adam is too quiet" if train.optimizer == "adam" else super().supports(train)
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The file above, loaded; forgotten afterwards."""
    monkeypatch.setattr(PLACEMENTS, "_registered", {})
    monkeypatch.setattr(PLACEMENTS, "_origin", {})
    for name in [name for name in sys.modules if name.startswith("saekit_plugin_")]:
        monkeypatch.delitem(sys.modules, name)  # loaded once it would not be run again
    file = tmp_path / "placements.py"
    file.write_text(ONE_FILE, encoding="utf-8")
    load_plugin(file)


def test_it_is_trained_under(plugin, train):  # noqa: F811
    done = train("--placement", "counting")
    assert done.code == 0, done.err
    assert "counting" in done.err
    assert kind_of("counting").steps == 2048 // 32 // 4


def test_it_is_planned_and_launched_and_asked_what_it_supports(plugin, saekit, model_dir):  # noqa: F811
    planned = [
        saekit("plan", model_dir, "--json", "--gpus", gpus, "--gpu-memory", "1GiB", "--optimizer", optimizer, *more)
        for gpus, optimizer, more in ((1, "adam", ()), (2, "muon", ("--placement", "loud-ddp")), (2, "adam", ()))
    ]
    assert not any(done.code for done in planned), [done.err for done in planned]
    names = [list(json.loads(done.out)["placements"]) for done in planned]
    assert names == [["single", "counting"], ["ddp", "layer-map", "loud-ddp"], ["ddp", "layer-map", "zero3"]]
    both = json.loads(planned[1].out)["placements"]
    assert both["ddp"] == both["loud-ddp"]
    torchrun = {"LOCAL_RANK": "0", "ROLE_NAME": "loud-ddp"}
    assert choose("auto", torchrun) == choose("loud-ddp", torchrun | {"ROLE_NAME": "default"}) == "loud-ddp"
    assert launched_as({"distributed_type": "MULTI_GPU", "mpirun_config": {"role": "loud-ddp"}}) == "loud-ddp"
    assert [kind.name for kind in kinds(2)] == ["ddp", "layer-map", "zero3", "loud-ddp"]


def test_its_name_has_to_be_that_which_it_is_registered_under(plugin):
    PLACEMENTS.register("other")(type("Other", (kind_of("single"),), {}))
    with pytest.raises(UserError, match="placement 'other' has the name 'single': set `name` of Other"):
        kind_of("other")


def test_without_the_file_there_is_none_of_that_name(saekit, model_dir):  # noqa: F811
    done = saekit("plan", model_dir, "--placement", "counting")
    assert done.code == 2
    assert "there is no placement of that name: choose one of auto, single, ddp, layer-map, zero3" in done.err
