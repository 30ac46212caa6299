"""The strict group refuses what NCCL refuses or gives late, and otherwise does what gloo does."""

import json
import math
import re
import subprocess
import sys
from types import FunctionType

import pytest
import torch
import torch.distributed as dist

from tests.forked import ROOT, environment
from tests.placement.refusals import REFUSALS
from tests.strict import StrictGroup

pytestmark = pytest.mark.slow
COLLECTIVES = re.compile("(all|reduce|broadcast|gather|scatter|barrier|send|recv|_all|_reduce)")
SCRIPT = ROOT / "tests" / "placement" / "refusals.py"


@pytest.fixture(scope="module")
def found(forked, tmp_path_factory):
    """What each of two ranks has written down."""
    folder = tmp_path_factory.mktemp("strict")
    codes = forked.run([folder / "rank"], 2, folder / "said", folder, timeout=120, script=SCRIPT, devices=True)
    assert codes == [0, 0], (folder / "said").read_text("utf-8")
    return [json.loads((folder / f"rank{rank}").read_text("utf-8")) for rank in range(2)]


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case.__name__)
def test_it_refuses(found, case):
    expected = re.escape(REFUSALS[case]).replace(re.escape("{}"), r"\d+")
    for each in found[: 1 if case.__name__ == "alone" else 2]:
        assert re.search(expected, each["refused"][case.__name__] or "nothing"), each["refused"][case.__name__]


def test_it_does_what_gloo_does(found):
    for each in found:
        assert len(each["operations"]) > 25
        assert [name for name, same in each["operations"].items() if not same] == []


def test_outputs_are_spoiled_until_somebody_waits(found):
    worst = [math.nan, torch.iinfo(torch.int32).max, True, math.nan]
    for each in found:
        before, after = each["late"]
        assert str(before) == str([[number] * 4 for number in worst])
        assert after == [[1, 2, 2, 4], [1, 2, 2, 4], [True] * 4, [1, 2, 2, 4]]


def test_the_device_is_told_from_the_host(found):
    host, device = "cpu", "cpu:0"
    for each in found:
        assert each["places"] == [host, device, host, device, host, device, device, device]


def test_it_can_hang_as_nccl_does_when_a_rank_is_gone(found):
    assert found[0]["hangs"] == [True, True]


def test_ranks_of_launchers_have_a_strict_group(tmp_path):
    """Those that are forked had one above."""
    says = f"import torch.distributed as dist; dist.init_process_group('gloo', init_method='file://{tmp_path}/meet', "
    says += "rank=0, world_size=1); print(type(dist.group.WORLD).__name__); dist.destroy_process_group()"
    told = environment() | {"LOCAL_RANK": "0"}
    done = subprocess.run([sys.executable, "-c", says], env=told, capture_output=True, text=True, check=False)
    assert done.stdout == "StrictGroup\n", done.stderr


def test_no_operation_goes_past_it():
    """For an operation that the group does not define, torch would fall back to gloo."""
    operations = {name for name in dir(dist.ProcessGroup) if COLLECTIVES.match(name)} - {"all_gather", "allocate"}
    assert len(operations) > 20
    assert operations <= {name for name, value in vars(StrictGroup).items() if isinstance(value, FunctionType)}
