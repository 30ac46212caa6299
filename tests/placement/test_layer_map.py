"""What travels under layer-map, on two real ranks."""

import pytest

from tests.placement.test_zero3 import torchrun

pytestmark = pytest.mark.slow


def test_what_was_sent_is_gone_when_the_next_layers_are_on_their_way_and_rows_are_counted_as_marked():
    result = torchrun("-m", "tests.placement.routed")
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if "ALIVE" in line)
    # Of seven layers, rank 0 trains four, of two ranks' tokens each: beside the one at work there are the layers that
    # have not left, and those on their way in both directions; of the last wave no more than what arrived.
    assert [float(word) for word in line.split()[1:]] == [2 + 4 + 3, 2 + 4 + 1, 2 + 2 + 1, 2] * 2
