"""What travels under layer-map, on two real ranks."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROUTED = Path(__file__).with_name("routed.py")


def test_what_was_sent_is_gone_when_the_next_layers_are_on_their_way_and_nothing_else_travels(forked, tmp_path):
    said = tmp_path / "stderr"
    assert forked.run([], 2, said, tmp_path, timeout=200, script=ROUTED) == [0, 0], said.read_text()
    # Of seven layers, rank 0 trains four, of two ranks' tokens each: beside the one at work there are the layers that
    # have not left, and those on their way in both directions; of the last wave no more than what arrived.
    alive = [float(word) for word in (tmp_path / "found").read_text().split()]
    assert (
        alive
        == [
            2 + 4 + 3,
            2 + 4 + 1,
            2 + 2 + 1,
            2,
        ]
        * 2
    )
