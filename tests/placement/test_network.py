"""Ranks that measure the network, in whose place scripts do what ranks can do."""

import sys

import pytest

from saekit.errors import UserError
from saekit.placement import network

SAYS_MUCH = """
with open(1, "w") as out, open(2, "w") as errors:
    for stream in (errors, out):
        stream.write("NCCL INFO Channel 00/02 : 0 1\\n" * 10_000)  # more than a pipe takes
"""
WAITS_FOR_THE_OTHER = """
import pathlib, time
while not pathlib.Path(meet + ".other").exists():
    time.sleep(0.01)
pathlib.Path(result).write_text("[2.0, 1.0]")
"""


@pytest.fixture
def ranks(monkeypatch, tmp_path):
    """`ranks(first, second)`: what runs in place of the two ranks."""

    def stand_in(first, second):
        script = tmp_path / "python"
        code = f"import sys\nmeet, result, _, rank = sys.argv[3:]\nexec([{first!r}, {second!r}][int(rank)])\n"
        script.write_text(f"#!{sys.executable} -SE\n{code}")
        script.chmod(0o755)
        monkeypatch.setattr(network.sys, "executable", str(script))

    monkeypatch.setattr(network, "LIMIT", network.timedelta(seconds=5))
    return stand_in


def test_ranks_that_say_much_do_not_wait_to_be_heard(ranks):
    """As under NCCL_DEBUG=INFO; the second rank speaks before it meets the first."""
    ranks(WAITS_FOR_THE_OTHER, f"{SAYS_MUCH}open(meet + '.other', 'w').close()")
    assert network.measure_network(2) == (2.0, 1.0)


def test_a_rank_that_fails_is_quoted_and_the_other_is_not_waited_for(ranks, monkeypatch):
    monkeypatch.setattr(network, "LIMIT", network.timedelta(seconds=3600))
    ranks(WAITS_FOR_THE_OTHER, "sys.exit('invalid device ordinal')")
    with pytest.raises(UserError, match=r"2 ranks cannot exchange tensors \(invalid device ordinal\)"):
        network.measure_network(2)


def test_ranks_that_do_not_meet_are_given_up(ranks, monkeypatch):
    monkeypatch.setattr(network, "LIMIT", network.timedelta(seconds=0.2))
    ranks(WAITS_FOR_THE_OTHER, "")
    with pytest.raises(UserError, match=r"2 ranks did not meet within 0\.4 seconds"):
        network.measure_network(2)
