"""The list of faults that the tests are tried with keeps up with the code."""

import pytest

from tests.mutants import FAULTS
from tests.put_back import ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_fault_has_exactly_one_place(fault):
    assert (ROOT / fault.file).read_text(encoding="utf-8").count(fault.good) == 1
    assert fault.good != fault.bad
    assert [tests for suite in fault.suites() for tests in suite if not (ROOT / tests).exists()] == []


def test_no_two_faults_have_one_name():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
