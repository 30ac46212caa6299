"""The list of faults that the tests are tried with keeps up with the code."""

import pytest

from tests.mutants import FAULTS, ROOT


@pytest.mark.parametrize(("file", "good", "bad"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_a_fault_has_exactly_one_place(file, good, bad):
    assert (ROOT / file).read_text(encoding="utf-8").count(good) == 1
    assert good != bad
